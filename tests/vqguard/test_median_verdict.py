"""The verdict of a majority is that of the copy in the middle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqguard.codebooks.guard_output import Judged
from vqguard.config import SmoothingSettings
from vqguard.errors import ConfigError, InputError
from vqguard.judging.median import middle_copy
from vqguard.safety_map import SafetyMap

COUNTS = torch.tensor([[0, 9], [4, 6], [6, 4], [9, 0]])
MAP = SafetyMap(("gun",), COUNTS, tau=0.55, rule="any", prior="counts")


def judged(codes: list[list[int]]) -> Judged:
    """Codes (B, S), -1 at padding."""
    tensor = torch.tensor(codes)
    mask = None if bool((tensor >= 0).all()) else tensor >= 0
    return Judged(tensor, mask, torch.zeros(tensor.shape, dtype=torch.float64))


CODES = st.lists(st.integers(0, 3), min_size=2, max_size=2)


@given(st.sampled_from([1, 3, 5]).flatmap(lambda n: st.lists(CODES, min_size=n, max_size=n)))
def test_it_is_flagged_exactly_where_most_copies_are(codes: list[list[int]]) -> None:
    copies = [judged([own]) for own in codes]
    votes = sum(int(MAP.flagged(copy.codes)) for copy in copies)
    middle = middle_copy(MAP, copies)
    assert bool(MAP.flagged(middle.codes)) == (2 * votes > len(copies))
    assert middle.codes[0].tolist() in codes


def test_each_image_has_a_middle_of_its_own_and_keeps_its_padding() -> None:
    copies = [judged([[0, -1], [3, 1]]), judged([[3, -1], [0, 0]]), judged([[2, -1], [0, 1]])]
    middle = middle_copy(MAP, copies)
    assert middle.codes.tolist() == [[2, -1], [0, 1]]
    assert middle.mask is not None
    assert middle.mask.tolist() == [[True, False], [True, True]]


def test_an_even_number_of_copies_has_no_middle() -> None:
    with pytest.raises(InputError, match="odd number of copies"):
        middle_copy(MAP, [judged([[0]])] * 2)
    with pytest.raises(InputError, match="other images"):
        middle_copy(MAP, [judged([[0]]), judged([[0], [1]]), judged([[0]])])


@pytest.mark.parametrize("copies", [-1, 2, 4])
def test_settings_are_an_odd_number_of_copies(copies: int) -> None:
    with pytest.raises(ConfigError, match="copies: expected 0 or an odd number"):
        SmoothingSettings(copies=copies)


@pytest.mark.parametrize("noise", [0.0, -1.0, float("inf"), float("nan")])
def test_noise_is_a_positive_number(noise: float) -> None:
    with pytest.raises(ConfigError, match="noise: expected"):
        SmoothingSettings(copies=3, noise=noise)
