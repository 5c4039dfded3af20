"""Balanced k-means points: rows of the features, each at most once, rare kinds more often."""

from __future__ import annotations

import torch

from vqguard.recipes.start_points import balanced_points


def _two_kinds(common: int, rare: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(common + rare, 8, generator=generator)
    noise[common:] += 1.0
    return noise


def test_rare_kinds_are_drawn_more_often_than_their_share() -> None:
    features = _two_kinds(common=20000, rare=200)
    drawn = balanced_points(features, 2000, seed=0)
    rare = int((drawn.mean(1) > 0.5).sum())
    assert rare > 3 * 2000 * 200 / 20200  # a plain sample has about 20
    assert rare <= 200


def test_points_are_different_rows_and_the_same_for_a_seed() -> None:
    features = _two_kinds(common=900, rare=100)
    drawn = balanced_points(features, 300, seed=3)
    assert len(torch.unique(drawn, dim=0)) == 300
    rows = {tuple(row.tolist()) for row in features}
    assert all(tuple(row.tolist()) in rows for row in drawn)
    assert torch.equal(drawn, balanced_points(features, 300, seed=3))
    assert not torch.equal(drawn, balanced_points(features, 300, seed=4))


def test_few_features_are_all_taken() -> None:
    features = _two_kinds(common=5, rare=5)
    assert torch.equal(balanced_points(features, 10, seed=0), features)
