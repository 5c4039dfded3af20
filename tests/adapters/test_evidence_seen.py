"""An attacker of a regional judge sees evidence where its last ReLU shows none."""

from __future__ import annotations

import torch

from vqguard.adapters.attack_target import evidence_seen
from vqguard.config import GuardConfig, RegionalSettings
from vqguard.guard import VQGuard


def _guard() -> VQGuard:
    config = GuardConfig(
        patch_dim=8,
        semantic_dim=8,
        patch_codes=4,
        judge="regional",
        regional=RegionalSettings(windows=(2,)),
    )
    guard = VQGuard(config).eval()
    assert guard.regional is not None
    with torch.no_grad():
        guard.regional.projection.semantic.bias.fill_(-50.0)  # nothing that was learnt is there
    return guard


def test_regions_without_evidence_have_a_gradient_inside_and_the_same_values() -> None:
    guard = _guard()
    assert guard.regional is not None
    tokens = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    plain = guard.regional.regions(tokens).tokens
    assert bool((plain == 0).all())
    (flat,) = torch.autograd.grad(plain.sum(), tokens)
    assert bool((flat == 0).all())
    with evidence_seen(guard):
        seen = guard.regional.regions(tokens).tokens
    assert torch.equal(seen, plain)
    (slope,) = torch.autograd.grad(seen.sum(), tokens)
    assert bool((slope != 0).any())
    again = guard.regional.regions(tokens).tokens
    assert bool((torch.autograd.grad(again.sum(), tokens)[0] == 0).all()), "the hook is gone"


def test_a_global_judge_is_left_alone() -> None:
    guard = VQGuard(GuardConfig(patch_dim=8, semantic_dim=8, patch_codes=4))
    with evidence_seen(guard):
        assert not guard._forward_hooks
