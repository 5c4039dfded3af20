"""From pixels to features, and from features to codewords, at either site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.features import Shown, Site, Tap, VisualFeatures
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.runtime.offloaded import at_hand
from vqguard.adapters.runtime.padding import require_shown
from vqguard.adapters.runtime.smoothing import noisy_copies
from vqguard.adapters.runtime.taps import Handler, tapping
from vqguard.adapters.seams import Seam, submodule, way_to
from vqguard.errors import NonFiniteError, SeamError
from vqguard.scopes.modes import evaluating

if TYPE_CHECKING:
    from vqguard.codebooks.guard_output import GuardOutput, Judged
    from vqguard.guard import VQGuard

PASSING: ContextVar[frozenset[int]] = ContextVar("vqguard_passing", default=frozenset())


@contextmanager
def passing(model: nn.Module) -> Iterator[None]:
    """Inside, the guarded methods of `model` run as their originals: the guard itself asks."""
    token = PASSING.set(PASSING.get() | {_who(model)})
    try:
        yield
    finally:
        PASSING.reset(token)


def is_passing(model: nn.Module) -> bool:
    """Whether the guard itself is calling `model`: see `passing`."""
    return _who(model) in PASSING.get()


def _who(model: nn.Module) -> int:
    """The same for a model and its shallow copy, which have their guarded modules in common."""
    return id(model.__dict__.get("_vqguard_link", model))


def require_finite(seam: Seam, arguments: Mapping[str, Any]) -> None:
    """Raise `NonFiniteError` for pixels that are no numbers.

    A family that turns pictures into tokens, or leaves parts of them out, would hide them.
    """
    for name in seam.pixels:
        value = arguments.get(name)
        for pixels in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(pixels, Tensor) and not bool(torch.isfinite(pixels).all()):
                raise NonFiniteError(
                    f"expected finite pixels in {name}, got NaN or infinity: refuse this picture"
                )


def encode(
    adapter: Adapter, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]
) -> tuple[Any, Any]:
    """The seam's unquantised output and that of the tower, None where it has none to tap."""
    seen: list[Any] = []
    with passing(model), tapping(_watch(adapter, model, seam, seen)):
        output = adapter.run(model, seam, arguments)
    return output, seen[-1] if seen else None


def visual_features(model: nn.Module, site: Site | None = None, **inputs: Any) -> VisualFeatures:
    """Unquantised features of a batch, differentiable, whether or not `model` is guarded.

    They are those of eval mode, whatever mode the model is in: verdicts are read from them.
    `inputs`: what a processor returns; arguments that the encoder does not take (`input_ids`,
    ...) are ignored. Videos follow the images. `site`: the guard's own when None, "projected"
    without one. A guarded model is read by the adapter that it was guarded with.

    Raises:
        InputError: when no pixels are given.
        SeamError: for a site the family does not have.
        NonFiniteError: for NaN or infinite pixels.
    """
    link = model.__dict__.get("_vqguard_link")
    adapter: Adapter = get_adapter(model) if link is None else link.adapter
    if site is None:
        guard: Any = getattr(model, "vqguard", None)
        site = guard.config.site if guard is not None else "projected"
    adapter.require_site(site)
    with evaluating(model.modules()):
        read = []
        for seam in adapter.given(model, inputs):
            with at_hand(way_to(model, seam)):
                arguments = adapter.seam_arguments(model, seam, inputs)
                read.append(read_features(adapter, model, seam, arguments, site))
    if len(read) == 1:
        return read[0]
    tokens = [unit for features in read for unit in features.tokens]
    layouts = [layout for features in read for layout in features.unit_layouts]
    deep = [
        [unit for level in levels for unit in level]
        for levels in zip(*(features.deep for features in read), strict=True)
    ]
    semantic = [unit for features in read for unit in features.semantic_units]
    parts = [part for features in read for part in features.unit_parts]
    return VisualFeatures.of_units(tokens, semantic, deep, layouts, parts)


def copy_features(model: nn.Module, **inputs: Any) -> Iterator[VisualFeatures]:
    """`visual_features` of each copy that a guarded model judges in place of the picture.

    None where the guard judges pictures as they are. Arguments and errors as there.
    """
    link = model.__dict__["_vqguard_link"]
    site = link.guard.config.site
    names = [name for seam in link.adapter.given(model, inputs) for name in seam.pixels]
    for changed in noisy_copies(names, inputs, link.guard.config.smoothing):
        yield visual_features(model, site, **changed)


def read_features(
    adapter: Adapter, model: nn.Module, seam: Seam, arguments: Mapping[str, Any], site: Site
) -> VisualFeatures:
    """What the guard would be given for this call, unquantised. Raises `NonFiniteError`."""
    require_finite(seam, arguments)
    require_shown(seam, arguments)
    if site == "projected":
        return Projected.read(adapter, model, seam, arguments).features
    seen: list[VisualFeatures] = []
    deep: dict[int, list[Tensor]] = {}

    def watch(tap: Tap, features: Tensor, tower: Any) -> Tensor:
        units = adapter.encoder_units(model, seam, arguments, features)
        if tap.level is not None:
            deep[tap.level] = units
            return features
        shown = Shown(model, seam, site, units, tower, arguments)
        seen.append(_features(adapter, shown, [deep[n] for n in sorted(deep)]))
        return features

    tap_run(adapter, model, seam, arguments, watch)
    result: VisualFeatures = _only(seen, adapter)
    return result


@dataclass
class Quantised:
    """One batch of images after the guard.

    `output`: the family's own object, holding codewords. `guarded`: the guard's output at its
    site. `counts`: positions that each unit takes in the text. `arguments`: what the encoder was
    given. `leading`: the first dimension of the pixels, by which repeated pixels are noticed.
    `constants`: for each unit (N_i,) which of the family's constants stands at a position, -1 at
    visual ones; None where there are none.
    """

    output: Any
    guarded: GuardOutput
    counts: list[int]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    leading: int = 0
    constants: list[Tensor] | None = None


def ask(guard: VQGuard, features: VisualFeatures, smoothed: Judged | None = None) -> GuardOutput:
    """What the guard makes of features; `smoothed` as `majority` gives it."""
    output: GuardOutput = guard(
        features.tokens,
        features.semantic,
        features.deep,
        features.semantic_mask,
        features.layouts,
        smoothed,
    )
    return output


@torch.no_grad()
def majority(
    guard: VQGuard,
    names: Iterable[str],
    arguments: Mapping[str, Any],
    read: Callable[[Mapping[str, Any]], VisualFeatures],
) -> Judged | None:
    """What verdicts are read from where the guard judges noisy copies; None where it does not.

    Args:
        guard: with or without `smoothing`.
        names: which of the arguments hold pixels.
        arguments: what the encoder is given.
        read: the features of such arguments.
    """
    if not (guard.smooths and guard.judges_now):
        return None
    copies = []
    for changed in noisy_copies(names, arguments, guard.config.smoothing):
        seen = read(changed)
        copies.append(guard.judged(seen.semantic, seen.semantic_mask, seen.tokens, seen.layouts))
    return guard.middle_of(copies)


def quantise(
    adapter: Adapter,
    model: nn.Module,
    seam: Seam,
    arguments: Mapping[str, Any],
    guard: VQGuard,
    project: Callable[[Tensor, Tensor], Tensor | None],
) -> Quantised:
    """Run the encoder and the guard.

    Args:
        project: (tokens, codes) -> projected codewords, where they can be looked up at site
            "encoder"; None where they cannot.

    Raises:
        NonFiniteError: for NaN or infinite pixels or features.
    """
    require_finite(seam, arguments)
    require_shown(seam, arguments)
    site = guard.config.site
    smoothed = majority(
        guard,
        seam.pixels,
        arguments,
        lambda changed: read_features(adapter, model, seam, changed, site),
    )
    if site == "projected":
        projected = Projected.read(adapter, model, seam, arguments)
        guarded = ask(guard, projected.features, smoothed)
        return Quantised(
            projected.write(guarded),
            guarded,
            projected.counts,
            arguments,
            constants=projected.constants,
        )
    seen: list[GuardOutput] = []
    deep: dict[int, list[Tensor]] = {}

    def replace(tap: Tap, features: Tensor, tower: Any) -> Tensor:
        units = adapter.encoder_units(model, seam, arguments, features)
        if tap.level is not None:
            deep[tap.level] = units
            quantizer: Any = guard.deep[tap.level]
            codewords: Tensor = quantizer.replace(features)[0]
            return codewords
        shown = Shown(model, seam, "encoder", units, tower, arguments)
        read = _features(adapter, shown, [deep[level] for level in sorted(deep)])
        guarded = ask(guard, read, smoothed)
        seen.append(guarded)
        flat = torch.cat(list(guarded.tokens))
        if flat.numel() != features.numel():
            raise SeamError(
                f"{type(adapter).__name__}: the units at site 'encoder' hold {len(flat)} tokens, "
                f"the projector is given {tuple(features.shape)}"
            )
        return flat.reshape(features.shape)

    def shortcut(features: Tensor) -> Tensor | None:
        return project(features, torch.cat(list(seen[-1].codes)).reshape(features.shape[:-1]))

    output = tap_run(adapter, model, seam, arguments, replace, shortcut)
    counts = [len(unit) for unit in adapter.split(seam, seam.read(output), arguments)]
    return Quantised(output, _only(seen, adapter), counts, arguments)


def _features(adapter: Adapter, shown: Shown, deep: Sequence[list[Tensor]]) -> VisualFeatures:
    """What the adapter reads of a batch of images on its way through a seam."""
    layouts = adapter.layouts(shown)
    parts = [adapter.part(shown.seam, shown.site, layout) for layout in layouts]
    return VisualFeatures.of_units(
        list(shown.units), adapter.global_token(shown), deep, layouts, parts
    )


@dataclass
class Projected:
    """A seam's output taken apart: units, the positions in them that are visual, the features."""

    adapter: Adapter
    seam: Seam
    output: Any
    units: list[Tensor]
    constants: list[Tensor] | None
    deep: list[list[Tensor]]
    features: VisualFeatures

    @classmethod
    def read(
        cls, adapter: Adapter, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]
    ) -> Projected:
        """Run the seam unquantised, and take its output apart."""
        output, tower = encode(adapter, model, seam, arguments)
        units = adapter.split(seam, seam.read(output), arguments)
        static = adapter.static_vectors(model)
        constants = None if static is None else [constants_in(unit, static) for unit in units]
        masks = None if constants is None else [places < 0 for places in constants]
        visual = units if masks is None else [u[m] for u, m in zip(units, masks, strict=True)]
        deep = [adapter.split(seam, level, arguments) for level in seam.levels(output)]
        given = tower if tower is not None else output
        shown = Shown(model, seam, "projected", visual, given, arguments)
        levels = [
            level if masks is None else [u[m] for u, m in zip(level, masks, strict=True)]
            for level in deep
        ]
        features = _features(adapter, shown, levels)
        return cls(adapter, seam, output, units, constants, deep, features)

    @property
    def counts(self) -> list[int]:
        return [len(unit) for unit in self.units]

    def write(self, guarded: GuardOutput) -> Any:
        """The family's own output with codewords in the place of its visual tokens."""
        value = self.seam.read(self.output)
        output = self.seam.write(
            self.output, self.adapter.join(self.seam, value, self._fill(self.units, guarded.tokens))
        )
        if self.deep:
            levels = [
                self.adapter.join(self.seam, level, self._fill(units, codewords))
                for level, units, codewords in zip(
                    self.seam.levels(self.output), self.deep, guarded.deep, strict=True
                )
            ]
            setattr(output, self.seam.deep, levels)
        return output

    def _fill(self, units: list[Tensor], codewords: Tensor | list[Tensor]) -> list[Tensor]:
        if self.constants is None:
            return list(codewords)
        filled = []
        for unit, places, tokens in zip(units, self.constants, codewords, strict=True):
            changed = unit.clone()
            changed[places < 0] = tokens
            filled.append(changed)
        return filled


def constants_in(unit: Tensor, static: Tensor) -> Tensor:
    """(N,) int64: which of `static` (k, d) each position of `unit` (N, d) is, bit for bit; else -1.

    A constant carries nothing of the picture, so it may pass whatever the picture is.
    """
    same = (unit.detach()[:, None] == static.to(unit)[None]).all(-1)
    return torch.where(same.any(-1), same.int().argmax(-1), -1)


def _watch(
    adapter: Adapter, model: nn.Module, seam: Seam, seen: list[Any]
) -> dict[nn.Module, Handler]:
    """Keeps what the tower returns, which some families throw away."""

    def keep(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output = original(*args, **kwargs)
        seen.append(output)
        return output

    tower = adapter.watched(model, seam)
    # A tower that is the seam itself is not tapped: its output is the seam's.
    return {} if "_vqguard_link" in tower.__dict__ else {tower: keep}


def tap_run(
    adapter: Adapter,
    model: nn.Module,
    seam: Seam,
    arguments: Mapping[str, Any],
    change: Callable[[Tap, Tensor, Any], Tensor],
    shortcut: Callable[[Tensor], Tensor | None] = lambda features: None,
    tower_runs: bool = True,
) -> Any:
    """Run the seam with `change(tap, features, tower's output)` before every tapped module.

    Unless `tower_runs`, whoever calls has tapped the tower already.
    """
    tower: list[Any] = []

    def handler(tap: Tap) -> Handler:
        def handle(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if tap.argument:
                changed = change(tap, kwargs[tap.argument], tower[-1] if tower else None)
                return original(*args, **{**kwargs, tap.argument: changed})
            changed = change(tap, args[0], tower[-1] if tower else None)
            output = (
                shortcut(changed) if tap.level is None and len(args) == 1 and not kwargs else None
            )
            return original(changed, *args[1:], **kwargs) if output is None else output

        return handle

    handlers = _watch(adapter, model, seam, tower) if tower_runs else {}
    for tap in adapter.taps(model):
        handlers[submodule(model, tap.path, "projector")] = handler(tap)
    with passing(model), tapping(handlers):
        return adapter.run(model, seam, arguments)


def _only(seen: list[Any], adapter: Adapter) -> Any:
    if len(seen) != 1:
        raise SeamError(
            f"{type(adapter).__name__} ran its projector {len(seen)} times for one batch, expected "
            "once: its images cannot be told apart before it; use site='projected'"
        )
    return seen[0]
