"""The search on tensor cores with the products that GPUs may return, on the CPU.

`test_search` runs the contract of every back end on it with exact products.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tensor_core_emulation import Aligned, Emulated, Float16Sums, OneByOne, Worst
from vqguard.errors import ConfigError, NonFiniteError
from vqguard.search import (
    backend_table,
    calibrate,
    choose,
    make_search,
    needs_calibration,
    tensor_cores,
    timing,
)
from vqguard.search.dense import DenseSearch
from vqguard.search.precision import full_precision
from vqguard.search.tensor_cores import TensorCoreSearch, accumulation

ROUNDINGS = [Emulated, Aligned, OneByOne, Worst]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _vectors(kind: str, n: int, d: int, seed: int) -> Tensor:
    g = _generator(seed)
    x = torch.randn(n, d, generator=g)
    if kind == "spectrum":
        return x * torch.logspace(1, -4, d) + 3.0
    if kind == "positive":
        return x.abs()
    if kind == "midpoints":  # every number lies half way between two of float16
        bits = x.view(torch.int32)
        return ((bits & ~0x1FFF) | 0x1000).view(torch.float32)
    if kind == "sparse":
        return x * (torch.rand(n, d, generator=g) < 0.05) * 100.0
    if kind == "scales":
        return x * 10.0 ** torch.randint(-6, 7, (n, 1), generator=g)
    return x


def _near_ties(d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries a hair's breadth off the plane between two codewords, and 60 codewords."""
    g = _generator(seed)
    words = torch.randn(60, d, generator=g)
    pair = torch.randint(60, (24, 2), generator=g)
    shift = 10.0 ** -torch.randint(2, 9, (24, 1), generator=g).float()
    queries = (words[pair[:, 0]] + words[pair[:, 1]]) / 2
    return queries + shift * torch.randn(24, d, generator=g), words


@settings(max_examples=40)
@given(
    search=st.sampled_from(ROUNDINGS),
    d=st.integers(1, 130),
    words=st.sampled_from(["gaussian", "spectrum", "positive", "midpoints", "sparse", "scales"]),
    kind=st.sampled_from(["gaussian", "spectrum", "positive", "midpoints", "entries", "far"]),
    scale=st.integers(-75, 75),
    seed=st.integers(0, 2**31),
)
def test_the_scores_are_lower_bounds(
    search: type[Emulated], d: int, words: str, kind: str, scale: int, seed: int
) -> None:
    entries = _vectors(words, 40, d, seed)
    if kind == "entries":
        queries = entries[:8] + 1e-3 * _vectors("gaussian", 8, d, seed + 1)
    elif kind == "far":
        queries = 2.0**20 * _vectors("gaussian", 8, d, seed + 1)
    else:
        queries = _vectors(kind, 8, d, seed + 1)
    entries, queries = entries * 2.0**scale, queries * 2.0**scale
    codes, counts = search(entries)._near(queries)
    exact = (queries[:, None].double() - entries[None].double()).square().sum(-1)
    for row, count in enumerate(counts.tolist()):
        if count:
            nearest = (exact[row] == exact[row].min()).nonzero().flatten().tolist()
            assert set(nearest) <= set(codes[row, :count].tolist())


@pytest.mark.parametrize("search", ROUNDINGS)
@settings(max_examples=8)
@given(d=st.sampled_from([5, 64, 129]), seed=st.integers(0, 2**31))
def test_near_ties_get_the_answers_of_the_dense_search(
    search: type[Emulated], d: int, seed: int
) -> None:
    queries, words = _near_ties(d, seed)
    expected = DenseSearch(words)(queries)
    made = search(words)
    assert torch.equal(made(queries), expected)
    assert torch.equal(made(queries[3:4]), expected[3:4])
    assert torch.equal(made(queries.flip(0)), expected.flip(0))


def _exact_near_ties(seed: int) -> tuple[Tensor, Tensor]:
    """Near-ties of which float16 loses nothing: the margin is that of the product alone."""
    g = _generator(seed)
    half = 2.0 * torch.randint(-511, 512, (30, 64), generator=g)
    words = torch.cat([half, -half])  # around zero
    pair = torch.randint(60, (24, 2), generator=g)
    queries = (words[pair[:, 0]] + words[pair[:, 1]]) / 2
    queries[torch.arange(24), torch.randint(64, (24,), generator=g)] += 1.0
    return queries, words


def test_a_margin_that_were_too_small_would_be_noticed() -> None:
    class TenTimes(Worst):
        share = 10.0

    wrong: dict[type[Worst], int] = dict.fromkeys((TenTimes, Worst), 0)
    for seed in range(10):
        queries, words = _exact_near_ties(seed)
        expected = DenseSearch(words)(queries)
        for search in wrong:
            wrong[search] += int((search(words)(queries) != expected).sum())
    assert wrong[TenTimes] > 10
    assert wrong[Worst] == 0


@settings(max_examples=25)
@given(
    search=st.sampled_from([Emulated, Aligned, OneByOne]),
    d=st.integers(1, 700),
    kind=st.sampled_from(["gaussian", "positive", "spectrum", "sparse"]),
    seed=st.integers(0, 2**31),
)
def test_no_order_of_summation_leaves_the_bound(
    search: type[Emulated], d: int, kind: str, seed: int
) -> None:
    made = search(_vectors("gaussian", 2, d, 0))
    a, b = (_vectors(kind, 4, d, seed + side).half() for side in range(2))
    exact = a.double() @ b.double().T
    allowed = accumulation(d) * (a.double().abs() @ b.double().abs().T)
    assert bool(((made._product(a, b).double() - exact).abs() <= allowed).all())


def test_most_tokens_need_no_distance_at_all() -> None:
    words = _vectors("gaussian", 2000, 256, 0) * torch.logspace(0, -1, 256)
    noise = _vectors("gaussian", 300, 256, 1) * torch.logspace(0, -1, 256)
    _, counts = Emulated(words)._near(words[:300] + 0.7 * noise)
    assert float((counts == 1).double().mean()) > 0.9
    assert bool((counts > 0).all())


def test_sums_in_float16_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    queries, words = _near_ties(64, 0)
    search = Float16Sums(words)
    assert not search._sound
    assert "not summed in float32" in caplog.text
    assert torch.equal(search(queries), DenseSearch(words)(queries))


@pytest.mark.parametrize("bits", [23, 24, 25])
@pytest.mark.parametrize("d", [16, 64, 1000])
def test_24_bits_are_asked_for(bits: int, d: int) -> None:
    class Sums(Aligned):
        pass

    Sums.bits = bits
    assert Sums(_vectors("gaussian", 3, d, 0))._sound == (bits >= 24)


def test_what_hardware_may_do_to_subnormal_numbers_does_not_matter() -> None:
    rows = _vectors("scales", 50, 40, 0) * torch.logspace(0, -12, 40)
    numbers = tensor_cores._halves(rows, rows.abs().amax(dim=1)).numbers.float()
    assert bool(((numbers == 0) | (numbers.abs() >= 2.0**-14)).all())
    assert float(numbers.abs().max()) <= 2.0**14


def test_what_rounding_lost_is_measured() -> None:
    rows = _vectors("spectrum", 50, 40, 0)
    halves = tensor_cores._halves(rows, rows.abs().amax(dim=1))
    rounded = halves.numbers.double() * halves.scale.double()[:, None]
    assert torch.equal(halves.scale.log2().round(), halves.scale.log2())
    assert torch.allclose(halves.lost, (rows.double() - rounded).norm(dim=1), rtol=1e-12)
    assert bool((halves.lost <= 2.0**-11 * halves.length).all())


_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::bincount", "aten::_unique2"}


def _waits(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations of `work` for which the host waits for a GPU; a mask as index is a nonzero."""
    seen, copy_out = [], Tensor.tolist

    def tolist(tensor: Tensor) -> object:
        seen.append("tolist")
        return copy_out(tensor)

    with (
        monkeypatch.context() as patch,
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        patch.setattr(Tensor, "tolist", tolist)
        work()
    return seen + [event.name for event in profile.events() if event.name in _WAITS]


def test_the_host_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, words = _near_ties(64, 0)
    search = Emulated(words)
    monkeypatch.setattr(tensor_cores, "_SCORES", 4 * 64 * 5)  # blocks of five queries
    assert _waits(lambda: search(queries), monkeypatch) == ["tolist"]
    assert len(_waits(lambda: DenseSearch(words)(queries), monkeypatch)) > 1, "they are seen"


def test_a_query_that_is_not_finite_is_found_among_those_left() -> None:
    queries, words = _near_ties(64, 0)
    queries[5, 3], queries[9, 1] = math.inf, math.nan
    with pytest.raises(NonFiniteError, match=r"query in row 5 .*2 such rows"):
        Emulated(words)(queries)


def test_left_queries_and_settled_ones_share_a_batch() -> None:
    queries, words = _near_ties(64, 0)
    words = torch.cat([words, words[:1].repeat(40, 1)])  # 41 equal ones are too many candidates
    queries = torch.cat([queries, words[:1] + 1e-4, words[1:2], 1e25 * queries[:2]])
    search = Emulated(words)
    _, counts = search._near(queries)
    assert sorted({min(count, 2) for count in counts.tolist()}) == [0, 1, 2]
    assert torch.equal(search(queries), DenseSearch(words)(queries))


def test_a_codebook_that_moves_is_described_anew() -> None:
    queries, words = _near_ties(64, 0)
    search = Emulated(words)
    for moved in (words.flip(0), words[:7], 100.0 * words):
        search.refresh(moved)
        assert torch.equal(search(queries), DenseSearch(moved)(queries))


def test_without_a_gpu_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="tensor-cores back end cannot run: no CUDA device"):
        make_search(torch.randn(9, 5), "tensor-cores")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hip": "6.0"}, "AMD"),
        ({"capability": (6, 1)}, "no tensor cores"),
        ({}, None),
    ],
)
def test_what_is_not_proven_is_not_used(
    change: dict[str, object], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    weakest = change.get("capability", (8, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: weakest if device else (9, 0)
    )
    monkeypatch.setattr(torch.version, "hip", change.get("hip"))
    problem = TensorCoreSearch.problem()
    assert (problem is None) if said is None else (problem is not None and said in problem)


def test_float16_sums_are_off_inside_and_as_before_afterwards() -> None:
    cuda = torch.backends.cuda.matmul
    names = ("allow_fp16_accumulation", "allow_fp16_reduced_precision_reduction")
    before = {name: getattr(cuda, name) for name in names if hasattr(cuda, name)}
    try:
        for name in before:
            setattr(cuda, name, True)
        with full_precision(torch.device("cpu")):
            assert not any(getattr(cuda, name) for name in before)
        assert all(getattr(cuda, name) for name in before)
    finally:
        for name, value in before.items():
            setattr(cuda, name, value)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> type[Emulated]:
    monkeypatch.setattr(
        backend_table, "_BACKENDS", {"torch": DenseSearch, "tensor-cores": Emulated}
    )
    return Emulated


def test_tuning_times_it_where_the_product_counts(emulated: type[Emulated]) -> None:
    words = _vectors("gaussian", 600, 80, 0)
    measured = calibrate(words, words[:100])
    assert set(measured.times) == {"torch", "tensor-cores"}
    assert set(calibrate(words[:, :48].contiguous()).times) == {"torch"}


def test_on_cuda_auto_measures_where_there_is_a_choice(
    emulated: type[Emulated], monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCuda(NamedTuple):
        shape: tuple[int, int] = (5000, 128)
        device: torch.device = torch.device("cuda")

    words: Any = OnCuda()
    assert needs_calibration(words)
    assert not needs_calibration(words._replace(shape=(4000, 128)))
    monkeypatch.setattr(emulated, "problem", classmethod(lambda cls: "no card"))
    assert not needs_calibration(words)
    assert choose.choose(words) == ("torch", "tensor-cores: no card", None)


def test_a_gpu_is_timed_by_events_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            told.append(f"record on {stream}")

        def synchronize(self) -> None:
            told.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: str(device))
    card = torch.device("cuda:1")
    taken = timing.alternated({"a": lambda: told.append("work")}, lambda taken: True, card)
    assert told[:4] == ["record on cuda:1", "work", "record on cuda:1", "wait"]
    assert taken == {"a": [0.002] * 5}


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 1000, 1024, 4096])
@pytest.mark.parametrize("rows", [1, 16, 17, 576, 4608])
def test_the_bound_holds_on_the_card_itself(dim: int, rows: int) -> None:
    if problem := TensorCoreSearch.problem():
        pytest.skip(problem)
    words = _vectors("gaussian", 8192, dim, 0).cuda()
    search = TensorCoreSearch(words)
    assert search._sound
    queries = _vectors("positive", rows, dim, 1).cuda()
    a, b = queries.half(), words[:2048].half()
    with full_precision(a.device):
        products = search._product(a, b).double()
    allowed = accumulation(dim) * (a.double().abs() @ b.double().abs().T)
    assert bool(((products - a.double() @ b.double().T).abs() <= allowed).all())
    assert torch.equal(search(queries), DenseSearch(words)(queries))
    assert torch.equal(search(queries[-3:]), search(queries)[-3:])


@pytest.mark.gpu
def test_the_host_waits_once_for_the_card() -> None:
    if problem := TensorCoreSearch.problem():
        pytest.skip(problem)
    queries, words = _near_ties(256, 0)
    search, queries = TensorCoreSearch(words.cuda()), queries.cuda()
    search(queries)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            search(queries)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len([one for one in seen if "synchroniz" in str(one.message)]) == 1


@pytest.mark.gpu
def test_auto_measures_on_the_card() -> None:
    if problem := TensorCoreSearch.problem():
        pytest.skip(problem)
    words = _vectors("gaussian", 8192, 1024, 0).cuda()
    measured = calibrate(words)
    assert measured.fits(words)
    assert not measured.fits(words.cpu())
    assert {"torch", "tensor-cores"} <= set(measured.times)
    assert torch.equal(make_search(words, "auto", measured)(words[:50]).cpu(), torch.arange(50))
