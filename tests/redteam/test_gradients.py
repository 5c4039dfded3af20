"""How gradients cross the quantiser, and the stand-in for the verdict."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vqguard.codebooks.quantizer import VectorQuantizer
from vqguard.errors import ConfigError, InputError
from vqguard.redteam import PGD, GradientPath, SoftmaxEstimator, crossing, verdict_hinge
from vqguard.redteam.softmax import nearest_candidates, relaxed_codeword

MODES = ("plain", "stopped", "straight_through", "softmax")


def quantiser(codes: int = 12, dim: int = 5) -> VectorQuantizer:
    made = VectorQuantizer(codes, dim, seed=3)
    with torch.no_grad():
        made.codebook.weight.copy_(
            torch.randn(codes, dim, generator=torch.Generator().manual_seed(4))
        )
    return made.eval()


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_but_plain_keeps_the_codeword_bit_for_bit(mode: str) -> None:
    made, x = quantiser(), features(2, 7, 5).requires_grad_()
    expected = made(x).output
    with crossing(made, mode):
        output = made(x).output
    assert torch.equal(output, x if mode == "plain" else expected)
    assert torch.equal(made(x).output, expected)
    assert not made(x).output.requires_grad


@pytest.mark.parametrize("mode", ["plain", "straight_through"])
def test_the_straight_through_gradient_is_the_identity(mode: str) -> None:
    made, x, weight = quantiser(), features(2, 7, 5).requires_grad_(), features(2, 7, 5, seed=9)
    with crossing(made, mode):
        loss = (made(x).output * weight).sum()
    (gradient,) = torch.autograd.grad(loss, x)  # after the context: the graph keeps its estimator
    assert torch.equal(gradient, weight)


def test_the_stopped_gradient_has_no_path_even_inside_another_context() -> None:
    made, x = quantiser(), features(3, 5).requires_grad_()
    with crossing(made, "straight_through"), crossing(made, "stopped"):
        assert not made(x).output.requires_grad
    with crossing(made, "stopped"), crossing(made, "straight_through"):
        assert made(x).output.requires_grad


def test_the_softmax_gradient_is_that_of_the_relaxed_function() -> None:
    made = quantiser()
    x, weight = features(6, 5).double().requires_grad_(), features(6, 5, seed=9).double()
    words = made.codebook.weight.detach().double()
    estimator = SoftmaxEstimator(temperature=0.4, neighbours=4)
    (gradient,) = torch.autograd.grad((estimator(x, words, made(x).indices) * weight).sum(), x)
    candidates = words[nearest_candidates(x, words, 4)]
    scale = estimator.scale(x, candidates)

    def relaxed(point: Tensor) -> float:
        return float((relaxed_codeword(point, candidates, scale) * weight).sum())

    step = 1e-6
    for row in range(6):
        for column in range(5):
            nudge = torch.zeros(6, 5, dtype=torch.float64)
            nudge[row, column] = step
            slope = (relaxed(x.detach() + nudge) - relaxed(x.detach() - nudge)) / (2 * step)
            assert float(gradient[row, column]) == pytest.approx(slope, rel=1e-5, abs=1e-8)
    assert gradient.abs().max() > 0.01


def test_a_cold_softmax_is_the_nearest_codeword_and_a_hot_one_the_mean() -> None:
    made, x = quantiser(), features(6, 5)
    words = made.codebook.weight.detach()
    candidates = words[nearest_candidates(x, words, 12)]
    cold = relaxed_codeword(x, candidates, torch.full((6, 1), 1e-4))
    torch.testing.assert_close(cold, made(x).output)
    hot = relaxed_codeword(x, candidates, torch.full((6, 1), 1e8))
    torch.testing.assert_close(hot, words.mean(dim=0).expand(6, -1))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 99))
def test_candidates_are_the_nearest_alone_and_in_any_batch(
    rows: int, neighbours: int, seed: int
) -> None:
    x, words = features(rows, 5, seed=seed), features(12, 5, seed=seed + 1)
    found = nearest_candidates(x, words, neighbours)
    assert found.shape == (rows, min(neighbours, 12))
    distances = (x.double()[:, None] - words.double()[None]).square().sum(-1)
    ranked = distances.argsort(dim=1)[:, :neighbours]
    assert torch.equal(found.sort(dim=1).values, ranked.sort(dim=1).values)
    assert torch.equal(found[:1], nearest_candidates(x[:1], words, neighbours))


class Victim:
    """Pixels -> two tokens -> quantiser -> linear loss."""

    requests = 2

    def __init__(self, mode: str) -> None:
        self.made, self.mode = quantiser(), mode
        self.encode = features(2 * 5, 3 * 16)
        self.weight = features(2, 2 * 5, seed=5)

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        tokens = ((pixels - 0.5).flatten(1) @ self.encode.T).view(-1, 2, 5)
        with crossing(self.made, self.mode):
            output = self.made(tokens).output
        loss: Tensor = (output.flatten(1) * self.weight[request]).sum(dim=1)
        return loss

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        return torch.zeros(len(pixels), dtype=torch.bool)


@pytest.mark.parametrize("mode", MODES)
def test_an_attack_warns_of_a_masked_gradient_only_when_it_is_stopped(mode: str) -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    victim = Victim(mode)
    result = PGD(eps_255=64, steps=30, step_255=8, judge_every=10)(victim, images)
    before = victim.loss(images, torch.arange(2))
    if mode == "stopped":
        assert any("masked" in text for text in result.warnings)
        assert torch.equal(result.best_loss, before)
    else:
        assert result.warnings == ()
        assert bool((result.best_loss < before - 0.5).all())


def test_a_mode_that_needs_a_quantiser_refuses_a_model_without_one() -> None:
    with crossing(nn.Linear(2, 2), "plain"):
        pass
    with pytest.raises(ConfigError, match="has none"), crossing(nn.Linear(2, 2), "stopped"):
        pass


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of"):
        GradientPath("magic")
    with pytest.raises(ConfigError, match="temperature"):
        GradientPath("softmax", temperature=0.0)
    with pytest.raises(ConfigError, match="neighbours"):
        GradientPath("softmax", neighbours=1)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 999), st.integers(1, 3))
def test_the_hinge_is_above_its_margin_exactly_for_flagged_images(seed: int, tokens: int) -> None:
    x, words = features(6, tokens, 5, seed=seed), features(9, 5, seed=seed + 1)
    flagged = torch.arange(9) % 3 == 0
    codes = (x.unsqueeze(2) - words).square().sum(-1).argmin(-1)
    per_token = verdict_hinge(x.reshape(-1, 1, 5), words, flagged, margin=0.0).view(6, tokens)
    assert torch.equal(per_token > 0, flagged[codes])
    torch.testing.assert_close(
        verdict_hinge(x, words, flagged, margin=0.0), per_token.sum(dim=1), atol=1e-5, rtol=1e-4
    )


def test_following_the_hinge_leaves_the_flagged_cells() -> None:
    x, words = features(8, 1, 5), features(9, 5, seed=1)
    flagged = torch.arange(9) % 2 == 0

    def codes() -> Tensor:
        return (x - words).square().sum(-1).argmin(-1)

    assert flagged[codes()].any()
    for _ in range(300):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(verdict_hinge(x, words, flagged).sum(), x)
        x = (x - 0.1 * gradient).detach()
    assert not flagged[codes()].any()


def test_the_hinge_refuses_what_it_cannot_evade_and_is_zero_without_flags() -> None:
    x, words = features(2, 1, 5), features(4, 5)
    assert torch.equal(verdict_hinge(x, words, torch.zeros(4, dtype=torch.bool)), torch.zeros(2))
    with pytest.raises(ConfigError, match="every semantic cell"):
        verdict_hinge(x, words, torch.ones(4, dtype=torch.bool))
    with pytest.raises(InputError, match="flagged"):
        verdict_hinge(x, words, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(InputError, match="semantic features"):
        verdict_hinge(x[:, 0], words, torch.zeros(4, dtype=torch.bool))
