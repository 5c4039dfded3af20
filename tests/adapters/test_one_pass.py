"""What an attack needs of features, answer and verdict together comes from one pass, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.adapters import build_guard, guard_model, visual_features
from vqguard.adapters.attack_target import GenerationTarget
from vqguard.adapters.code_target import CodeTarget
from vqguard.redteam.quantised import OnePass
from vqguard.safety_map import SafetyMap

from .test_target_guarded import OPENINGS, PROMPTS, images, make_processor


@pytest.fixture(params=["global", "regional"])
def target(request: pytest.FixtureRequest, make_llava: Callable[..., Any]) -> CodeTarget:
    """Of a guard by either judge, with a map that flags half of its cells."""
    model, processor = make_llava(), make_processor()
    settings: dict[str, Any] = {"judge": request.param}
    if request.param == "regional":
        settings["regional"] = {"codes": 8, "width": 8, "hidden": 16, "windows": (2,)}
    guard = build_guard(model, patch_codes=24, semantic_codes=8, search="torch", **settings)
    values = GenerationTarget(model, processor, PROMPTS, OPENINGS)._pixel_values(images(3, 9))
    with torch.no_grad():
        tokens = torch.cat(list(visual_features(model, "projected", pixel_values=values).tokens))
        guard.patch.codebook.weight.copy_(tokens[:: len(tokens) // 24][:24])
    counts = torch.tensor([[1, 0] if code % 2 else [0, 1] for code in range(8)])
    guard.safety_map = SafetyMap(
        ("gun",), counts, codebook_checksum=guard.checksum(guard.judge_level)
    )
    guard_model(model, guard, refusal_ids=(50, 51))
    return CodeTarget(
        model, processor, PROMPTS, OPENINGS, gradient="straight_through", evade_verdict=True
    )


def with_slope(value: Callable[[Tensor], Tensor], pixels: Tensor) -> tuple[Tensor, Tensor]:
    leaf = pixels.clone().requires_grad_()
    loss = value(leaf)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return loss.detach(), slope


def require_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    """Values and slopes are the same but for the order in which sums are rounded."""
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def runs_of_the_tower(target: CodeTarget, call: Callable[[], object]) -> int:
    runs: list[int] = []
    hook = target.model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    call()
    hook.remove()
    return len(runs)


def test_features_and_verdict(target: CodeTarget) -> None:
    assert isinstance(target, OnePass)
    pixels = images(3, seed=5)

    def apart(leaf: Tensor) -> Tensor:
        return target.features(leaf).square().sum(dim=(1, 2)) + target.verdict_loss(leaf)

    def together(leaf: Tensor) -> Tensor:
        features, verdict = target.features_and_verdict(leaf)
        return features.square().sum(dim=(1, 2)) + verdict

    require_same(with_slope(together, pixels), with_slope(apart, pixels))
    assert runs_of_the_tower(target, lambda: target.features_and_verdict(pixels)) == 1


def test_answer_and_verdict(target: CodeTarget) -> None:
    pixels, rows = images(3, seed=5), torch.arange(3)

    def apart(leaf: Tensor) -> Tensor:
        return target.answer_loss(leaf, rows) + target.verdict_loss(leaf)

    def together(leaf: Tensor) -> Tensor:
        return torch.stack(target.answer_and_verdict(leaf, rows)).sum(dim=0)

    require_same(with_slope(together, pixels), with_slope(apart, pixels))
    assert runs_of_the_tower(target, lambda: target.answer_and_verdict(pixels, rows)) == 1


def test_candidates_of_a_search_are_read_without_the_tower(target: CodeTarget) -> None:
    pixels, rows = images(3, seed=5), torch.arange(3)
    codes = target.codes(target.features(pixels))
    first = target.answer_by_codes(codes, pixels, rows)
    assert runs_of_the_tower(target, lambda: target.answer_by_codes(codes, pixels, rows)) == 0
    others = images(3, seed=8)
    torch.testing.assert_close(target.answer_by_codes(codes, others, rows), first)
    torch.testing.assert_close(target.answer_loss(pixels, rows), first)
