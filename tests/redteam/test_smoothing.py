"""Randomised smoothing and distances, against cases computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.errors import ConfigError
from vqguard.redteam.smoothing import (
    Smoothing,
    distance_to_other_label,
    linf_equivalent_255,
    radius_of,
    share_bound,
)

SHAPE = (3, 2, 2)


def half_space(bound: float) -> Any:
    """Flags where the values of the image add up to more than `bound`."""

    def decide(pixels: Tensor) -> Tensor:
        return pixels.flatten(1).sum(dim=1) > bound

    return decide


def test_bounds_and_radii_are_those_of_the_tables() -> None:
    # one-sided Clopper-Pearson where all agree: alpha^(1/n)
    assert share_bound(100, 100, 0.001) == pytest.approx(0.001 ** (1 / 100))
    assert share_bound(0, 10, 0.05) == 0.0
    # Phi^-1(0.9772499) = 2
    assert radius_of(0.9772498680518208, 0.5) == pytest.approx(1.0)
    assert radius_of(0.5, 0.5) == 0.0
    assert radius_of(0.3, 0.5) == 0.0
    assert Smoothing(sigma=0.5, samples=100).widest == pytest.approx(
        radius_of(0.001 ** (1 / 100), 0.5)
    )


def test_an_l2_ball_holds_an_l_infinity_ball_of_its_radius_over_the_root_of_the_numbers() -> None:
    assert linf_equivalent_255(1.0, 100) == pytest.approx(25.5)


@pytest.mark.parametrize("margin", [0.6, -0.6, 0.2])
def test_a_half_space_s_radius_is_its_distance_and_never_more(margin: float) -> None:
    """There the smoothed decision is the decision itself, and its distance is known."""
    image = torch.full(SHAPE, 0.5)
    distance = abs(margin)
    bound = 12 * 0.5 - margin * math.sqrt(12)
    smoothing = Smoothing(sigma=0.5, samples=4000, batch=1000)
    certificate = smoothing.certify(half_space(bound), image, seed=1)
    assert certificate.decision is (margin > 0)
    assert certificate.radius <= distance
    assert certificate.radius > 0.8 * distance


def test_a_certificate_holds_for_every_seed_but_few() -> None:
    """alpha = 0.2: of 100 certificates some 20 may claim too much, and hardly more than 32 do."""
    image, distance = torch.full(SHAPE, 0.5), 0.3
    decide = half_space(6.0 - distance * math.sqrt(12))
    smoothing = Smoothing(sigma=0.5, guesses=50, samples=60, alpha=0.2)
    radii = [smoothing.certify(decide, image, seed).radius for seed in range(100)]
    assert sum(radius > distance for radius in radii) <= 32


def test_it_abstains_where_no_majority_is_certain() -> None:
    certificate = Smoothing(samples=100).certify(half_space(6.0), torch.full(SHAPE, 0.5), seed=0)
    assert certificate.decision is None
    assert certificate.radius == 0.0


def test_the_noise_depends_on_the_seed_and_not_on_the_batch() -> None:
    image, decide = torch.full(SHAPE, 0.5), half_space(5.5)
    one = Smoothing(samples=90, batch=7).certify(decide, image, seed=3)
    two = Smoothing(samples=90, batch=90).certify(decide, image, seed=3)
    other = Smoothing(samples=90).certify(decide, image, seed=4)
    assert one == two
    assert one.share != other.share


@pytest.mark.parametrize(
    "wrong", [{"sigma": 0.0}, {"alpha": 1.0}, {"samples": 0}, {"guesses": 0}, {"sigma": math.nan}]
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Smoothing(**wrong)


# -- distances of features: codewords at -1, 0 and 3 of a line, the last one flagged

WORDS = torch.tensor([[-1.0], [0.0], [3.0]])
FLAGGED = torch.tensor([False, False, True])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([2.0], 0.5),  # in the cell of 3, whose wall is at 1.5
        ([0.0], 1.5),  # neutral, the same wall from the other side
        ([-1.0], 2.0),  # the plane between -1 and 3 is at 1: a bound below the true 2.5
        ([2.0, 3.0], 1.5),  # both are flagged: the deeper one leaves last
        ([2.0, 0.0], 0.5),  # one flagged token decides
        ([0.0, 1.0], 0.5),  # the first that arrives
    ],
)
def test_distances_are_those_of_the_line(tokens: list[float], expected: float) -> None:
    features = torch.tensor(tokens)[None, :, None]
    distance = distance_to_other_label(features, WORDS, FLAGGED)
    assert distance.tolist() == pytest.approx([expected])


def test_padding_plays_no_part_in_distances() -> None:
    features = torch.tensor([[[0.0], [2.9]], [[2.0], [0.0]]])
    mask = torch.tensor([[True, False], [True, True]])
    distance = distance_to_other_label(features, WORDS, FLAGGED, mask)
    assert distance.tolist() == pytest.approx([1.5, 0.5])


@pytest.mark.parametrize("alike", [torch.zeros(3).bool(), torch.ones(3).bool()])
def test_where_all_cells_are_alike_nothing_changes_a_verdict(alike: Tensor) -> None:
    assert distance_to_other_label(torch.zeros(1, 1, 1), WORDS, alike).tolist() == [math.inf]


@pytest.mark.slow
def test_art_certifies_the_same_radius() -> None:
    pytest.importorskip("art.estimators.certification")
    from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    class HalfSpace(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, pixels: Tensor) -> Tensor:
            score = pixels.flatten(1).sum(dim=1) - (6.0 - 0.4 * math.sqrt(12))
            return torch.stack([-score, score], dim=1)

    theirs = PyTorchRandomizedSmoothing(
        model=HalfSpace(),
        loss=torch.nn.CrossEntropyLoss(),
        input_shape=SHAPE,
        nb_classes=2,
        scale=0.5,
        alpha=0.001,
        sample_size=50,
        device_type="cpu",
    )
    image = torch.full(SHAPE, 0.5)
    classes, radii = theirs.certify(image[None].numpy(), n=4000)
    mine = Smoothing(sigma=0.5, samples=4000, batch=1000).certify(
        half_space(6.0 - 0.4 * math.sqrt(12)), image, seed=0
    )
    assert bool(classes[0]) is mine.decision
    assert float(radii[0]) == pytest.approx(mine.radius, abs=0.03)
