"""A search of codewords that are trained: the same answers, and a description that is kept."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("numba")

from vqguard.codebooks.quantizer import VectorQuantizer
from vqguard.search import choose, make_search, pruned
from vqguard.search.backend_table import backend_problem
from vqguard.search.dense import DenseSearch
from vqguard.search.following import moves
from vqguard.search.plan import Plan
from vqguard.search.pruned import PrunedSearch

CODES, DIM = 700, 160


def _vectors(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, DIM, generator=generator) * torch.logspace(1, -1, DIM) + 2.0


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The codewords of each description."""
    calls: list[torch.Tensor] = []
    describe = PrunedSearch._describe

    def counted(self: PrunedSearch, axes: torch.Tensor | None, dtype: torch.dtype) -> None:
        calls.append(self.codewords.clone())
        describe(self, axes, dtype)

    monkeypatch.setattr(PrunedSearch, "_describe", counted)
    return calls


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("rank", [16, DIM])
@pytest.mark.parametrize("step", [1e-4, 0.02, 5.0])
def test_moving_codewords_are_searched_as_by_brute_force(
    dtype: str, rank: int, step: float
) -> None:
    words, queries = _vectors(CODES, 0), _vectors(300, 1)
    generator = torch.Generator().manual_seed(2)
    search = PrunedSearch(words, Plan(rank, dtype, 20.0))
    for number in range(6):
        moving = torch.rand(CODES, 1, generator=generator) < 0.4
        words += step * torch.randn(CODES, DIM, generator=generator) * moving
        if number == 3:
            words[:3] = queries[:3]  # revived entries are far from where they were
            words[4:9] = words[3]  # and some tie
        search.refresh(words)
        assert torch.equal(search(queries), DenseSearch(words)(queries))


def test_a_small_step_does_not_describe_the_codewords_anew(described: list[torch.Tensor]) -> None:
    words, queries = _vectors(CODES, 0), _vectors(64, 1)
    search = PrunedSearch(words, Plan(16, "float32", 20.0))
    search.refresh(words)  # from here on they move
    before = len(described)
    for seed in range(5):
        words += 1e-3 * torch.randn(CODES, DIM, generator=torch.Generator().manual_seed(seed))
        search.refresh(words)
        assert torch.equal(search(queries), DenseSearch(words)(queries))
    assert len(described) == before


def test_codewords_that_strayed_are_described_anew(described: list[torch.Tensor]) -> None:
    words = _vectors(CODES, 0)
    search = PrunedSearch(words, Plan(16, "float32", 20.0))
    search.refresh(words)
    before = len(described)
    words += torch.randn(CODES, DIM)
    search.refresh(words)
    assert len(described) == before + 1
    search.refresh(words)
    assert len(described) == before + 1, "from where they are now they have not moved"


def test_other_codewords_may_come_in_any_number() -> None:
    queries = _vectors(64, 1)
    search = PrunedSearch(_vectors(CODES, 0), Plan(16, "float32", 20.0))
    for codes in (CODES, CODES + 50, 40, 40):
        words = _vectors(codes, codes)
        search.refresh(words)
        assert torch.equal(search(queries), DenseSearch(words)(queries))


def test_moves_are_not_underestimated() -> None:
    words, centre = _vectors(CODES, 0), _vectors(1, 3)[0]
    moved = words.clone()
    moved[::2] += 1e-3
    found = moves(words, moved, centre)
    exact = ((moved - centre).double() - (words - centre).double()).norm(dim=1)
    assert bool((found.lengths >= exact).all())
    assert bool((found.lengths[1::2] == 0).all())
    assert not found.strayed
    assert moves(words, moved + 1.0, centre).strayed
    assert moves(words, words.roll(1, 0), centre).turned
    infinite = words.clone()
    infinite[:20] = float("inf")
    assert moves(words, infinite, centre).strayed


def test_a_codebook_that_learns_is_searched_by_what_follows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "WORTH_AN_INDEX", 100)
    taken: list[str] = []

    def tuned(words: torch.Tensor, queries: torch.Tensor) -> tuple[object, None]:
        search = PrunedSearch(words, Plan(16, "float32", 20.0))
        taken.append(search.name)
        return search, None

    monkeypatch.setattr(choose, "tuned_search", tuned)
    quantizer = VectorQuantizer(CODES, DIM)
    plain = VectorQuantizer(CODES, DIM, search="torch")
    for level in (quantizer, plain):
        level.codebook.weight.data.copy_(_vectors(CODES, 0))
        level.refresh()
    optimisers = [torch.optim.AdamW(level.parameters(), lr=1e-2) for level in (quantizer, plain)]
    for seed in range(4):
        queries = _vectors(300, 10 + seed)
        codes = []
        for level, optimiser in zip((quantizer, plain), optimisers, strict=True):
            out = level(queries)
            codes.append(out.indices)
            optimiser.zero_grad()
            out.codebook_loss.backward()
            optimiser.step()
        assert torch.equal(*codes)
    assert taken == ["pruned"], "tuned once, then followed"
    assert quantizer.calibration is None, "a codebook at rest is tuned by itself"
    assert torch.equal(quantizer.codebook.weight, plain.codebook.weight)


def test_few_queries_a_step_are_searched_densely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "WORTH_AN_INDEX", 100)
    assert choose.moving_search(_vectors(CODES, 0), _vectors(20, 1)).name == "torch"


def test_what_is_built_anew_is_not_taken_for_a_moving_codebook(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "WORTH_AN_INDEX", 100)
    words = _vectors(CODES, 0)
    index = make_search(words, "faiss") if backend_problem("faiss") is None else None
    if index is None:
        pytest.skip("faiss is not installed")
    monkeypatch.setattr(choose, "tuned_search", lambda words, queries: (index, None))
    assert choose.moving_search(words, _vectors(300, 1)).name == "torch"


def test_the_pruned_search_keeps_no_copy_of_a_codebook_at_rest() -> None:
    search = pruned.PrunedSearch(_vectors(CODES, 0), Plan(16, "float32", 20.0))
    assert search._described is None
