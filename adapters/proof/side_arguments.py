"""What a caller could say of the pixels that is not true: is every picture still judged?

Each argument beside the pixels is changed in several ways. A changed call must be refused, or each
part of the pixels that moves a visual token must still move a judged one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.features import Site
from vqguard.adapters.proof.guarded_subject import guarded
from vqguard.adapters.proof.results import FailedCheckError
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.runtime.known_arguments import option_names, usual_option
from vqguard.adapters.runtime.quantise import visual_features
from vqguard.adapters.seams import original_method

_PARTS = 16
"""Parts of the pixels that are changed one by one: enough for the tiles, frames and quarters of
three small pictures."""

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "minus ones": lambda value: torch.full_like(value, -1),
    "one more": lambda value: value + 1,
    "one less": lambda value: value - 1,
    "reversed": lambda value: value.flip(0),
    "inner reversed": lambda value: value.flip(-1),
    "rolled": lambda value: value.roll(1, -1),
    "first zero": lambda value: _changed(value, 0, 0),
    "last zero": lambda value: _changed(value, -1, 0),
    "half zero": lambda value: _changed(value, slice(value.shape[-1] // 2, None), 0, last=True),
    "half minus ones": lambda value: _changed(value, slice(value.shape[0] // 2, None), -1),
    "first for all": lambda value: value[:1].expand_as(value).clone(),
}


def _changed(value: Tensor, place: Any, to: int, *, last: bool = False) -> Tensor:
    changed = value.clone()
    changed[(..., place) if last else place] = to
    return changed


def changed_calls(
    model: nn.Module, inputs: Mapping[str, Any]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(argument, change, inputs with it) for each tensor that the encoder takes beside pixels."""
    adapter = get_adapter(model)
    given = adapter.given(model, inputs)
    pixels = {name for seam in given for name in seam.pixels}
    taken = {name for seam in given for name in adapter.seam_arguments(model, seam, inputs)}
    for name, value in inputs.items():
        if name not in taken - pixels or not isinstance(value, Tensor) or value.dim() == 0:
            continue
        numbers = value.long() if value.dtype == torch.bool else value
        for change, function in CHANGES.items():
            changed = function(numbers).to(value.dtype)
            if not torch.equal(changed, value):
                yield name, change, {**inputs, name: changed}


def changed_options(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(option, value) for each option of the guarded model's encoder, other than its usual one."""
    link: GuardLink = model.__dict__["_vqguard_link"]
    for name, default in option_names(link, model, original_method(model, "forward")).items():
        usual = usual_option(model, name, default)
        if isinstance(usual, bool):
            yield name, not usual
        elif isinstance(usual, int):
            yield name, usual + 1
        elif isinstance(usual, str):
            yield name, "full" if usual != "full" else "default"
        elif isinstance(usual, (list, tuple)) and usual:
            yield name, list(usual)[:-1]


def side_arguments(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """No argument beside the pixels takes a picture out of what is judged."""
    suspected = suspects(model, inputs, site)
    if suspected:
        raise FailedCheckError("; ".join(suspected))


def suspects(model: nn.Module, inputs: Mapping[str, Any], site: Site = "projected") -> list[str]:
    """The changed calls that are answered and show what no verdict depends on."""
    suspected = []
    with guarded(model, inputs, site):
        for name, value in changed_options(model):
            if _answered(model, {**inputs, name: value}):
                suspected.append(f"{name}={value!r} was not refused")
        for name, change, call in changed_calls(model, inputs):
            if _answered(model, call):
                hidden = unjudged(model, call, site)
                suspected += [f"{name} ({change}): {hidden}"] if hidden else []
    return suspected


def _answered(model: nn.Module, call: Mapping[str, Any]) -> bool:
    try:
        cast(Any, model).generate(**call, max_new_tokens=1, do_sample=False)
    except Exception:  # whatever stops it, nothing was answered
        return False
    return True


@torch.no_grad()
def unjudged(model: nn.Module, inputs: Mapping[str, Any], site: Site = "projected") -> str:
    """A part of the pixels that moves visual tokens of a unit and no judged one of it, in words."""
    adapter = get_adapter(model)
    usual = visual_features(model, site, **inputs)
    for seam in adapter.given(model, inputs):
        for name in seam.pixels:
            pixels = inputs.get(name)
            if not isinstance(pixels, Tensor):
                continue
            for part, where in enumerate(_parts(pixels)):
                drawn = adapter.redraw(name, pixels, torch.Generator().manual_seed(part))
                moved = torch.where(where, drawn, pixels)
                other = visual_features(model, site, **{**inputs, name: moved})
                shown = _moved(list(usual.tokens), list(other.tokens))
                judged = _moved(usual.semantic_units, other.semantic_units)
                hidden = [unit for unit in shown if unit not in judged]
                if hidden:
                    return f"part {part} of {name} moves units {hidden}, judged are {judged}"
    return ""


def _moved(before: list[Tensor], after: list[Tensor]) -> list[int]:
    pairs = enumerate(zip(before, after, strict=False))
    return [
        unit
        for unit, (one, other) in pairs
        if one.shape != other.shape or bool((one != other).any())
    ]


def _parts(pixels: Tensor) -> Iterator[Tensor]:
    """Masks of the shape of `pixels`: quarters of pictures (..., 3, H, W), or rows of patches."""
    picture = pixels.dim() >= 4
    places = torch.zeros(pixels.shape, dtype=torch.long)
    rows = pixels.shape[: -3 if picture else -1]
    count = int(torch.tensor(rows).prod())
    index = torch.arange(count).reshape(rows)
    if picture:
        height, width = pixels.shape[-2:]
        lower = (torch.arange(height) * 2 // height)[:, None]
        right = torch.arange(width) * 2 // width
        places = (index[..., None, None, None] * 4 + 2 * lower + right).expand(pixels.shape)
        count *= 4
    else:
        places = index[..., None].expand(pixels.shape)
    step = max(1, -(-count // _PARTS)) if not picture else 1
    groups = places // step
    for group in groups.unique().tolist():
        yield groups == group
