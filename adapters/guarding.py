"""The front door: a guard put into a model, and guarded models loaded.

A type that no adapter names, or that was not proven on the installed transformers, is proven first.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.hub_ids import hint, hub_id
from vqguard.adapters.install import Model, install_link
from vqguard.adapters.proof.conformance import check, example_inputs
from vqguard.adapters.proof.probe import exercised, find_leak, one_codeword_probe
from vqguard.adapters.registry import (
    adapter_types,
    declared_family,
    get_adapter,
    is_known,
    is_known_type,
)
from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.runtime.policy_texts import policy_texts, text_ids, texts_of
from vqguard.adapters.sizes.pictures import require_small_files
from vqguard.adapters.storage.manifest import read_manifest
from vqguard.adapters.storage.reading import load_parts
from vqguard.adapters.storage.upload import FILES
from vqguard.errors import ArtefactError, ConfigError, SeamError
from vqguard.guard import VQGuard

_UNCHECKED = frozenset(
    {"adapter_kwargs", "config", "gguf_file", "key_mapping", "state_dict", "subfolder", "variant"}
)
"""Arguments of `from_pretrained` by which it loads what no checksum was taken of."""


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
    Verdicts of its images are in `recording(model.vqguard)`; a training step has none.

    A refusal is `guard.config.refusal_text` in the tokens of `processor` (a processor or a
    tokenizer), or `refusal_ids`; with neither it is a single end-of-text token. The texts of the
    safety map's policies need `processor` too; those of a map that is set later have no tokens.

    A model type that no adapter names is accepted only on proof: `probe_inputs`, what its processor
    returns for at least one image, with which the one-codeword probe must find nothing that gets
    past the guard, in `forward` and in `generate`, and refusals must reach the right rows. Without
    them `processor`, if it is one for images, is asked for two noise pictures. Afterwards calls may
    hold data in the arguments that the proof used, and in no others: give `probe_inputs` that show
    videos too, if the model is to take them.

    Raises:
        SeamError: when the model has no adapter and no proof, is guarded already, lacks a declared
            module, or the guard was made for other widths.
        ConfigError: for unusable refusal ids, and for policies with texts without `processor`.
    """
    adapter = get_adapter(model)
    if getattr(model, "vqguard", None) is not None:
        raise SeamError("the model is guarded already; call unguard_model(model) first")
    if not hasattr(model, "generate") or not hasattr(model, "config"):
        raise SeamError(f"expected a transformers model that generates, got {type(model).__name__}")
    if hasattr(model, "get_base_model"):
        raise SeamError("the model is wrapped by PEFT: guard its base model, then wrap it again")
    adapter.check(model)
    _require_fit(model, guard, adapter)
    ids = _refusal_ids(model, guard, processor, refusal_ids)
    proven = None
    if not is_known(model):
        inputs = _examples(model, processor) if probe_inputs is None else probe_inputs
        _prove(model, guard, inputs)
        proven = exercised(model, inputs or {})
    texts = policy_texts(guard.safety_map, processor)
    _require_in_vocabulary(model, [token for text in texts.ids.values() for token in text])
    link = GuardLink(guard, adapter, ids, adapter.seams(model), proven, texts)
    guard.to(_device(adapter.projectors(model)))
    guard.train(model.training)
    return install_link(model, link)


def load_guarded(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    processor: Any = None,
    probe_inputs: Mapping[str, Any] | None = None,
    allow_changed: Collection[str] = (),
    language: bool = True,
    **kwargs: Any,
) -> Any:
    """The guarded model in a folder or behind a hub id, merged or without its base.

    Nothing is executed: weights must be safetensors, and `trust_remote_code` is refused.

    Args:
        path: what `save_pretrained`, `save_guard_only`, `push_to_hub` or `vqguard export` wrote: a
            folder, or `hub:owner/name`. A path that is not there is never taken for an id.
        base: for a guard without its base, where that base is (a folder, a registered name or
            `hub:owner/name`), in place of what is recorded; its weights must have the recorded
            checksum. LoRA weights are merged in.
        revision: of the hub id `path`.
        processor, probe_inputs: for a model type that no adapter names, or not on this
            transformers: its processor, or what that returns for an image and a prompt. The proof
            is made again, as `guard_model` makes it. Other types do not need them.
        allow_changed: files that need not be those the guard was saved with, by their names in
            the folder, such as "config.json"; "weights" for those of a whole model. Verdicts are
            then those of another model than was calibrated.
        language: False leaves the language model out, where pictures do not pass through it: what
            is loaded judges (`screen`), and can neither answer nor be saved.
        kwargs: for transformers' `from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        ArtefactError: for a folder that is not a complete guarded model.
        ChecksumError: when anything that a verdict depends on is not what was saved: the guard,
            any weight, the configuration, the processor's files, the base.
        SeamError: for a type that needs a proof and has none, before any weight is loaded, or that
            fails it.
        ConfigError: for arguments that would execute something, or load what is not checked.
    """
    if kwargs.pop("trust_remote_code", False):
        raise ConfigError("trust_remote_code would execute what is loaded; it is refused")
    if kwargs.pop("use_safetensors", True) is not True:
        raise ConfigError("use_safetensors=False would read pickles; it is refused")
    others = sorted(name for name in _UNCHECKED if kwargs.pop(name, None))
    if others:
        raise ConfigError(
            f"{', '.join(others)} would load other weights or another configuration than those "
            "that are checked; change the guarded model after it is loaded"
        )
    folder = _local_folder(path, revision)
    if probe_inputs is None and processor is None and _needs_proof(folder):
        raise _unproven(read_manifest(folder).model_type)
    parts = load_parts(folder, base, kwargs, allow_changed, language=language)
    if processor is None and texts_of(parts.guard.safety_map):
        processor = _tokenizer(folder)
    guarded = guard_model(
        parts.model,
        parts.guard,
        processor,
        refusal_ids=parts.refusal_ids,
        probe_inputs=probe_inputs,
    )
    guarded.name_or_path = os.fspath(folder)  # a folder that opens with its guard or not at all
    return guarded.eval()


def _require_fit(model: nn.Module, guard: VQGuard, adapter: Adapter) -> None:
    """Raise `SeamError` unless the guard was made for the model's widths and deep-stack levels."""
    site = guard.config.site
    width = adapter.width(model, site)
    widths = {"patch": guard.config.patch_dim, "semantic": guard.config.semantic_dim}
    for level, guarded_width in widths.items():
        if guarded_width != width:
            raise SeamError(
                f"{type(model).__name__} has features of width {width} at site {site!r}, the "
                f"guard's {level} codebook has {guarded_width}; build it with build_guard(model, "
                f"site={site!r})"
            )
    levels = adapter.deep_levels(model)
    if guard.config.deepstack_levels != levels:
        raise SeamError(
            f"{type(model).__name__} adds features in {levels} later layers, the guard has "
            f"{guard.config.deepstack_levels} deep-stack codebooks; build it with "
            f"build_guard(model, site={site!r})"
        )


def _examples(model: Any, processor: Any) -> dict[str, Any] | None:
    """Inputs to prove a guard on; None when there is no processor, or a tokenizer alone."""
    if not hasattr(processor, "image_processor"):
        return None
    given = example_inputs(processor)
    return {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in given.items()}


def _prove(model: nn.Module, guard: VQGuard, inputs: Mapping[str, Any] | None) -> None:
    kind: Any = model.config.model_type  # type: ignore[union-attr]
    if inputs is None:
        raise _unproven(kind)
    result = one_codeword_probe(model, inputs, site=guard.config.site)
    if not result.passed:
        raise SeamError(
            f"the model type {kind!r} leaks around the guard ({result}): "
            f"{find_leak(model, inputs, site=guard.config.site)}; it was not guarded. Declare "
            "where its images enter with register_adapter"
        )
    refusals = check(model, inputs, site=guard.config.site, only=("rows", "all refused"))
    if refusals.failures:
        raise SeamError(
            f"the model type {kind!r} lets nothing past the guard, but its refusals do not work: "
            f"{refusals.failures[0].name}: {refusals.failures[0].detail}; it was not guarded"
        )


def _unproven(model_type: str) -> SeamError:
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
    needed = declared_family(kind).proven_from
    return (
        f"the adapter of {kind!r} was proven from transformers {needed} on, and this is "
        f"{transformers.__version__}, where its features may enter elsewhere"
    ), f"install transformers>={needed}"


def _needs_proof(folder: Path) -> bool:
    kind = read_manifest(folder).model_type
    return not declared_family(kind).refused and not is_known_type(kind)


def _local_folder(path: str | os.PathLike[str], revision: str | None) -> Path:
    wanted = hub_id(path)
    if wanted is not None:
        return Path(
            huggingface_hub.snapshot_download(wanted, revision=revision, allow_patterns=FILES)
        )
    if revision is not None:
        raise ConfigError(f"revision= is of a hub id, as in 'hub:owner/name'; got {path!r}")
    if Path(path).is_dir():
        return Path(path)
    raise ArtefactError(
        f"no folder at {os.fspath(path)!r}: expected one that save_pretrained wrote{hint(path)}"
    )


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
        refusal_ids = text_ids(processor, guard.config.refusal_text)
    _require_in_vocabulary(model, refusal_ids)
    return tuple(int(token) for token in refusal_ids)


def _require_in_vocabulary(model: Any, ids: Collection[int]) -> None:
    size = int(model.config.get_text_config().vocab_size)
    wrong = [token for token in ids if isinstance(token, bool) or not 0 <= token < size]
    if wrong:
        raise ConfigError(
            f"expected refusal ids in [0, {size}), got {wrong}: is this the model's own processor?"
        )


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a guarded model's folder, for the texts of its policies."""
    require_small_files(folder)
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ArtefactError(
            f"{folder}: its policies say texts, and there is no tokenizer for them ({error}); give "
            "load_guarded(path, processor=...)"
        ) from error
