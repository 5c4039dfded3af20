"""Checks that each picture, tile and frame is judged, whole and by itself.

Nothing here asks the adapter what it judges. A part of the pixels is redrawn, and it is seen which
visual tokens move and which judged ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.features import Site, VisualFeatures
from vqguard.adapters.proof.guarded_subject import REFUSAL, flag, guarded, logits
from vqguard.adapters.proof.probe import redraw
from vqguard.adapters.proof.results import Check, FailedCheckError, NotApplicableError
from vqguard.adapters.proof.verdict_checks import answers
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.runtime.quantise import visual_features
from vqguard.adapters.seams import PIXEL_NAMES, pixel_names

_SIZES = ("image_grid_thw", "video_grid_thw", "image_grid_hw", "target_sizes")
"""Arguments that say how patches of several pictures in one row are shared out."""


@dataclass(frozen=True)
class Part:
    """A picture, tile or frame among the pixels of one argument.

    `place`: its indices, outermost first: (row, picture, tile), (video, frame), ... `axis` and
    `start`, `stop`: where it lies along the axis that holds the patches of several pictures; a part
    that has a `place` in the leading dimensions is cut along `axis` for a region of it.
    """

    name: str
    place: tuple[int, ...]
    axis: int
    start: int
    stop: int
    packed: bool

    def replace(self, pixels: Tensor, drawn: Tensor, half: int) -> Tensor:
        """`pixels` with one half of the part, the first (0) or the second (1), as in `drawn`."""
        changed = pixels.clone()
        view, source = (changed, drawn) if self.packed else (changed[self.place], drawn[self.place])
        middle = (self.start + self.stop + 1) // 2
        start, stop = ((self.start, middle), (middle, self.stop))[half]
        view.narrow(self.axis, start, stop - start).copy_(
            source.narrow(self.axis, start, stop - start)
        )
        return changed


@dataclass(frozen=True)
class Moves:
    """What moved when one half of a part was redrawn, (N,) bool of all tokens of the call."""

    part: Part
    half: int
    visual: Tensor
    judged: Tensor


def parts_of(name: str, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Part]:
    """The pictures, tiles and frames that the argument `name` holds; empty ones left out."""
    packed = _packed(name, pixels, inputs)
    if packed:
        return packed
    lead = pixels.shape[:-3] if pixels.dim() >= 4 else pixels.shape[:-2]
    axis = -2
    size = pixels.shape[axis]
    return [
        Part(name, place, axis, 0, size, packed=False)
        for place in _indices(tuple(lead))
        if bool(pixels[place].any())
    ]


def covered(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Every visual token lies under a judged one.

    Whatever region of the pixels moves a visual token moves a judged token too.
    """
    for moves in redrawn_parts(get_adapter(model), model, inputs, site):
        if bool(moves.visual.any()) and not bool(moves.judged.any()):
            raise FailedCheckError(
                f"{int(moves.visual.sum())} visual tokens show half {moves.half + 1} of "
                f"{moves.part.name}{list(moves.part.place)}, and no verdict depends on it"
            )


def pictures(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Each picture, tile and frame has a judged token of its own, which its neighbours do not move.

    Asked of all that have visual tokens of their own: where the encoder mixes frames or tiles in
    every token, the video or picture that they belong to is what must have one.
    """
    runs = list(redrawn_parts(get_adapter(model), model, inputs, site))
    if not any(bool(moves.visual.any()) for moves in runs):
        raise FailedCheckError("no visual token depends on the pixels")
    for depth in range(1, 1 + max(len(moves.part.place) for moves in runs)):
        groups: dict[tuple[str, tuple[int, ...]], list[Moves]] = {}
        for moves in runs:
            groups.setdefault(_group(moves.part, depth), []).append(moves)
        for key, own in groups.items():
            others = [moves for other, some in groups.items() if other != key for moves in some]
            visual = _any(own, others, "visual")
            if bool(visual.any()) and not bool(_any(own, others, "judged").any()):
                raise FailedCheckError(
                    f"{key[0]}{list(key[1])} has {int(visual.sum())} visual tokens of its own and "
                    "no judged token of its own: its verdict depends on its neighbours"
                )


def names(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Pixels under each name that `forward` knows them by are judged as under the usual one.

    Raises:
        NotApplicableError: where `forward` knows them by one name.
    """
    adapter = get_adapter(model)
    renamed = list(_renamed(adapter, model, inputs))
    if not renamed:
        raise NotApplicableError("forward takes these pixels by one name")
    generated = {name for name, other in renamed if _generates(adapter, model, other)}
    with guarded(model, inputs, site):
        guard = cast(Any, model).vqguard
        flag(model, set(range(0, guard.cells, 2)))
        expected, usual = cast(Any, model).screen(**inputs), answers(adapter, model, inputs)
        for name, other in renamed:
            if cast(Any, model).screen(**other) != expected:
                raise FailedCheckError(f"verdicts differ for pixels in {name}")
            if name in generated and answers(adapter, model, other) != usual:
                raise FailedCheckError(f"answers differ for pixels in {name}")


def beside_others(layouts: Sequence[Mapping[str, Any]]) -> Check:
    """The check that the first picture of all these inputs has the same codes in each of them.

    And that its row is refused in each when they are flagged: alone, in a row with others, in a
    batch. The kit's own `inputs` are among the `layouts`.
    """

    def run(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
        adapter = get_adapter(model)
        with guarded(model, inputs, site):
            guard = cast(Any, model).vqguard
            # The first unit is the first picture's, or its first tile's.
            first = [_features(model, layout, site).semantic_units[0] for layout in layouts]
            codes = [guard.semantic.encode(tokens).tolist() for tokens in first]
            if any(own != codes[0] for own in codes):
                raise FailedCheckError(f"a picture's codes change with its neighbours: {codes}")
            flag(model, set(codes[0]))
            for layout in layouts:
                answer = answers(adapter, model, layout)[0]
                if answer != list(REFUSAL):
                    raise FailedCheckError(f"a flagged picture's row answers {answer}")

    return run


def _generates(adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether the bare model's `generate` takes these arguments."""
    try:
        answers(adapter, model, inputs)
    except ValueError:  # what transformers raises for arguments that it does not know
        return False
    return True


def _renamed(
    adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """`inputs` with their pixels under each other name under which the bare model sees the same."""
    expected = logits(adapter, model, inputs)
    known = (*pixel_names(model.forward), *PIXEL_NAMES)
    for seam in adapter.given(model, inputs):
        for name in seam.pixels:
            for other in sorted({*known, *seam.pixels} - set(inputs)):
                changed = {other if key == name else key: inputs[key] for key in inputs}
                try:
                    same = other in changed and torch.equal(
                        logits(adapter, model, changed), expected
                    )
                except Exception:
                    continue
                if same:
                    yield other, changed


def redrawn_parts(
    adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any], site: Site
) -> Iterator[Moves]:
    """What moves with each half of each part, one run of the encoder each."""
    other = redraw(adapter, model, inputs, 0)
    before = _features(model, inputs, site)
    for seam in adapter.given(model, inputs):
        for name in seam.pixels:
            pixels = inputs.get(name)
            if not isinstance(pixels, Tensor):
                continue
            for part in parts_of(name, pixels, inputs):
                for half in (0, 1):
                    if part.stop - part.start < 2 and half:
                        continue
                    changed = {**inputs, name: part.replace(pixels, other[name], half)}
                    after = _features(model, changed, site)
                    visual = _moved(_visual(before), _visual(after))
                    judged = _moved(before.semantic_units, after.semantic_units)
                    yield Moves(part, half, visual, judged)


@torch.no_grad()
def _features(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> VisualFeatures:
    return visual_features(model, site, **inputs)


def _visual(features: VisualFeatures) -> list[Tensor]:
    return [*features.tokens, *(unit for level in features.deep for unit in level)]


def _moved(before: list[Tensor], after: list[Tensor]) -> Tensor:
    if [len(unit) for unit in before] != [len(unit) for unit in after]:
        raise FailedCheckError("other pixels in the same form gave another number of tokens")
    # Bit for bit: the same shapes run through the same kernels, and some random models see little.
    pairs = zip(before, after, strict=True)
    return torch.cat([(unit != other).any(-1) for unit, other in pairs])


def _any(own: list[Moves], others: list[Moves], kind: str) -> Tensor:
    """(N,) bool: tokens of a kind that these move and no other does."""
    moved = torch.stack([getattr(moves, kind) for moves in own]).any(0)
    for moves in others:
        moved &= ~getattr(moves, kind)
    return moved


def _group(part: Part, depth: int) -> tuple[str, tuple[int, ...]]:
    return part.name, part.place[:depth]


def _indices(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [
        tuple(place)
        for place in torch.cartesian_prod(*map(torch.arange, shape))
        .reshape(-1, len(shape))
        .tolist()
    ]


def _packed(name: str, pixels: Tensor, inputs: Mapping[str, Any]) -> list[Part]:
    """The parts of an argument that holds the patches of all pictures in a row."""
    video = "video" in name
    for argument in _SIZES:
        named = argument if not argument.startswith("target") or not video else f"{argument}_videos"
        sizes = inputs.get(named)
        if not isinstance(sizes, Tensor) or (video != ("video" in named)):
            continue
        frames = sizes[:, 0].tolist() if sizes.shape[1] == 3 else [1] * len(sizes)
        areas = sizes[:, -2:].prod(-1).tolist()
        total = sum(number * area for number, area in zip(frames, areas, strict=True))
        axis = -1 if argument == "target_sizes" else 0
        if total == 0 or pixels.shape[axis] % total:
            continue
        patch = pixels.shape[axis] // total
        parts, start = [], 0
        for picture, (number, area) in enumerate(zip(frames, areas, strict=True)):
            for frame in range(number):
                place = (picture, frame) if sizes.shape[1] == 3 else (picture,)
                parts.append(Part(name, place, axis, start, start + area * patch, packed=True))
                start += area * patch
        return parts
    return []
