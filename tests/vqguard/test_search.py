"""One contract for every back end: float64 brute force, ties to the lowest index, in any batch."""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tensor_core_emulation import Emulated
from vqguard.errors import ConfigError, InputError, NonFiniteError
from vqguard.search import (
    CodewordSearch,
    choose,
    dense,
    faiss_index,
    make_search,
    pruned,
    settle,
    tensor_cores,
)
from vqguard.search.backend_table import backend_class
from vqguard.search.plan import Plan
from vqguard.search.precision import full_precision

needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="faiss is not installed"
)
needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)
BACKENDS = [
    "torch",
    pytest.param("faiss", marks=needs_faiss),
    pytest.param("pruned", marks=needs_numba),
    *(
        pytest.param(f"pruned:{dtype}:{part}", marks=needs_numba)
        for dtype in ("float32", "bfloat16", "int8")
        for part in (0.3, 1.0)
    ),
    "tensor-cores",
]


def _search(words: Tensor, backend: str) -> CodewordSearch:
    """The back end by its name, or the pruned one by `pruned:type:share of the axes`.

    The one for tensor cores runs on the processor, with its products; see also
    `test_search_tensor_cores`.
    """
    name, _, plan = backend.partition(":")
    if name == "tensor-cores":
        return Emulated(words)
    if not plan or words.shape[0] == 0:
        return make_search(words, name)
    dtype, _, share = plan.partition(":")
    rank = max(1, int(float(share) * words.shape[1]))
    return pruned.PrunedSearch(words, Plan(rank, dtype, max(8.0, words.shape[0] / 20.0)))


def brute_force(queries: Tensor, codewords: Tensor) -> Tensor:
    """Float64 distances by numpy, summed pairwise in the documented tree; first minimum."""
    w = codewords.float().numpy().astype(np.float64)
    answers = []
    for x in queries.float().numpy().astype(np.float64):
        terms = (x - w) ** 2
        while terms.shape[1] > 1:
            half = 1 << ((terms.shape[1] - 1).bit_length() - 1)
            rest = terms[:, half:]
            terms = terms[:, :half].copy()
            terms[:, : rest.shape[1]] += rest
        answers.append(int(terms[:, 0].argmin()))
    return torch.tensor(answers, dtype=torch.int64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian() -> tuple[Tensor, Tensor]:
    g = _generator(0)
    return torch.randn(300, 48, generator=g), torch.randn(700, 48, generator=g)


def clustered() -> tuple[Tensor, Tensor]:
    g = _generator(1)
    words = torch.randn(500, 40, generator=g) * torch.linspace(3, 0.01, 40) + 5.0
    noise = 0.05 * torch.randn(200, 40, generator=g)
    return words[torch.randint(500, (200,), generator=g)] + noise, words


def duplicates() -> tuple[Tensor, Tensor]:
    g = _generator(2)
    words = torch.randn(20, 16, generator=g).repeat(60, 1)
    return torch.randn(100, 16, generator=g), words


def near_duplicates() -> tuple[Tensor, Tensor]:
    g = _generator(3)
    words = torch.randn(20, 33, generator=g).repeat_interleave(40, dim=0)
    words = torch.nextafter(words, words + torch.randn(words.shape, generator=g).sign())
    return torch.randn(60, 33, generator=g), words[torch.randperm(800, generator=g)]


def far_queries() -> tuple[Tensor, Tensor]:
    # the rounding of a float64 distance is larger than the difference of two scores
    queries, words = near_duplicates()
    return torch.cat([queries * 2.0**power for power in (26, 32)]), words


def common_part() -> tuple[Tensor, Tensor]:
    queries, words = clustered()
    return queries + 300.0, words + 300.0


def bisector() -> tuple[Tensor, Tensor]:
    g = _generator(4)
    words = torch.randn(300, 64, generator=g)
    pair = torch.randint(300, (200, 2), generator=g)
    return (words[pair[:, 0]] + words[pair[:, 1]]) / 2, words


def huge() -> tuple[Tensor, Tensor]:
    g = _generator(5)
    words = torch.randn(100, 12, generator=g)
    words[50:] *= 1e25
    queries = torch.randn(80, 12, generator=g)
    queries[::2] *= 3e37
    return queries, words


def denormal() -> tuple[Tensor, Tensor]:
    g = _generator(6)
    return torch.randn(50, 10, generator=g) * 1e-41, torch.randn(200, 10, generator=g) * 1e-41


def constant() -> tuple[Tensor, Tensor]:
    words = torch.randn(400, 24, generator=_generator(7))
    return torch.full((150, 24), 0.3), words


def all_tied() -> tuple[Tensor, Tensor]:
    signs = torch.randn(300, 20, generator=_generator(8)).sign()
    return torch.zeros(5, 20), signs


def single() -> tuple[Tensor, Tensor]:
    return torch.randn(7, 1, generator=_generator(9)), torch.zeros(1, 1)


def far_away() -> tuple[Tensor, Tensor]:
    g = _generator(11)
    words = 1e6 + torch.randn(300, 32, generator=g)
    return words[:100] + torch.randn(100, 32, generator=g), words


def tiny_differences() -> tuple[Tensor, Tensor]:
    g = _generator(12)
    words = torch.randn(32, generator=g) * (1.0 + 1e-6 * torch.randn(400, 32, generator=g))
    return words[:120] + 1e-7 * torch.randn(120, 32, generator=g), words


def all_scales() -> tuple[Tensor, Tensor]:
    g = _generator(13)
    powers = 10.0 ** torch.randint(-15, 16, (500, 1), generator=g)
    words = torch.randn(500, 24, generator=g) * powers
    queries = torch.randn(200, 24, generator=g) * powers[:200].flip(0)
    return torch.cat([queries, words[:50] / 3]), words


def zero_rows() -> tuple[Tensor, Tensor]:
    g = _generator(14)
    words = torch.randn(200, 16, generator=g)
    words[::3] = 0.0
    queries = torch.randn(90, 16, generator=g)
    queries[::2] = 0.0
    return queries, words


def outlier_channel() -> tuple[Tensor, Tensor]:
    g = _generator(15)
    words = torch.randn(300, 64, generator=g)
    words[:, 5] *= 1e4
    return words[:100] + 0.1 * torch.randn(100, 64, generator=g), words


def equal_codewords() -> tuple[Tensor, Tensor]:
    return torch.randn(40, 8, generator=_generator(16)), torch.full((70, 8), 1e15)


CASES = [
    gaussian,
    clustered,
    duplicates,
    near_duplicates,
    far_queries,
    common_part,
    bisector,
    huge,
    denormal,
    constant,
    all_tied,
    single,
    far_away,
    tiny_differences,
    all_scales,
    zero_rows,
    outlier_channel,
    equal_codewords,
]
ids = [case.__name__ for case in CASES]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_equals_float64_brute_force(backend: str, case: object) -> None:
    queries, words = case()  # type: ignore[operator]
    found = _search(words, backend)(queries)
    assert found.dtype == torch.int64
    assert torch.equal(found, brute_force(queries, words))


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_ties_go_to_the_lowest_index(backend: str) -> None:
    # small whole numbers: every distance is exact in any order of summation
    g = _generator(10)
    words = torch.randint(-2, 3, (600, 6), generator=g).float()
    queries = torch.randint(-2, 3, (300, 6), generator=g).float() / 2
    exact = ((queries[:, None].double() - words[None].double()) ** 2).sum(-1)
    expected = torch.tensor([int((row == row.min()).nonzero()[0]) for row in exact])
    assert torch.equal(_search(words, backend)(queries), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [bisector, near_duplicates, clustered])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_answer_does_not_depend_on_the_batch(
    backend: str, case: object, data: st.DataObject
) -> None:
    queries, words = case()  # type: ignore[operator]
    search = _search(words, backend)
    whole = search(queries)
    rows = torch.tensor(
        data.draw(st.lists(st.integers(0, len(queries) - 1), min_size=1, max_size=20))
    )
    assert torch.equal(search(queries[rows]), whole[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "elements"), [(7, 300), (13, 1000), (64, 4096)])
def test_answer_does_not_depend_on_chunking(
    backend: str, rows: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, words = near_duplicates()
    expected = _search(words, backend)(queries)
    monkeypatch.setattr(dense, "_ROWS", rows)
    monkeypatch.setattr(dense, "_BLOCK_ELEMENTS", dict.fromkeys(dense._BLOCK_ELEMENTS, elements))
    monkeypatch.setattr(dense, "_CODEWORD_ELEMENTS", 3000)
    monkeypatch.setattr(faiss_index, "_ROWS", rows)
    monkeypatch.setattr(pruned, "_ROWS", rows)
    monkeypatch.setattr(pruned, "_PRODUCT_BYTES", elements)
    monkeypatch.setattr(tensor_cores, "_SCORES", rows * 800)
    monkeypatch.setattr(tensor_cores, "_ROWS", 10 * rows)
    assert torch.equal(_search(words, backend)(queries), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_answer_does_not_depend_on_threads(backend: str) -> None:
    queries, words = bisector()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _search(words, backend)(queries)
        torch.set_num_threads(2)
        two = _search(words, backend)(queries)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_answer_does_not_depend_on_the_dtype_that_holds_the_values(
    backend: str, dtype: torch.dtype
) -> None:
    queries, words = clustered()
    queries = queries.to(torch.bfloat16).to(torch.float16).float()
    queries[queries.to(torch.bfloat16).float() != queries] = 0.0  # now exact in every dtype
    found = _search(words, backend)(queries.to(dtype))
    assert torch.equal(found, brute_force(queries, words))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_and_reduced_precision_do_not_reach_the_search(backend: str) -> None:
    queries, words = clustered()
    expected = brute_force(queries, words)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            found = _search(words, backend)(queries)
        assert torch.get_float32_matmul_precision() == "medium", "the process's choice is kept"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_an_error_that_names_the_row(backend: str, bad: float) -> None:
    queries, words = gaussian()
    search = _search(words, backend)
    queries[17, 3] = bad
    with pytest.raises(NonFiniteError, match="query in row 17"):
        search(queries)
    words[5, 0] = bad
    with pytest.raises(NonFiniteError, match="codeword in row 5"):
        _search(words, backend)


def test_float64_beyond_float32_is_refused() -> None:
    _, words = gaussian()
    with pytest.raises(NonFiniteError, match="beyond float32"):
        make_search(words, "torch")(torch.full((1, 48), 1e300, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_are_checked_and_no_queries_give_no_answers(backend: str) -> None:
    search = _search(torch.randn(9, 5), backend)
    with pytest.raises(InputError, match=r"width 4, the codewords 5"):
        search(torch.randn(2, 4))
    with pytest.raises(InputError, match="floating-point matrix"):
        search(torch.ones(2, 5, dtype=torch.int64))
    assert search(torch.empty(0, 5)).shape == (0,)
    with pytest.raises(InputError, match="at least one codeword"):
        _search(torch.empty(0, 5), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_refresh_follows_the_codewords(backend: str) -> None:
    queries, words = gaussian()
    search = _search(words, backend)
    moved = words.flip(0)
    search.refresh(moved)
    assert torch.equal(search(queries), brute_force(queries, moved))


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_devices_are_refused(backend: str) -> None:
    search = _search(torch.randn(9, 5), backend)
    with pytest.raises(InputError, match="meta"):
        search(torch.empty(2, 5, device="meta"))


def test_memory_stays_bounded_when_everything_is_a_candidate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    original = settle.settle

    def spy(
        queries: Tensor, codewords: Tensor, rows: Tensor, columns: Tensor, into: Tensor
    ) -> None:
        sizes.append(len(rows))
        original(queries, codewords, rows, columns, into)

    monkeypatch.setattr(dense, "settle", spy)
    words = torch.ones(5000, 8)
    assert make_search(words, "torch")(torch.zeros(500, 8)).tolist() == [0] * 500
    assert max(sizes) <= dense._LIMIT * 500


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("onednn", [True, False])
def test_scores_are_float32_products(
    precision: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if onednn and not dense._has_onednn():
        pytest.skip("torch has no oneDNN here")
    if not onednn:
        monkeypatch.setattr(dense, "_has_onednn", lambda: False)
    g = _generator(20)
    queries, words = torch.randn(200, 1024, generator=g), torch.randn(1500, 1024, generator=g)
    norms = settle.squared_norms(words)
    exact = norms - 2.0 * queries.double() @ words.double().T
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with full_precision(queries.device):
            scores = dense._scores(norms.float(), queries, words)
    finally:
        torch.set_float32_matmul_precision(before)
    lengths = settle.squared_norms(queries).sqrt()
    allowed = settle.margin(lengths, float(norms.max()) ** 0.5, 1024, torch.float32)
    assert bool(((scores - exact).abs() <= allowed[:, None]).all())
    # bfloat16 products are off by far more than float32 ones are in practice
    assert float((scores - exact).abs().max()) < 0.01


def test_auto_says_once_what_it_chose(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger="vqguard.search"):
        small = [make_search(torch.randn(10, 4)) for _ in range(2)]
        assert len(caplog.records) == 1
        assert {one.name for one in small} == {"torch"}
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert make_search(torch.randn(5000, 4)).name == "torch"
    assert "by torch: fastest where it was measured" in caplog.text


def test_unknown_backend_gets_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'faiss-gpu'"):
        make_search(torch.randn(2, 2), "faiss_gpu")


@needs_faiss
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_faiss_gpu_without_a_gpu_says_why() -> None:
    with pytest.raises(ConfigError, match="faiss-gpu back end cannot run"):
        make_search(torch.randn(2, 2), "faiss-gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "tensor-cores", "faiss-gpu"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_cuda_gives_the_answers_of_the_cpu(backend: str, case: object) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if problem := backend_class(backend).problem():
        pytest.skip(problem)
    queries, words = case()  # type: ignore[operator]
    found = make_search(words.cuda(), backend)(queries.cuda())
    assert found.is_cuda
    assert torch.equal(found.cpu(), brute_force(queries, words))


@pytest.mark.gpu
@needs_faiss
def test_a_cuda_tensor_is_refused_by_the_cpu_index() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with pytest.raises(InputError, match="CPU back end"):
        make_search(torch.randn(9, 5), "faiss")(torch.randn(2, 5).cuda())


@needs_faiss
def test_faiss_keeps_its_own_classes() -> None:
    import faiss

    search: CodewordSearch = make_search(torch.randn(100, 4), "faiss")
    search(torch.randn(3, 4))
    # faiss.contrib.torch_utils would have renamed the original
    assert not hasattr(faiss, "knn_gpu_numpy")
