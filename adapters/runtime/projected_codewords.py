"""Projections of all codewords, for site "encoder": inference looks them up, no projector runs."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

_ROWS = 4096  # codewords projected at a time: bounds the memory of the hidden layer


class ProjectedCodewords:
    """A table (P, d_h) of projected codewords that is never stale.

    Tensor versions do not see writes through `.data` (PEFT merges weights that way), so the table
    keeps exact copies of what it was made from and compares them at every use: one pass over the
    codebook and the projector's weights, against a product with those weights for every token.
    """

    def __init__(self) -> None:
        self._made: _Made | None = None  # replaced whole: threads share it

    def __deepcopy__(self, memo: object) -> ProjectedCodewords:
        return ProjectedCodewords()

    def lookup(
        self, tokens: Tensor, codes: Tensor, codewords: Tensor, projector: nn.Module
    ) -> Tensor | None:
        """Projections (..., d_h) of `tokens` (..., d), or None where the projector has to run.

        It has to run in training, where a gradient is wanted, where `tokens` are not the codewords
        `codes` bit for bit (an estimator that relaxes them), and where the projector is not made
        of ordinary modules (adapters of PEFT, off-loading hooks): there a value could change
        without any tensor changing.
        """
        if projector.training or not _ordinary(projector):
            return None
        if torch.is_grad_enabled() and (
            tokens.requires_grad or any(p.requires_grad for p in projector.parameters())
        ):
            return None
        with torch.no_grad():
            if not torch.equal(tokens, codewords.detach()[codes].to(tokens.dtype)):
                return None
            return self.table(codewords, projector)[codes]

    @torch.no_grad()
    def table(self, codewords: Tensor, projector: nn.Module) -> Tensor:
        """(P, d_h) in the projector's dtype; made again when anything that it is made of moved."""
        weights = _tensors(projector)
        made = self._made
        if made is None or not made.fits(codewords, weights):
            dtype = next(iter(weights.values())).dtype if weights else codewords.dtype
            kept = {name: tensor.detach().clone() for name, tensor in weights.items()}
            words = codewords.detach().clone()
            rows = [projector(part) for part in torch.split(words.to(dtype), _ROWS)]
            made = self._made = _Made(words, kept, torch.cat([cast(Tensor, row) for row in rows]))
        return made.table


class _Made(NamedTuple):
    """A table with copies of what it was made from."""

    codewords: Tensor
    weights: dict[str, Tensor]
    table: Tensor

    def fits(self, codewords: Tensor, weights: dict[str, Tensor]) -> bool:
        return (
            _same(self.codewords, codewords)
            and self.weights.keys() == weights.keys()
            and all(_same(self.weights[name], tensor) for name, tensor in weights.items())
        )


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _same(kept: Tensor, now: Tensor) -> bool:
    return kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)


def _ordinary(projector: nn.Module) -> bool:
    for module in projector.modules():
        if not type(module).__module__.startswith(("torch.nn.", "transformers.")):
            return False
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return False
    return True
