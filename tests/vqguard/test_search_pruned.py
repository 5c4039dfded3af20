"""The bound of the pruned search never exceeds a distance, and a batch that defeats it is dropped.

Answers are compared with brute force in `test_search`; here with plans that force every way.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("numba")

from vqguard.errors import ConfigError
from vqguard.search import make_search, pruned
from vqguard.search import plan as plan_file
from vqguard.search.bound import CodewordBound, QueryLengths, principal_axes, random_rotation
from vqguard.search.dense import DenseSearch
from vqguard.search.following import moves
from vqguard.search.plan import Plan, has_bfloat16, has_int8, multiplies_int8
from vqguard.search.pruned import PrunedSearch
from vqguard.search.second_bound import SecondBound, sum_error

DTYPES = [torch.float32, torch.bfloat16, torch.int8]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _vectors(kind: str, n: int, d: int, seed: int) -> Tensor:
    g = _generator(seed)
    x = torch.randn(n, d, generator=g)
    if kind == "spectrum":
        return x * torch.logspace(1, -4, d) + 3.0
    if kind == "positive":
        return x.abs()
    if kind == "midpoints":  # every number lies half way between two of bfloat16
        bits = x.view(torch.int32)
        return ((bits & ~0xFFFF) | 0x8000).view(torch.float32)
    if kind == "sparse":
        return x * (torch.rand(n, d, generator=g) < 0.05) * 100.0
    return x


def _drifted(entries: Tensor, drift: float, seed: int) -> Tensor:
    """Each entry moved by a share of its own size, half of them by nothing, some towards others."""
    if not drift:
        return entries
    g = _generator(seed + 7)
    size = entries.abs().mean(1, keepdim=True) * drift
    step = torch.randn(entries.shape, generator=g)
    step[::3] = (entries.roll(1, 0) - entries)[::3].sign()
    return entries + size * step * (torch.rand(len(entries), 1, generator=g) < 0.5)


def _quantised(p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers (m, r) int8, scales (m,) and lengths (3, m) as the compiled loop forms them."""
    from vqguard.search import kernels

    numbers = torch.empty(p.shape, dtype=torch.int8)
    scales, lengths = torch.empty(len(p)), torch.empty(3, len(p), dtype=torch.float64)
    narrow = p.dtype == torch.bfloat16
    widen = kernels.widen_bfloat16 if narrow else kernels.widen_float32
    outs = numbers.numpy(), scales.numpy(), lengths.numpy()
    kernels.quantise(0, len(p), pruned._bits(p.contiguous()), widen, *outs)
    return numbers, scales, lengths


def _bounds(bound: CodewordBound, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Lower bounds (M, P) float64 of the squared distances, as the compiled loop forms them."""
    y = queries - bound.centre
    rounded = y.to(bound.turn)
    lost = (y.double() - rounded.double()).square().sum(1)
    p = rounded if bound.axes is None else rounded @ bound.axes
    if bound.dtype == torch.int8:
        numbers, scales, lengths = _quantised(p)
        exact = numbers.double() @ bound.coordinates.double().T
        g = exact.float() * bound.described[0] * scales[:, None]
        coarse = 0.0
    else:
        known = p.double().square().sum(1)
        scales, lengths = torch.ones(len(p)), torch.stack([known, torch.zeros_like(known), known])
        g = (p @ bound.coordinates.T).float()
        coarse = bound.coarse
    terms = bound.query_terms(QueryLengths(y.double().square().sum(1), lost, *lengths), scales)
    _, half, inside, outside = bound.described
    first, second = terms.factors[:, :1], terms.factors[:, 1:2]
    v = half - (g + coarse * g.abs() + first * inside + second * outside)
    assert v.dtype == torch.float32
    squared = 2.0 * (v.double() - terms.limits[:, 2, None]) + terms.limits[:, 0, None]
    lengths = squared.clamp_min(0).sqrt() - terms.limits[:, 1, None]
    return lengths.clamp_min(0).square(), squared


def _axes(entries: Tensor, rank: int, dtype: torch.dtype, seed: int = 0) -> Tensor | None:
    """As the search makes them; those of int8 are turned at random, in bfloat16 for odd seeds."""
    if dtype != torch.int8:
        return None if rank == entries.shape[1] else principal_axes(entries, rank, seed)
    turned = principal_axes(entries, rank, seed) @ random_rotation(rank, seed)
    return turned.bfloat16() if seed % 2 else turned


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 600),
    part=st.floats(0.05, 1.0),
    dtype=st.sampled_from(DTYPES),
    words=st.sampled_from(["gaussian", "spectrum", "positive", "midpoints", "sparse"]),
    kind=st.sampled_from(["gaussian", "spectrum", "aligned", "opposed", "entries", "midpoints"]),
    scale=st.integers(-45, 45),
    drift=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_the_bound_is_one(
    d: int,
    part: float,
    dtype: torch.dtype,
    words: str,
    kind: str,
    scale: int,
    drift: float,
    seed: int,
) -> None:
    described = _vectors(words, 24, d, seed)
    entries = _drifted(described, drift, seed)
    rank = max(1, int(part * d))
    axes = _axes(described, rank, dtype, seed)
    if kind == "entries":
        queries = entries[:8].clone()
    elif kind in ("aligned", "opposed"):
        # rounding errors of the queries all point along one codeword, or against it
        centre = entries.double().mean(0).float()
        sign = 1.0 if kind == "aligned" else -1.0
        along = (entries[:8] - centre).sign() * sign
        base = torch.randn(8, d, generator=_generator(seed + 1)).to(torch.bfloat16).float()
        queries = centre + base * (1.0 + 2.0**-9 * along * base.sign())
    else:
        queries = _vectors(kind, 8, d, seed + 1)
    described, entries, queries = (v * 2.0**scale for v in (described, entries, queries))
    bound = CodewordBound(described, axes, dtype)
    if drift:
        bound.follow(*moves(described, entries, bound.centre))
    lower, _ = _bounds(bound, queries)
    exact = (queries[:, None].double() - entries[None].double()).square().sum(-1)
    assert bool((lower <= exact * (1.0 + 1e-12)).all())


@settings(max_examples=60, deadline=None)
@given(
    d=st.integers(1, 600),
    words=st.sampled_from(["gaussian", "spectrum", "positive", "midpoints", "sparse"]),
    kind=st.sampled_from(["gaussian", "spectrum", "aligned", "entries", "sparse"]),
    scale=st.integers(-70, 45),
    drift=st.sampled_from([0.0, 1e-6, 1e-3, 0.1, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_the_second_bound_never_drops_a_codeword_that_is_near(
    d: int, words: str, kind: str, scale: int, drift: float, seed: int
) -> None:
    from vqguard.search.kernels import CHUNK
    from vqguard.search.refine import look_again, reach_of

    described = _vectors(words, 24, d, seed)
    entries = _drifted(described, drift, seed) * 2.0**scale
    described = described * 2.0**scale
    bound = CodewordBound(described, None, torch.float32)
    second = SecondBound(described, bound.centre, sum_error(d, CHUNK))
    if drift:
        moved = moves(described, entries, bound.centre)
        bound.follow(*moved)
        second.follow(moved.lengths)
    if kind == "entries":
        queries = entries[:8].clone()
    elif kind == "aligned":  # with what rounding drops of one codeword
        kept = second.numbers.double() * second.described[0].double()[:, None]
        dropped = ((entries - bound.centre).double() - kept)[:8].float()
        queries = bound.centre + dropped * 2.0 ** (seed % 12)
    else:
        queries = _vectors(kind, 8, d, seed + 1) * 2.0**scale
    y = queries - bound.centre
    squares = y.double().square().sum(1)
    zero = torch.zeros_like(squares)
    lengths = QueryLengths(squares, zero, squares, zero, squares)
    terms = bound.query_terms(lengths, torch.ones(len(y)))
    exact = (queries[:, None].double() - entries[None].double()).square().sum(-1)
    for i, limits in enumerate(terms.limits.numpy()):
        for j in range(len(entries)):
            _, threshold = reach_of(float(exact[i, j]) * (1.0 + 1e-13), limits)
            left = look_again(
                queries[i].numpy(),
                bound.centre.numpy(),
                j,
                second.numbers.numpy(),
                second.described.numpy(),
                bound.described[1, j : j + 1].numpy(),
                limits[3],
                threshold,
                torch.zeros(1).numpy(),
                torch.zeros(1, dtype=torch.int64).numpy(),
                1,
            )
            assert left == 1, "a codeword at its own distance is not beyond it"


def test_the_second_bound_leaves_few() -> None:
    from vqguard.search.kernels import CHUNK
    from vqguard.search.refine import look_again, reach_of

    entries = _vectors("gaussian", 400, 256, 0)
    queries = _vectors("gaussian", 20, 256, 1)
    centre = entries.double().mean(0).float()
    second = SecondBound(entries, centre, sum_error(256, CHUNK))
    half = 0.5 * (entries - centre).square().sum(1)
    left = 0
    for x in queries:
        length = float((x - centre).norm())
        top = float((x - entries).square().sum(1).min())
        _, threshold = reach_of(top, torch.tensor([length**2, 0.0, 0.0, length]).double().numpy())
        left += look_again(
            x.numpy(), centre.numpy(), 0, second.numbers.numpy(), second.described.numpy(),
            half.numpy(), length, threshold, torch.zeros(400).numpy(), torch.arange(400).numpy(),
            400,
        )  # fmt: skip
    assert left < 20 * 12


def test_the_bound_is_worth_something() -> None:
    entries = _vectors("spectrum", 400, 256, 0)
    queries = entries[:50] + 0.02 * torch.randn(50, 256, generator=_generator(1))
    exact = (queries[:, None].double() - entries[None].double()).square().sum(-1)
    for dtype in DTYPES:
        lower, _ = _bounds(CodewordBound(entries, _axes(entries, 64, dtype), dtype), queries)
        under = (lower <= exact.amin(1, keepdim=True)).sum(1)
        assert float(under.double().mean()) < 20


def test_axes_that_are_not_orthonormal_are_refused() -> None:
    entries = _vectors("gaussian", 50, 20, 0)
    with pytest.raises(ValueError, match="not orthonormal"):
        CodewordBound(entries, torch.ones(20, 4), torch.float32)
    skewed = principal_axes(entries, 8) + 0.01 * torch.randn(20, 8, generator=_generator(1))
    lower, _ = _bounds(CodewordBound(entries, skewed, torch.float32), entries)
    assert bool((lower.diagonal() <= 1e-9).all()), "a codeword is at distance 0 from itself"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rank", [16, 96, 256])
@pytest.mark.parametrize("worth", [1.0, 40.0, 1e6])
def test_every_plan_gives_the_same_answers(rank: int, dtype: str, worth: float) -> None:
    entries = _vectors("spectrum", 900, 256, 2)
    near = entries[:300] + 0.05 * torch.randn(300, 256, generator=_generator(3))
    middle = (entries[:99] + entries[1:100]) / 2
    queries = torch.cat([near, _vectors("gaussian", 200, 256, 4), middle])
    search = PrunedSearch(entries, Plan(rank, dtype, worth))
    if dtype == "bfloat16" and rank > 16 and has_bfloat16():
        assert search.plan.dtype == "bfloat16"
    if dtype == "int8" and multiplies_int8(rank, len(entries)):
        assert search.plan.dtype == "int8"
    found = search(queries)
    assert torch.equal(found, DenseSearch(entries)(queries))
    for rows in (1, 3, 17):
        assert torch.equal(search(queries[-rows:]), found[-rows:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_panels_of_different_sizes_give_the_same_answers(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = _vectors("spectrum", 1001, 256, 2)
    queries = entries[:60] + 0.05 * torch.randn(60, 256, generator=_generator(3))
    monkeypatch.setattr(pruned, "_PRODUCT_BYTES", 60 * 4 * 280)  # 251, 251, 251 and 248
    search = PrunedSearch(entries, Plan(96, dtype, 50.0))
    assert torch.equal(search(queries), DenseSearch(entries)(queries))


def test_a_product_that_sums_in_bfloat16_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruned, "has_bfloat16", lambda: True)
    honest = Tensor.__matmul__

    def coarse(self: Tensor, other: Tensor) -> Tensor:
        out = honest(self.float(), other.float())
        return out.clamp(max=256.0).to(self.dtype) if self.dtype == torch.bfloat16 else out

    monkeypatch.setattr(Tensor, "__matmul__", coarse)
    entries = _vectors("gaussian", 300, 512, 2)
    assert PrunedSearch(entries, Plan(512, "bfloat16", 50.0)).plan.dtype == "float32"


def test_products_that_saturate_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # oneDNN without VNNI adds pairs of products in 16 bits
    monkeypatch.setattr(plan_file, "has_int8", lambda: True)

    def saturated(a: Tensor, b: Tensor) -> Tensor:
        pairs = a.long()[:, 0::2] @ b.long()[0::2], a.long()[:, 1::2] @ b.long()[1::2]
        return (pairs[0] + pairs[1]).clamp(-(2**15), 2**15 - 1).int()

    monkeypatch.setattr(torch, "_int_mm", saturated)
    entries = _vectors("gaussian", 300, 512, 2)
    assert PrunedSearch(entries, Plan(256, "int8", 50.0)).plan.dtype != "int8"


@pytest.mark.skipif(not has_int8(), reason="the processor has no VNNI")
def test_where_onednn_may_not_use_vnni_int8_is_refused() -> None:
    # its products are wrong there: 127 x 127 is cut at 16 bits
    code = (
        "import torch; from vqguard.search.plan import multiplies_int8;"
        "right = torch._int_mm(torch.full((32, 64), 127, dtype=torch.int8),"
        " torch.full((64, 64), 127, dtype=torch.int8)).eq(127 * 127 * 64).all();"
        "print(bool(right), multiplies_int8(64, 64))"
    )
    isa = {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | isa,
    )
    right, used = done.stdout.split()
    assert right == used


@pytest.mark.parametrize(
    ("allowed", "may"),
    [("AVX2", False), ("avx512_core_vnni", False), ("AVX512_CORE_BF16", True), ("ALL", True)],
)
def test_where_onednn_may_not_multiply_bfloat16_it_is_not_planned(
    allowed: str, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # emulated products take three times as long as float32's
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    here = has_bfloat16()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", allowed)
    assert has_bfloat16() == (here and may)


def test_a_batch_that_defeats_the_bound_goes_to_the_dense_search_early(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = _vectors("gaussian", 2000, 64, 5)
    entries /= entries.norm(dim=1, keepdim=True)
    entries = torch.cat([entries, -entries])  # the origin is as far from every one of them
    monkeypatch.setattr(pruned, "_ROWS", 20)
    search = PrunedSearch(entries, Plan(64, "float32", 200.0))
    blocks: list[int] = []
    original = search._near

    def spy(queries: Tensor) -> tuple[Tensor, Tensor]:
        blocks.append(len(queries))
        return original(queries)

    monkeypatch.setattr(search, "_near", spy)
    queries = 1e-6 * torch.randn(400, 64, generator=_generator(6))
    assert torch.equal(search(queries), DenseSearch(entries)(queries))
    assert len(blocks) == 1, "the other blocks were not tried"


def test_the_budget_ends_what_one_slice_may_waste() -> None:
    entries = _vectors("gaussian", 3000, 32, 7)
    queries = _vectors("gaussian", 400, 32, 8)
    # a quarter of the coordinates is unknown, so that every token has many candidates
    rich = PrunedSearch(entries, Plan(24, "float32", 1e5))
    poor = PrunedSearch(entries, Plan(24, "float32", 2.0))
    decided = [int((one._near(queries)[0] > 0).sum()) for one in (rich, poor)]
    assert decided[0] > 300
    assert decided[1] < 40
    assert torch.equal(rich(queries), poor(queries))


def test_without_numba_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"numba is not installed.*vqguard\[cpu\]"):
        make_search(torch.randn(9, 5), "pruned")
