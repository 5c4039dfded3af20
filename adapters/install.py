"""Putting the guard into a model and taking it out again, by substituting classes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import Token
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Site, bind, original_method
from vqguard.adapters.link import (
    CALL,
    CacheTag,
    Call,
    GuardLink,
    current_call,
    image_flags,
    link_of,
    read_tag,
    untraced,
    write_tag,
)
from vqguard.adapters.refuse import GuardedModel, refuse_arguments
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.storage import SavedWithGuard
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
    return VQGuard(GuardConfig.from_dict({**sizes, "site": site, **overrides}))


def guard_model(
    model: Model,
    guard: VQGuard,
    processor: Any = None,
    *,
    refusal_ids: tuple[int, ...] | list[int] | None = None,
) -> Model:
    """Install `guard` in `model`, in place, and return the same object. No weight is copied.

    The object keeps its class for `isinstance`, pipelines, Trainer and PEFT; it gains `screen`, a
    `generate` that refuses, a `save_pretrained` that writes the guard as well, and the submodule
    `vqguard`. Wrap with PEFT after this, not before.

    `forward` returns logits computed on codewords only and refuses nobody: training needs it.
    Verdicts of its images are in `recording(model.vqguard)`.

    A refusal is `guard.config.refusal_text` in the tokens of `processor` (a processor or a
    tokenizer), or `refusal_ids`; with neither it is a single end-of-text token.

    Raises `SeamError` when the model has no adapter, is guarded already, lacks a declared module,
    or the guard was made for other widths; `ConfigError` for unusable refusal ids.
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
    ids = _refusal_ids(model, guard, processor, refusal_ids)
    guard.to(_device(adapter.projector(model)))
    guard.train(model.training)
    return install_link(model, GuardLink(guard, adapter, ids))


def install_link(model: Model, link: GuardLink) -> Model:
    """Substitute the classes of a checked, unguarded model."""
    owner = link.adapter.owner(model)
    for module in (owner, model):
        _refuse_patches(module)
    model.add_module("vqguard", link.guard)
    for module, mixins in _places(model, owner).items():
        _become(module, _guarded_class(type(module), mixins))
        module.__dict__["_vqguard_link"] = link
    model.__dict__["last_verdicts"] = []
    return model


def unguard_model(model: Model) -> Model:
    """Take the guard out, in place: the model's outputs are again what they were, bit for bit.

    The guard is left as it is; keep a reference (`model.vqguard`) to install it again. Weights
    that training changed stay changed. Raises `SeamError` when the model is not guarded.
    """
    if "_vqguard_link" not in model.__dict__:
        raise SeamError(f"expected a guarded model, got {type(model).__name__} without a guard")
    link: GuardLink = model.__dict__["_vqguard_link"]
    for module in (link.adapter.owner(model), model):
        if "_vqguard_link" in module.__dict__:
            _become(module, type(module).vqguard_original)  # type: ignore[attr-defined]
            del module.__dict__["_vqguard_link"]
    model._modules.pop("vqguard", None)
    model.__dict__.pop("last_verdicts", None)
    return model


def _refuse_patches(module: nn.Module) -> None:
    """A method set on the instance hides the class's: the guard would never be asked."""
    for name in ("forward", "get_image_features", "generate", "save_pretrained"):
        of_accelerate = name == "forward" and "_old_forward" in module.__dict__
        if name in module.__dict__ and not of_accelerate:
            raise SeamError(
                f"{type(module).__name__}.{name} was replaced on the instance, which would hide "
                "the guard: remove the patch, guard the model, then patch it again"
            )


def _become(module: nn.Module, cls: type) -> None:
    """Change the class; hooks of accelerate (device maps, off-loading) keep a bound forward."""
    module.__class__ = cls
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = getattr(cls, "forward").__get__(module)  # noqa: B009


class GuardedOwner:
    """Mixed into the class of the module whose image features enter the language model."""

    @untraced
    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with codewords in place of the features."""
        owner: Any = self
        link = link_of(owner)
        method = original_method(owner, "get_image_features")
        arguments = bind(method, args, kwargs)
        as_dict = arguments.pop("return_dict", None)
        call = current_call(owner)
        if call is not None and call.prepared is not None:
            result = link.repeat(call.prepared, len(arguments[link.adapter.pixel_arguments[0]]))
        else:
            features = call.features if call is not None else None
            result = link.quantise(owner, arguments, features)
        if call is not None:
            call.seen.append(result)
        as_dict = owner.config.return_dict if as_dict is None else as_dict
        return result.output if as_dict else result.output.to_tuple()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; refuses what would carry visual vectors around the guard."""
        owner: Any = self
        visit = _enter(owner, args, kwargs)
        try:
            output = visit.method(**visit.arguments)
        finally:
            _leave(visit)
        _tag(owner, visit, output)
        return output


@dataclass
class _Visit:
    """One `forward` of the owner; `call` is None when `generate` makes it and answers for it."""

    method: Callable[..., Any]
    arguments: dict[str, Any]
    call: Call | None = None
    before: CacheTag | None = None
    token: Token[Call | None] | None = None


@untraced
def _enter(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Visit:
    link = link_of(owner)
    method = original_method(owner, "forward")
    arguments = bind(method, args, kwargs)
    outer = current_call(owner)
    if outer is not None and outer.generating:
        # generate has checked the caller's arguments; these are its own.
        return _Visit(method, arguments)
    refuse_arguments(link, arguments)
    before = read_tag(link, arguments.get("past_key_values"))
    features = outer.features if outer is not None else None
    if features is not None:
        arguments[link.adapter.pixel_arguments[0]] = features.semantic
    call = Call(owner, features=features)
    return _Visit(method, arguments, call, before, CALL.set(call))


@untraced
def _leave(visit: _Visit) -> None:
    if visit.token is not None:
        CALL.reset(visit.token)


@untraced
def _tag(owner: nn.Module, visit: _Visit, output: Any) -> None:
    cache = _cache_of(output, visit.arguments)
    if visit.call is not None and cache is not None:
        link = link_of(owner)
        flags = image_flags(link, owner, visit.arguments, visit.call.seen)
        write_tag(link, cache, visit.before, flags)


class _GuardedTop(GuardedModel, SavedWithGuard):
    """What the outer model gains."""


def _places(model: nn.Module, owner: nn.Module) -> dict[nn.Module, tuple[type, ...]]:
    if owner is model:
        return {model: (_GuardedTop, GuardedOwner)}
    return {owner: (GuardedOwner,), model: (_GuardedTop,)}


_CLASSES: dict[tuple[type, tuple[type, ...]], type] = {}


def _guarded_class(original: type, mixins: tuple[type, ...]) -> type:
    """A subclass of `original` that goes by its name, with the mixins in front.

    Overridden methods keep the signature of the original: Trainer, PEFT and `generate` read it.
    """
    if (original, mixins) in _CLASSES:
        return _CLASSES[original, mixins]
    namespace: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce,
        "vqguard_original": original,
    }
    for mixin in mixins:
        for base in mixin.__mro__[:-1]:
            for name, function in vars(base).items():
                if callable(function) and not name.startswith("__") and hasattr(original, name):
                    namespace.setdefault(name, _like(getattr(original, name), function))
    cls = type(original.__name__, (*mixins, original), namespace)
    return _CLASSES.setdefault((original, mixins), cls)


def _like(original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(self, *args, **kwargs)

    # The bookkeeping around the original is not traced; the original itself is.
    disable: Any = torch.compiler.disable
    return functools.wraps(original)(disable(method, recursive=False))


def _reduce(self: Any, protocol: Any) -> Any:
    # The class cannot be found by its name (its original is there): rebuild it from its parts.
    cls = type(self)
    mixins = tuple(base for base in cls.__bases__ if base is not cls.vqguard_original)
    return _rebuild, (cls.vqguard_original, mixins), self.__dict__


def _rebuild(original: type, mixins: tuple[type, ...]) -> Any:
    cls: Any = _guarded_class(original, mixins)
    return cls.__new__(cls)


def _cache_of(output: Any, arguments: dict[str, Any]) -> Any:
    given = arguments.get("past_key_values")
    if given is not None:
        return given
    parts = output if isinstance(output, tuple) else [getattr(output, "past_key_values", None)]
    return next((part for part in parts if hasattr(part, "get_seq_length")), None)


def _device(projector: nn.Module) -> torch.device:
    """Where the projector computes; its weights may wait elsewhere."""
    for module in projector.modules():
        place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if place is not None:
            return torch.device(place)
    device = next((p.device for p in projector.parameters()), torch.device("cpu"))
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
