"""Putting the guard into a model and taking it out again, by substituting classes."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from vqguard.adapters.features import Site
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.runtime.class_swap import become, guarded_class, is_patched
from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.runtime.guarded_modules import mixins_of, places, require_intact
from vqguard.adapters.runtime.refusing_generate import GuardedModel
from vqguard.adapters.runtime.taps import tap_class
from vqguard.adapters.seams import submodule
from vqguard.adapters.storage.saving import SavedWithGuard
from vqguard.adapters.storage.trainer_checkpoints import watch_trainers
from vqguard.config import GuardConfig
from vqguard.errors import SeamError
from vqguard.guard import VQGuard

Model = TypeVar("Model", bound=nn.Module)


def build_guard(model: nn.Module, *, site: Site = "projected", **overrides: Any) -> VQGuard:
    """A guard sized for `model`, not installed. `overrides`: any other field of `GuardConfig`.

    Entries are random until k-means or training sets them.

    Raises:
        SeamError: for a model type without an adapter.
        ConfigError: for a wrong override.
    """
    adapter = get_adapter(model)
    adapter.check(model)
    width = adapter.width(model, site)
    sizes = {"patch_dim": width, "semantic_dim": width}
    levels = adapter.deep_levels(model)
    if levels:
        sizes["deepstack_levels"] = levels
    return VQGuard(GuardConfig.from_dict({**sizes, "site": site, **overrides}))


def install_link(model: Model, link: GuardLink) -> Model:
    """Substitute the classes of a checked, unguarded model."""
    methods = places(model, link)
    for module, names in methods.items():
        _refuse_patches(module, [*names, *(("generate",) if module is model else ())])
    model.add_module("vqguard", link.guard)
    for module, names in methods.items():
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
    _rename(model)
    watch_trainers()
    return model


def tapped_modules(model: nn.Module, link: GuardLink) -> list[nn.Module]:
    """The tower, and what is tapped at site "encoder"; none that is guarded otherwise."""
    modules = [link.adapter.watched(model, seam) for seam in link.seams]
    if link.guard.config.site == "encoder":
        modules += [submodule(model, tap.path, "projector") for tap in link.adapter.taps(model)]
    return [module for module in dict.fromkeys(modules) if "_vqguard_link" not in module.__dict__]


def unguard_model(model: Model) -> Model:
    """Take the guard out, in place: the model's outputs are again what they were, bit for bit.

    The guard is left as it is; keep a reference (`model.vqguard`) to install it again. Weights
    that training changed stay changed.

    Raises:
        SeamError: when the model is not guarded, or when a guarded module was replaced.
    """
    if "_vqguard_link" not in model.__dict__:
        raise SeamError(f"expected a guarded model, got {type(model).__name__} without a guard")
    link: GuardLink = model.__dict__["_vqguard_link"]
    require_intact(model, link)
    guarded = [*places(model, link), *tapped_modules(model, link)]
    for module in guarded:
        original = getattr(type(module), "vqguard_original", None)
        if original is not None:
            become(module, original)
        for name in ("_vqguard_link", "_vqguard_top", "_vqguard_seams"):
            module.__dict__.pop(name, None)
    model._modules.pop("vqguard", None)
    model.__dict__["name_or_path"] = model.__dict__.pop("_vqguard_name")
    return model


def _rename(model: nn.Module) -> None:
    """Give the model a name that no loader opens.

    PEFT writes it into its adapters as that of their base, and would open the base alone.
    """
    name = model.__dict__.get("name_or_path", "")
    model.__dict__["_vqguard_name"] = name
    model.__dict__["name_or_path"] = f"vqguard.guard_model:{name}"


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
