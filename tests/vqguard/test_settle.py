"""The float64 distances are the same everywhere, and the error margin is one."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqguard.search.settle import distances, margin, settle, squared_norms, tree_sum


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 300), seed=st.integers(0, 2**31), scale=st.floats(-100, 100))
def test_tree_sum_is_a_sum_and_a_row_does_not_see_its_batch(
    n: int, seed: int, scale: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(7, n, generator=g, dtype=torch.float64) * 2.0**scale
    batch = tree_sum(values.clone())
    for row in range(7):
        assert float(batch[row]) == float(tree_sum(values[row : row + 1].clone())[0])
        exact = math.fsum(values[row].tolist())
        assert abs(float(batch[row]) - exact) <= 1e-15 * n * float(values[row].abs().sum())


def test_distance_of_a_pair_does_not_depend_on_the_other_pairs() -> None:
    g = torch.Generator().manual_seed(0)
    queries, words = torch.randn(9, 1000, generator=g), torch.randn(11, 1000, generator=g)
    rows = torch.randint(9, (5000,), generator=g)
    columns = torch.randint(11, (5000,), generator=g)
    many = distances(queries, words, rows, columns)
    for pair in (0, 1234, 4999):
        one = distances(queries, words, rows[pair : pair + 1], columns[pair : pair + 1])
        assert float(one) == float(many[pair])
    assert torch.allclose(
        many, (queries[rows].double() - words[columns].double()).square().sum(1), rtol=1e-13
    )


def test_settle_leaves_absent_rows_alone_and_takes_the_lowest_of_equals() -> None:
    queries, words = torch.zeros(3, 2), torch.tensor([[2.0, 0], [0, 1.0], [1.0, 0], [0, -1.0]])
    into = torch.full((3,), -7)
    settle(queries, words, torch.tensor([0, 0, 0, 2]), torch.tensor([3, 2, 0, 0]), into)
    assert into.tolist() == [2, -7, 0]


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 4096),
    seed=st.integers(0, 2**31),
    x_scale=st.integers(-70, 40),
    e_scale=st.integers(-70, 20),
    kind=st.sampled_from(["gaussian", "positive", "cancelling", "sparse"]),
)
def test_margin_covers_every_order_of_summation(
    d: int, seed: int, x_scale: int, e_scale: int, kind: str
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1, d, generator=g) * 2.0**x_scale
    e = torch.randn(4, d, generator=g) * 2.0**e_scale
    if kind == "positive":
        x, e = x.abs(), e.abs()
    elif kind == "cancelling":
        half = d // 2
        x[:, half : 2 * half] = x[:, :half]
        e[:, half : 2 * half] = -e[:, :half]
    elif kind == "sparse":
        x = x * (torch.rand(x.shape, generator=g) < 0.02) * 2.0**10
    exact = torch.tensor(
        [
            # products of two float32 numbers are exact in float64, and fsum rounds once
            math.fsum(
                [v * v for v in row] + [-2.0 * a * v for a, v in zip(point, row, strict=True)]
            )
            for point, row in zip(x.double().tolist() * 4, e.double().tolist(), strict=True)
        ],
        dtype=torch.float64,
    )
    norms = squared_norms(e)
    bound = margin(squared_norms(x).sqrt(), math.sqrt(float(norms.max())), d, torch.float32)
    products = x * e
    one_by_one = norms.float() - 2 * products.cumsum(1)[:, -1]
    from_norm = torch.cat([norms.float()[:, None], -2 * products], 1).cumsum(1)[:, -1]
    by_gemm = torch.addmm(norms.float(), x, e.T, alpha=-2.0)[0]
    for scores in (one_by_one, from_norm, by_gemm):
        assert bool(((scores.double() - exact).abs() <= bound).all())
