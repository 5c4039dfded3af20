"""Deep-stack levels have quantisers of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.codebooks.quantizer import straight_through
from vqguard.config import GuardConfig
from vqguard.errors import ConfigError, InputError
from vqguard.guard import VQGuard


def make(levels: int = 2) -> Any:
    config = GuardConfig(
        patch_dim=6, semantic_dim=6, patch_codes=9, semantic_codes=3, deepstack_levels=levels
    )
    return VQGuard(config)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_each_level_is_the_nearest_entry_of_its_own_codebook() -> None:
    guard = make().eval()
    deep = [draw(2, 5, 6, seed=1), draw(2, 5, 6, seed=2)]
    output = guard(draw(2, 5, 6), draw(2, 1, 6), deep)
    for level, tokens, found in zip(guard.deep, deep, output.deep, strict=True):
        weight = level.codebook.weight
        nearest = torch.cdist(tokens.double(), weight.double()).argmin(-1)
        assert torch.equal(found, weight[nearest])
    weights = [guard.patch.codebook.weight, *(p for n, p in guard.deep.named_parameters())]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 3


def test_levels_come_as_lists_too_and_must_be_complete() -> None:
    guard = make().eval()
    units = [draw(3, 6), draw(4, 6, seed=3)]
    output = guard(units, draw(2, 1, 6), [units, units])
    assert [[len(one) for one in level] for level in output.deep] == [[3, 4], [3, 4]]
    assert guard(units, draw(2, 1, 6)).deep == ()
    with pytest.raises(InputError, match="1 deep-stack levels but the guard has 2"):
        guard(units, draw(2, 1, 6), [units])
    with pytest.raises(ConfigError, match="deepstack_levels"):
        make(-1)


def test_losses_are_means_over_levels_and_gradients_reach_each() -> None:
    guard = make().train()
    tokens = draw(2, 5, 6).requires_grad_()
    deep = [draw(2, 5, 6, seed=1).requires_grad_(), draw(2, 5, 6, seed=2).requires_grad_()]
    with straight_through(guard):
        output = guard(tokens, draw(2, 1, 6), deep)
    assert output.losses is not None
    parts = []
    for level, features in zip([guard.patch, *guard.deep], [tokens, *deep], strict=True):
        entries = level.codebook.weight[level.encode(features)]
        parts.append((entries - features).pow(2).mean())
    assert torch.allclose(output.losses.patch_codebook, torch.stack(parts).mean(), atol=1e-6)
    (output.losses.total() + sum(one.sum() for one in output.deep)).backward()
    assert all(p.grad is not None and p.grad.any() for p in guard.parameters())
    assert all(one.grad is not None for one in deep)


def test_round_trip_on_disk(tmp_path: Path) -> None:
    guard = make().eval()
    guard.save_pretrained(tmp_path)
    again = VQGuard.from_pretrained(tmp_path)
    assert again.config.deepstack_levels == 2
    deep = [draw(1, 4, 6, seed=1), draw(1, 4, 6, seed=2)]
    one, other = (g(draw(1, 4, 6), draw(1, 1, 6), deep) for g in (guard, again))
    assert all(torch.equal(a, b) for a, b in zip(one.deep, other.deep, strict=True))
