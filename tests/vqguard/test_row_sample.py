"""Reservoir sampling: bounded, uniform, blind to how a stream was cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqguard.codebooks.row_sample import RowSample
from vqguard.errors import InputError


def sampled(sizes: list[int], limit: int, seed: int = 0) -> torch.Tensor:
    sample = RowSample(limit, seed)
    rows = torch.arange(sum(sizes))[:, None]
    for part in rows.split(sizes):
        sample.add(part)
    assert sample.seen == len(rows)
    return sample.rows()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 60))
def test_the_cut_into_batches_does_not_matter(sizes: list[int], limit: int) -> None:
    total = sum(sizes)
    if total == 0:
        with pytest.raises(InputError, match="no rows"):
            sampled(sizes, limit)
        return
    rows = sampled(sizes, limit)
    assert torch.equal(rows, sampled([total], limit))
    assert len(rows) == min(limit, total)
    assert torch.equal(rows, rows.unique()[:, None])  # in order, none twice


def test_every_row_is_as_likely() -> None:
    hits = torch.zeros(40)
    for seed in range(600):
        hits[sampled([15, 15, 10], 10, seed).flatten()] += 1
    # 600 draws with p = 1/4: mean 150, standard deviation 10.6
    assert float((hits - 150).abs().max()) < 5 * 10.6


def test_an_empty_limit_is_refused() -> None:
    with pytest.raises(InputError, match="limit=0"):
        RowSample(0)
