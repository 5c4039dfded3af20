"""Every loss recomputed by hand in float64, with its gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vqguard.codebooks.losses import codebook_loss, commitment_loss, semantic_loss
from vqguard.errors import InputError


def _pair() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 7, generator=g, requires_grad=True)
    q = torch.randn(2, 5, 7, generator=g, requires_grad=True)
    return x, q


def _by_hand(x: torch.Tensor, q: torch.Tensor) -> float:
    left = x.detach().double().numpy()
    return float(np.sum((left - q.detach().double().numpy()) ** 2) / left.size)


def test_values() -> None:
    x, q = (tensor.detach() for tensor in _pair())
    expected = _by_hand(x, q)
    assert float(codebook_loss(x, q)) == pytest.approx(expected, rel=1e-6)
    assert float(commitment_loss(x, q)) == pytest.approx(expected, rel=1e-6)
    assert float(semantic_loss(x, q)) == pytest.approx(expected, rel=1e-6)


def test_gradients_go_where_the_paper_sends_them() -> None:
    x, q = _pair()
    towards = 2.0 * (q - x).detach() / x.numel()
    (to_q,) = torch.autograd.grad(codebook_loss(x, q), q)
    assert torch.allclose(to_q, towards)
    (to_x,) = torch.autograd.grad(commitment_loss(x, q), x)
    assert torch.allclose(to_x, -towards)
    codebook_loss(x, q).backward()
    assert x.grad is None
    q.grad = None
    commitment_loss(x, q).backward()
    assert q.grad is None
    x.grad = None
    semantic_loss(x, q).backward()
    assert q.grad is None
    assert x.grad is not None


def test_half_precision_is_reduced_in_float32() -> None:
    x = torch.full((1000,), 300.0, dtype=torch.float16)
    assert float(codebook_loss(x, torch.zeros(1000))) == 90000.0  # beyond float16


def test_shapes_must_agree() -> None:
    with pytest.raises(InputError, match=r"\(2, 3\) and \(3,\)"):
        codebook_loss(torch.zeros(3), torch.zeros(2, 3))
