"""From codes to what a seam gives, without an encoder; and the codes of what a seam gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vqguard.adapters.base import Adapter
from vqguard.adapters.codes import Form, VisualCodes
from vqguard.adapters.features import Tap, pad_semantic
from vqguard.adapters.runtime.quantise import Quantised, tap_run
from vqguard.adapters.runtime.taps import tapping
from vqguard.adapters.seams import Seam
from vqguard.errors import SeamError

if TYPE_CHECKING:
    from vqguard.guard import VQGuard

Project = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
"""(codewords, codes), both one tensor a unit -> projected codewords."""


def codes_of(
    seam: Seam, result: Quantised, guard: VQGuard, pixels: Mapping[str, Any]
) -> VisualCodes:
    """What was quantised, as codes on the CPU.

    Raises:
        SeamError: features in a form that cannot be made again.
    """
    guarded = result.guarded
    tokens = [codes.cpu() for codes in guarded.codes]
    if result.constants is not None:
        if guarded.deep_codes:
            raise SeamError("deep-stack features beside constants have no codes")
        places = [constants.cpu() for constants in result.constants]
        tokens = [_between(*pair, guard) for pair in zip(places, tokens, strict=True)]
    semantic = list(guarded.semantic_codes.cpu())
    if guarded.semantic_mask is not None:
        own = guarded.semantic_mask.cpu()
        semantic = [codes[mask] for codes, mask in zip(semantic, own, strict=True)]
    sizes = [len(unit) for unit in tokens]
    levels = seam.levels(result.output)
    return VisualCodes(
        tokens,
        semantic,
        tuple(list(torch.split(torch.cat(list(c)).cpu(), sizes)) for c in guarded.deep_codes),
        Form.of(seam.read(result.output)),
        Form.of(levels[0]) if levels else None,
        result.counts,
        {name: tuple(value.shape) for name, value in pixels.items()},
        guarded.tokens[0].dtype,
    )


def _between(places: Tensor, codes: Tensor, guard: VQGuard) -> Tensor:
    """Codes (N_i,), with those of constants between them."""
    unit = places + guard.patch.codebook.codes
    unit[places < 0] = codes
    return unit


def quantised_from(
    adapter: Adapter,
    model: nn.Module,
    seam: Seam,
    arguments: Mapping[str, Any],
    guard: VQGuard,
    codes: VisualCodes,
    project: Project,
) -> Quantised:
    """What the guard made of the pictures that these codes were made of.

    Raises:
        InputError: codes of another guard.
        SeamError: for families whose way from the quantiser on needs their encoder.
    """
    size = guard.patch.codebook.codes
    static = None
    if guard.config.site == "projected":
        static = adapter.static_vectors(model)
    own = codes.tokens
    if static is not None:
        own = [unit[unit < size] for unit in own]
    padded, mask = pad_semantic([unit.long() for unit in codes.semantic])
    if mask is not None:
        padded = padded.masked_fill(~mask, -1)
    guarded = guard.from_codes(own, padded, codes.deep, mask, _dtype(guard, codes))
    words = list(guarded.tokens)
    if guard.config.site == "projected":
        if static is not None:
            words = [
                _with_constants(unit, tokens, static, size)
                for unit, tokens in zip(codes.tokens, words, strict=True)
            ]
        value = adapter.join(seam, codes.form.like(), words)
        output = _output(seam, value)
        if codes.deep_form is not None:
            like = codes.deep_form.like()
            levels = [adapter.join(seam, like, list(level)) for level in guarded.deep]
            setattr(output, seam.deep, levels)
    elif adapter.tokenwise:
        projected = project(words, [unit.to(words[0].device).long() for unit in own])
        output = _output(seam, adapter.join(seam, codes.form.like(), projected))
    else:
        output = _run_from(adapter, model, seam, arguments, words, list(guarded.deep))
    return Quantised(output, guarded, codes.positions, arguments)


def _dtype(guard: VQGuard, codes: VisualCodes) -> torch.dtype:
    """The dtype that features would have here."""
    kind = guard.patch.codebook.weight.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return codes.dtype


def _with_constants(codes: Tensor, words: Tensor, static: Tensor, size: int) -> Tensor:
    unit = words.new_empty(len(codes), words.shape[-1])
    visual = (codes < size).to(words.device)
    unit[visual] = words
    constants = codes[codes >= size].long().to(static.device) - size
    unit[~visual] = static[constants].to(words)
    return unit


def _output(seam: Seam, value: Any) -> Any:
    """An output that holds the features where the seam reads them, and nothing else."""
    if seam.field == "":
        return value
    if isinstance(seam.field, int):
        return (*([None] * seam.field), value)
    output = BaseModelOutputWithPooling()
    setattr(output, seam.field, value)
    return output


def _run_from(
    adapter: Adapter,
    model: nn.Module,
    seam: Seam,
    arguments: Mapping[str, Any],
    words: list[Tensor],
    deep: list[Tensor | list[Tensor]],
) -> Any:
    """What the family makes of codewords of site "encoder"."""
    states = torch.stack(words) if len({len(unit) for unit in words}) == 1 else torch.cat(words)

    def replace(tap: Tap, features: Tensor, tower: Any) -> Tensor:
        given = words if tap.level is None else list(deep[tap.level])
        return torch.cat(given).reshape(features.shape)

    with tower_unseen(adapter, model, seam, states):
        return tap_run(adapter, model, seam, arguments, replace, tower_runs=False)


@contextmanager
def tower_unseen(adapter: Adapter, model: nn.Module, seam: Seam, states: Any) -> Iterator[None]:
    """Inside, the vision encoder does not run: what it would give is not looked at.

    `states`: what stands where its features would; only the shape counts.
    """
    tower = adapter.watched(model, seam)
    if "_vqguard_link" in tower.__dict__:  # it is the seam: nobody runs it
        yield
        return

    def stand_in(original: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return adapter.unseen(model, states)

    with tapping({tower: stand_in}):
        yield
