from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqguard.adapters.encoders.token_layout import flatten_map, prefix_count
from vqguard.errors import SeamError
from vqguard.regional.layout import grid_of


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([None, True, False]))
def test_both_layouts_give_the_same_tokens(rows: int, columns: int, hint: bool | None) -> None:
    first = torch.randn(2, 7, rows, columns)
    last = first.permute(0, 2, 3, 1)
    wanted = torch.stack([first[:, :, r, c] for r in range(rows) for c in range(columns)], dim=1)
    if columns != 7:
        assert torch.equal(flatten_map(first, 7, hint), wanted)
        assert torch.equal(flatten_map(last, 7, hint), wanted)


def test_a_square_of_channels_needs_a_word() -> None:
    features = torch.randn(2, 7, 3, 7)
    with pytest.raises(SeamError, match="first or last"):
        flatten_map(features, 7)
    assert torch.equal(flatten_map(features, 7, True), features.flatten(1, 2))
    with pytest.raises(SeamError, match="8 channels"):
        flatten_map(features, 8)


@given(st.integers(4, 40), st.integers(4, 40), st.integers(0, 5))
def test_the_patch_size_tells_the_prefix(rows: int, columns: int, prefix: int) -> None:
    size = (rows * 14 + 5, columns * 14)
    assert prefix_count(rows * columns + prefix, size, patch=14) == prefix


@given(st.integers(4, 40), st.integers(0, 5))
def test_squares_are_far_enough_apart(side: int, prefix: int) -> None:
    assert prefix_count(side * side + prefix, (side * 14, side * 14)) == prefix
    # a hierarchical encoder merges patches: the declared patch is then not its token's
    assert prefix_count(side * side + prefix, (side * 16, side * 16), patch=2) == prefix


def test_what_is_no_grid_is_refused() -> None:
    assert grid_of(12, 30, 40) == (3, 4)
    assert grid_of(12, 40, 30) == (4, 3)
    assert grid_of(12, 224, 224) is None
    with pytest.raises(SeamError, match="250 tokens"):
        prefix_count(250, (224, 224))
