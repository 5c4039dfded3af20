"""Checks that nothing visual reaches the language model around the guard."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.features import Site
from vqguard.adapters.proof.guarded_subject import guarded, logits
from vqguard.adapters.proof.probe import find_leak, one_codeword_probe, redraw
from vqguard.adapters.proof.results import FailedCheckError
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
    """Every argument of `forward` that could carry visual vectors is refused by name."""
    names = set(inspect.signature(model.forward).parameters) & set(VECTORS)
    vector = torch.zeros(1, 2, 32)
    with guarded(model, inputs, site):
        for name in sorted(names | {"mm_encoder_outputs", "something_else"}):
            value: Any = {"image": vector} if name == "mm_encoder_outputs" else vector
            for run in (model, cast(Any, model).generate):
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
