"""Checks that nothing visual reaches the language model around the guard."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.features import Site
from vqguard.adapters.proof.guarded_subject import guarded, logits
from vqguard.adapters.proof.probe import find_leak, one_codeword_probe, redraw
from vqguard.adapters.proof.results import FailedCheckError
from vqguard.adapters.proof.side_arguments import changed_options
from vqguard.adapters.registry import get_adapter
from vqguard.adapters.runtime.bypass import VECTORS
from vqguard.errors import BypassError


def probe(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Black box: with a codebook of one entry, redrawn pixels move nothing."""
    result = one_codeword_probe(model, inputs, site=site)
    if result.control_delta == 0:
        raise FailedCheckError("the inputs show the unguarded model nothing; give it a picture")
    if not result.passed:
        raise FailedCheckError(f"{result}: {find_leak(model, inputs, site=site)}")


def codewords(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """White box: what enters the language model and depends on the picture is a codeword.

    At site "encoder" it is a function of codewords that is the same for the same codes.
    """
    adapter = get_adapter(model)
    plain = redraw(adapter, model, inputs, 0)
    with guarded(model, inputs, site):
        first, second = entering(adapter, model, inputs), entering(adapter, model, plain)
        allowed = _allowed(adapter, model, inputs, site)
    if len(first) != len(second):
        raise FailedCheckError("another picture made the language model run another way")
    moved = 0
    for (name, shown), (_, other) in zip(first, second, strict=True):
        if shown.shape != other.shape:
            continue
        visual = (shown != other).flatten(0, -2).any(-1)
        moved += int(visual.sum())
        if allowed is None or not bool(visual.any()):
            continue
        rows = torch.cat([shown.flatten(0, -2)[visual], other.flatten(0, -2)[visual]])
        if adapter.additive:
            # What the family adds to its codewords is the same for both pictures.
            rows = (shown - other).flatten(0, -2)[visual]
        far = _distance(rows, allowed)
        if float(far.max()) > 1e-4:
            raise FailedCheckError(
                f"{int((far > 1e-4).sum())} of {len(far)} visual vectors in {name} are no codewords"
                f" (farthest: {float(far.max()):.3g})"
            )
    if moved == 0:
        raise FailedCheckError("no vector that enters the language model depends on the picture")


def arguments(model: nn.Module, inputs: Mapping[str, Any], site: Site) -> None:
    """Every argument that could show what no verdict was computed of is refused by name.

    Visual vectors and data under unknown names, a second prompt that tells rows, options of the
    encoder that the guard was not calibrated with, image tokens in any argument that holds ids.
    """
    names = set(inspect.signature(model.forward).parameters) & set(VECTORS)
    vector = torch.zeros(1, 2, 32)
    top = cast(Any, model)
    with guarded(model, inputs, site):
        both = (model, top.generate)
        for name in sorted(names | {"mm_encoder_outputs", "something_else"}):
            value: Any = {"image": vector} if name == "mm_encoder_outputs" else vector
            _require_refused(both, inputs, name, value)
        _require_refused((model,), inputs, "inputs", torch.ones(2, 3, dtype=torch.long))
        for name, value in changed_options(model):
            _require_refused((*both, top.screen), inputs, name, value)
        typed = get_adapter(model).user_typed_images(model)
        if typed is not None:
            for name, value in _typed(int(typed[0])).items():
                _require_refused((top.generate,), inputs, name, value)


def _typed(token: int) -> dict[str, Any]:
    """Arguments of `generate` that put an image token in front of the model."""
    ids = torch.full((1, 2), token)
    return {
        "negative_prompt_ids": ids,
        "decoder_input_ids": ids,
        "forced_bos_token_id": token,
        "forced_eos_token_id": [token],
        "sequence_bias": {(token,): 5.0},
    }


def _require_refused(
    runs: Sequence[Callable[..., Any]], inputs: Mapping[str, Any], name: str, value: Any
) -> None:
    for run in runs:
        try:
            run(**{**inputs, name: value})
        except BypassError:
            continue
        except Exception as error:
            raise FailedCheckError(
                f"{name} was not refused; what it reached raised {error!r}"
            ) from error
        raise FailedCheckError(f"{name} was not refused")


def entering(
    adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any]
) -> list[tuple[str, Tensor]]:
    """Every float tensor (..., d) among what the language model is given in one `forward`."""
    seen: list[tuple[str, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        named = {**{str(i): argument for i, argument in enumerate(args)}, **kwargs}
        for name, value in named.items():
            parts = value.values() if isinstance(value, Mapping) else value
            for part in parts if isinstance(value, (list, tuple, Mapping)) else [value]:
                if isinstance(part, Tensor) and part.is_floating_point() and part.dim() >= 2:
                    seen.append((name, part.clone()))

    handles = [
        entry.register_forward_pre_hook(keep, with_kwargs=True)
        for entry in adapter.language_entries(model)
    ]
    try:
        logits(adapter, model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _allowed(
    adapter: Adapter, model: nn.Module, inputs: Mapping[str, Any], site: Site
) -> Tensor | None:
    """(n, d) vectors that may enter; None where they are no function of single codewords."""
    guard = cast(Any, model).vqguard
    books = [guard.patch.codebook.weight, *(level.codebook.weight for level in guard.deep)]
    with torch.no_grad():
        if site == "projected" and not adapter.additive:
            return torch.cat(books)
        if site == "projected":
            differences: Tensor = (books[0][:, None] - books[0][None]).flatten(0, 1)
            return differences
        if all(seam.modality in adapter.pointwise for seam in adapter.given(model, inputs)):
            return cast(Tensor, adapter.projector(model)(books[0]))
    return None


def _distance(rows: Tensor, allowed: Tensor) -> Tensor:
    """(n,) largest coordinate by which a row misses its nearest allowed vector."""
    if rows.shape[-1] != allowed.shape[-1]:
        return torch.full((len(rows),), float("inf"))
    nearest = torch.cdist(rows.double(), allowed.double()).argmin(-1)
    return (rows.double() - allowed.double()[nearest]).abs().amax(-1)
