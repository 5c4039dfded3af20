"""Putting the guard into a model and taking it out again, by substituting classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from vqguard.adapters.families.proven import proven_from
from vqguard.adapters.features import Site
from vqguard.adapters.registry import adapter_types, get_adapter, is_known
from vqguard.adapters.runtime.class_swap import become, guarded_class, is_patched
from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.runtime.guarded_modules import mixins_of, places, require_intact
from vqguard.adapters.runtime.refusing_generate import GuardedModel
from vqguard.adapters.runtime.taps import tap_class
from vqguard.adapters.seams import submodule
from vqguard.adapters.storage.saving import SavedWithGuard
from vqguard.config import GuardConfig
from vqguard.errors import ConfigError, SeamError

if TYPE_CHECKING:
    from vqguard.guard import VQGuard

Model = TypeVar("Model", bound=nn.Module)


def build_guard(model: nn.Module, *, site: Site = "projected", **overrides: Any) -> VQGuard:
    """A guard sized for `model`, not installed. `overrides`: any other field of `GuardConfig`.

    Entries are random until k-means or training sets them. Raises `SeamError` for a model type
    without an adapter, `ConfigError` for a wrong override.
    """
    from vqguard.guard import VQGuard

    adapter = get_adapter(model)
    adapter.check(model)
    width = adapter.width(model, site)
    sizes = {"patch_dim": width, "semantic_dim": width}
    levels = adapter.deep_levels(model)
    if levels:
        sizes["deepstack_levels"] = levels
    return VQGuard(GuardConfig.from_dict({**sizes, "site": site, **overrides}))


def guard_model(
    model: Model,
    guard: VQGuard,
    processor: Any = None,
    *,
    refusal_ids: tuple[int, ...] | list[int] | None = None,
    probe_inputs: Mapping[str, Any] | None = None,
) -> Model:
    """Install `guard` in `model`, in place, and return the same object. No weight is copied.

    The object keeps its class for `isinstance`, pipelines, Trainer and PEFT; it gains `screen`, a
    `generate` that refuses, a `save_pretrained` that writes the guard as well, and the submodule
    `vqguard`. Wrap with PEFT after this, not before.

    `forward` returns logits computed on codewords only and refuses nobody: training needs it.
    Verdicts of its images are in `recording(model.vqguard)`.

    A refusal is `guard.config.refusal_text` in the tokens of `processor` (a processor or a
    tokenizer), or `refusal_ids`; with neither it is a single end-of-text token.

    A model type that no adapter names is accepted only on proof: `probe_inputs`, what its processor
    returns for at least one image, with which the one-codeword probe must find nothing that gets
    past the guard, in `forward` and in `generate`, and refusals must reach the right rows. Without
    them `processor`, if it is one for images, is asked for two noise pictures.

    Raises `SeamError` when the model has no adapter and no proof, is guarded already, lacks a
    declared module, or the guard was made for other widths; `ConfigError` for unusable refusal ids.
    """
    adapter = get_adapter(model)
    if getattr(model, "vqguard", None) is not None:
        raise SeamError("the model is guarded already; call unguard_model(model) first")
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise SeamError(f"expected a transformers model that generates, got {type(model).__name__}")
    if hasattr(model, "get_base_model"):
        raise SeamError("the model is wrapped by PEFT: guard its base model, then wrap it again")
    adapter.check(model)
    site = guard.config.site
    width = adapter.width(model, site)
    for level, found in (
        ("patch", guard.config.patch_dim),
        ("semantic", guard.config.semantic_dim),
    ):
        if found != width:
            raise SeamError(
                f"{type(model).__name__} has features of width {width} at site {site!r}, the "
                f"guard's {level} codebook has {found}; build it with build_guard(model, "
                f"site={site!r})"
            )
    levels = adapter.deep_levels(model)
    if guard.config.deepstack_levels != levels:
        raise SeamError(
            f"{type(model).__name__} adds features in {levels} later layers, the guard has "
            f"{guard.config.deepstack_levels} deep-stack codebooks; build it with "
            f"build_guard(model, site={site!r})"
        )
    ids = _refusal_ids(model, guard, processor, refusal_ids)
    link = GuardLink(guard, adapter, ids, adapter.seams(model))
    if not is_known(model):
        _prove(model, guard, _examples(model, processor) if probe_inputs is None else probe_inputs)
    guard.to(_device(adapter.projectors(model)))
    guard.train(model.training)
    return install_link(model, link)


def _examples(model: Any, processor: Any) -> dict[str, Any] | None:
    """Inputs to prove a guard on; None when there is no processor, or a tokenizer alone."""
    if not hasattr(processor, "image_processor"):
        return None
    from vqguard.adapters.proof.conformance import example_inputs

    given = example_inputs(processor)
    return {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in given.items()}


def _prove(model: nn.Module, guard: VQGuard, inputs: Mapping[str, Any] | None) -> None:
    from vqguard.adapters.proof.conformance import check
    from vqguard.adapters.proof.probe import find_leak, one_codeword_probe

    kind: Any = model.config.model_type  # type: ignore[union-attr]
    if inputs is None:
        raise unproven(kind)
    result = one_codeword_probe(model, inputs, site=guard.config.site)
    if not result.passed:
        raise SeamError(
            f"the model type {kind!r} leaks around the guard ({result}): "
            f"{find_leak(model, inputs, site=guard.config.site)}; it was not guarded. Declare "
            "where its images enter with register_adapter"
        )
    found = check(model, inputs, site=guard.config.site, only=("rows", "all refused"))
    if found.failures:
        raise SeamError(
            f"the model type {kind!r} lets nothing past the guard, but its refusals do not work: "
            f"{found.failures[0].name}: {found.failures[0].detail}; it was not guarded"
        )


def unproven(model_type: str) -> SeamError:
    """What is raised when a type has to be proven first and there are no inputs to prove it on."""
    reason, remedy = _unknown(model_type)
    return SeamError(
        f"{reason}: pass its processor, or probe_inputs, what the processor returns for an image "
        f"and a prompt, so that the one-codeword probe can show that nothing gets past the guard; "
        f"or {remedy}"
    )


def _unknown(kind: str) -> tuple[str, str]:
    """(why a proof is asked for, what else would do)."""
    if kind not in adapter_types():
        return f"no adapter names the model type {kind!r}", (
            "declare an adapter with register_adapter"
        )
    import transformers

    needed = proven_from(kind)
    return (
        f"the adapter of {kind!r} was proven from transformers {needed} on, and this is "
        f"{transformers.__version__}, where its features may enter elsewhere"
    ), f"install transformers>={needed}"


def install_link(model: Model, link: GuardLink) -> Model:
    """Substitute the classes of a checked, unguarded model."""
    found = places(model, link)
    for module, names in found.items():
        _refuse_patches(module, [*names, *(("generate",) if module is model else ())])
    model.add_module("vqguard", link.guard)
    for module, names in found.items():
        mixins = mixins_of(names)
        if module is model:
            mixins = (_GuardedTop, *mixins)
        become(module, guarded_class(type(module), mixins))
        module.__dict__["_vqguard_link"] = link
        module.__dict__["_vqguard_top"] = model
        module.__dict__["_vqguard_seams"] = {
            name: index for name, index in names.items() if index is not None
        }
    for module in tapped_modules(model, link):
        become(module, tap_class(type(module)))
    model.__dict__["last_verdicts"] = []
    return model


def tapped_modules(model: nn.Module, link: GuardLink) -> list[nn.Module]:
    """The tower, and what is tapped at site "encoder"; none that is guarded otherwise."""
    modules = [link.adapter.watched(model, seam) for seam in link.seams]
    if link.guard.config.site == "encoder":
        modules += [submodule(model, tap.path, "projector") for tap in link.adapter.taps(model)]
    return [one for one in dict.fromkeys(modules) if "_vqguard_link" not in one.__dict__]


def unguard_model(model: Model) -> Model:
    """Take the guard out, in place: the model's outputs are again what they were, bit for bit.

    The guard is left as it is; keep a reference (`model.vqguard`) to install it again. Weights
    that training changed stay changed. Raises `SeamError` when the model is not guarded, or when a
    guarded module was replaced.
    """
    if "_vqguard_link" not in model.__dict__:
        raise SeamError(f"expected a guarded model, got {type(model).__name__} without a guard")
    link: GuardLink = model.__dict__["_vqguard_link"]
    require_intact(model, link)
    found = [*places(model, link), *tapped_modules(model, link)]
    for module in found:
        original = getattr(type(module), "vqguard_original", None)
        if original is not None:
            become(module, original)
        for name in ("_vqguard_link", "_vqguard_top", "_vqguard_seams"):
            module.__dict__.pop(name, None)
    model._modules.pop("vqguard", None)
    model.__dict__.pop("last_verdicts", None)
    return model


def _refuse_patches(module: nn.Module, names: list[str]) -> None:
    """A method set on the instance hides the class's: the guard would never be asked."""
    for name in (*names, "save_pretrained"):
        if is_patched(module, name):
            raise SeamError(
                f"{type(module).__name__}.{name} was replaced on the instance, which would hide "
                "the guard: remove the patch, guard the model, then patch it again"
            )


class _GuardedTop(GuardedModel, SavedWithGuard):
    """What the outer model gains."""


def _device(projectors: list[nn.Module]) -> torch.device:
    """Where the projector computes; its weights may wait elsewhere."""
    for projector in projectors:
        for module in projector.modules():
            place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if place is not None:
                return torch.device(place)
    parameters = (p.device for projector in projectors for p in projector.parameters())
    device = next(parameters, torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _refusal_ids(
    model: Any, guard: VQGuard, processor: Any, refusal_ids: tuple[int, ...] | list[int] | None
) -> tuple[int, ...]:
    if refusal_ids is None and processor is None:
        return ()
    if refusal_ids is None:
        tokenizer = getattr(processor, "tokenizer", processor)
        found = tokenizer(guard.config.refusal_text, add_special_tokens=False)["input_ids"]
        refusal_ids = found.flatten().tolist() if isinstance(found, Tensor) else list(found)
        if not refusal_ids:
            raise ConfigError(
                f"the tokenizer turns refusal_text {guard.config.refusal_text!r} into no tokens; "
                "choose another text"
            )
    size = int(model.config.get_text_config().vocab_size)
    wrong = [token for token in refusal_ids if isinstance(token, bool) or not 0 <= token < size]
    if wrong:
        raise ConfigError(
            f"expected refusal ids in [0, {size}), got {wrong}: is this the model's own processor?"
        )
    return tuple(int(token) for token in refusal_ids)
