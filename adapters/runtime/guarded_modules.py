"""The classes that guarded modules become: seams that give codewords, entries that check."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from contextvars import Token
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vqguard.adapters.codes import VisualCodes
from vqguard.adapters.runtime.bypass import refuse_arguments
from vqguard.adapters.runtime.cache_verdicts import (
    CacheTag,
    cache_in,
    cache_of,
    read_tag,
    write_tag,
)
from vqguard.adapters.runtime.class_swap import is_patched
from vqguard.adapters.runtime.coded import tower_unseen
from vqguard.adapters.runtime.guard_link import (
    CALL,
    Call,
    GuardLink,
    current_call,
    image_flags,
    link_of,
    require_training,
    untraced,
)
from vqguard.adapters.runtime.known_arguments import refuse_options
from vqguard.adapters.runtime.quantise import is_passing
from vqguard.adapters.seams import Seam, bind, original_method, submodule
from vqguard.errors import BypassError, SeamError


def top_of(module: nn.Module) -> nn.Module:
    """The guarded model that a guarded module belongs to."""
    top: nn.Module = module.__dict__["_vqguard_top"]
    return top


def places(model: nn.Module, link: GuardLink) -> dict[nn.Module, dict[str, int | None]]:
    """For each module to be guarded: its methods, with the seam that each is, None for an entry.

    Entries are the modules on the way to a seam whose `forward` takes pixels: calling an inner
    one does not get around the checks of the outer one.
    """
    methods: dict[nn.Module, dict[str, int | None]] = {model: {"forward": None}}
    pixels = {name for seam in link.seams for name in seam.pixels}
    for index, seam in enumerate(link.seams):
        parts = seam.path.split(".") if seam.path else []
        for depth in range(1, len(parts) + 1):
            module = submodule(model, ".".join(parts[:depth]), "seam")
            forward = inspect.signature(original_method(module, "forward")).parameters
            if pixels & set(forward) and not (seam.inner and depth == len(parts)):
                methods.setdefault(module, {})["forward"] = None
        methods.setdefault(submodule(model, seam.path, "seam"), {})[seam.method] = index
    return methods


# Wrappers that hand calls on to what they hold and add nothing to what it returns.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def require_intact(model: nn.Module, link: GuardLink) -> None:
    """Raise `SeamError` when a guarded module was replaced or patched since.

    PEFT puts a wrapper in the place of each module that it adapts: around a seam its low-rank
    product would join the codewords as a continuous vector.
    """
    for seam in link.seams:
        module = submodule(model, seam.path, "seam")
        for name in _WRAPPED:
            module = module._modules.get(name) or module
        there = module.__dict__.get("_vqguard_link") is link
        if there and not is_patched(module, seam.method):
            continue
        kind = f"{type(module).__module__}.{type(module).__name__}"
        what = "was patched" if there else f"is now a {kind}"
        raise SeamError(
            f"{seam.path or 'the model'}.{seam.method}, which gives codewords, {what}: what it "
            "returns could carry more than codewords. Take it out again: with PEFT, leave "
            f"{seam.path.rpartition('.')[2] or 'it'!r} out of target_modules and modules_to_save"
        )


class _GuardedMethod:
    """What the methods of all seams do."""

    @untraced
    def _vqguard_serve(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module: Any = self
        link, model = link_of(module), top_of(module)
        method = original_method(module, name)
        if is_passing(model):
            return method(*args, **kwargs)
        seam = link.seams[module.__dict__["_vqguard_seams"][name]]
        call = current_call(link)
        prepared = call.prepared.get(seam) if call is not None else None
        arguments = bind(method, args, kwargs)
        if call is not None and prepared is not None:
            return _as_asked(module, seam, link.repeat(seam, prepared, arguments), kwargs)
        if call is not None and call.generating:
            raise BypassError(
                f"pixels reached {seam.path or 'the model'}.{name} in generate under a name that "
                f"was not judged: pass them as {' or '.join(seam.pixels)}"
            )
        if seam.inner:
            return _outside(link, seam, method(*args, **kwargs))
        arguments.pop("return_dict", None)
        if call is None or not call.checked:
            refuse_options(link, model, arguments, method)
        features = call.features if call is not None else None
        result = link.quantise(model, seam, arguments, features)
        if call is not None:
            call.seen.append((seam, result))
        return _as_asked(module, seam, result.output, kwargs)


def _outside(link: GuardLink, seam: Seam, output: Any) -> Any:
    """What a seam inside `forward` gives where nobody passed pixels: still only codewords."""
    if link.guard.config.site != "projected" or not link.guard.quantises:
        why = "at site 'encoder'" if link.guard.quantises else "by a judge alone"
        raise BypassError(
            f"{seam.path}.{seam.method} was reached without a call of the guarded model, and {why} "
            "nothing would have been quantised: call the model itself"
        )
    value = seam.read(output)
    units = [link.guard.patch.replace(unit)[0] for unit in link.adapter.split(seam, value, {})]
    return seam.write(output, link.adapter.join(seam, value, units))


def _as_asked(module: Any, seam: Seam, output: Any, kwargs: dict[str, Any]) -> Any:
    """A dictionary or a tuple, as the caller or the config wants it."""
    if seam.inner or not hasattr(output, "to_tuple"):
        return output
    as_dict = kwargs.get("return_dict")
    as_dict = module.config.return_dict if as_dict is None else as_dict
    return output if as_dict else output.to_tuple()


class GuardedImages(_GuardedMethod):
    """Mixed into the class of the module whose image features enter the language model."""

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with codewords in place of the features."""
        return self._vqguard_serve("get_image_features", args, kwargs)


class GuardedVideos(_GuardedMethod):
    """The same for videos."""

    def get_video_features(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with codewords in place of the features."""
        return self._vqguard_serve("get_video_features", args, kwargs)


class GuardedSeam(_GuardedMethod):
    """Mixed into the class of a module inside the model's `forward` that gives the features."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original, with codewords in place of the features."""
        return self._vqguard_serve("forward", args, kwargs)


class GuardedEntry:
    """Mixed into the class of a module whose `forward` takes pixels."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original; refuses what would carry visual vectors around the guard."""
        module: Any = self
        visit = _enter(module, args, kwargs)
        try:
            output = visit.method(**visit.arguments)
        finally:
            _leave(visit)
        _tag(module, visit, output)
        return output


def mixins_of(methods: dict[str, int | None]) -> tuple[type, ...]:
    """The classes that give these methods their guarded form."""
    known = {"get_image_features": GuardedImages, "get_video_features": GuardedVideos}
    mixins: list[type] = [known[name] for name in methods if name in known]
    if "forward" in methods:
        mixins.append(GuardedEntry if methods["forward"] is None else GuardedSeam)
    return tuple(mixins)


@dataclass
class _Visit:
    """One `forward` of an entry; `call` is None where an outer call answers for it."""

    method: Callable[..., Any]
    arguments: dict[str, Any]
    call: Call | None = None
    before: CacheTag | None = None
    token: Token[Call | None] | None = None
    blind: ExitStack = field(default_factory=ExitStack)
    """Open where codes stand for pixels: no encoder runs."""


@untraced
def _enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Visit:
    link, model = link_of(module), top_of(module)
    method = original_method(module, "forward")
    arguments = bind(method, args, kwargs)
    outer = current_call(link)
    if is_passing(model) or (outer is not None and outer.checked):
        # The outer call has checked the caller's arguments; these are the model's own.
        return _Visit(method, arguments)
    require_intact(model, link)
    refuse_arguments(link, model, arguments, method)
    before = read_tag(link, cache_in(arguments))
    features = outer.features if outer is not None else None
    if isinstance(features, VisualCodes):
        arguments |= _stand_ins(link, model, arguments, features)
    elif features is not None:
        arguments[link.seams[0].pixels[0]] = features.semantic
    call = Call(link, checked=True, features=features, arguments=arguments)
    link.prepare(model, call, inner_only=True)
    visit = _Visit(method, arguments, call, before)
    if isinstance(features, VisualCodes):
        for seam, result in call.prepared.items():
            states = seam.read(result.output)
            visit.blind.enter_context(tower_unseen(link.adapter, model, seam, states))
    visit.token = CALL.set(call)
    return visit


def _stand_ins(
    link: GuardLink, model: nn.Module, arguments: dict[str, Any], codes: VisualCodes
) -> dict[str, Tensor]:
    """Pixels that show nothing, of the shapes for which the codes stand."""
    require_training(model)
    pixels = {name for seam in link.seams for name in seam.pixels}
    given = [name for name in sorted(pixels) if arguments.get(name) is not None]
    if given:
        raise BypassError(
            f"{', '.join(given)} beside codes that stand for pixels: pass one or the other"
        )
    zero = torch.zeros(1, dtype=codes.dtype, device=link.codewords.device)
    return {name: zero.expand(shape) for name, shape in codes.pixels.items() if name in pixels}


@untraced
def _leave(visit: _Visit) -> None:
    visit.blind.close()
    if visit.call is not None and visit.token is not None:
        visit.call.open = False
        CALL.reset(visit.token)


@untraced
def _tag(module: nn.Module, visit: _Visit, output: Any) -> None:
    cache = cache_of(output, visit.arguments)
    if visit.call is not None and cache is not None:
        link = link_of(module)
        flags = image_flags(link, top_of(module), visit.arguments, visit.call.seen)
        write_tag(link, cache, visit.before, flags)
