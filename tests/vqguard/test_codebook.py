from __future__ import annotations

import importlib.util
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from vqguard.codebooks import kmeans as kmeans_module
from vqguard.codebooks.codebook import Codebook
from vqguard.errors import InputError, NonFiniteError
from vqguard.search.dense import DenseSearch


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _blobs(each: int = 50) -> tuple[Tensor, Tensor]:
    centres = 10.0 * torch.eye(6, 8)
    noise = 0.1 * torch.randn(6 * each, 8, generator=_generator())
    return centres.repeat(each, 1) + noise, centres


@pytest.fixture(params=["faiss", "torch"])
def clustering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    elif importlib.util.find_spec("faiss") is None:
        pytest.skip("faiss is not installed")
    return str(request.param)


def test_kmeans_lowers_the_quantisation_error(clustering: str) -> None:
    points, centres = _blobs()
    book = Codebook(12, 8)
    book.start_from(points)
    error = torch.cdist(points, book.weight.detach()).amin(1).square().mean()
    assert float(error) < 0.1
    assert float(torch.cdist(centres, book.weight.detach()).amin(1).max()) < 1.0


def test_kmeans_of_a_large_codebook_assigns_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the pruned search, and as the dense one would have; faiss is not asked."""
    points = torch.randn(3000, 16, generator=_generator())
    points[100:300] = points[:200].clone()  # points that repeat, so that centres tie

    def refused(*arguments: object) -> Tensor:
        raise AssertionError("faiss was asked")

    monkeypatch.setattr(kmeans_module, "_faiss_kmeans", refused)
    monkeypatch.setattr(kmeans_module, "_WORTH_A_BOUND", 400 * 16)
    pruned = kmeans_module.kmeans(points, 400, seed=3, iterations=4)
    monkeypatch.setattr(kmeans_module, "_search", DenseSearch)
    dense = kmeans_module.kmeans(points, 400, seed=3, iterations=4)
    assert torch.equal(pruned, dense)


def test_start_is_seeded(clustering: str) -> None:
    points, _ = _blobs()
    books = [Codebook(12, 8) for _ in range(3)]
    for book, seed in zip(books, (1, 1, 2), strict=True):
        book.start_from(points, seed=seed)
    assert torch.equal(books[0].weight, books[1].weight)
    assert not torch.equal(books[0].weight, books[2].weight)


@pytest.mark.parametrize("method", ["kmeans", "sample"])
@pytest.mark.parametrize(
    "points",
    [torch.randn(5, 4, generator=_generator()), torch.ones(50, 4), torch.zeros(3, 4)],
    ids=["few", "equal", "zeros"],
)
def test_few_or_repeated_points_still_give_distinct_entries(method: str, points: Tensor) -> None:
    book = Codebook(20, 4)
    book.start_from(points, method=method)  # type: ignore[arg-type]
    weight = book.weight.detach()
    assert bool(torch.isfinite(weight).all())
    assert len({tuple(row) for row in weight.tolist()}) == 20
    assert float(torch.cdist(weight, points).amin(1).max()) < 0.2


def test_few_points_are_all_entries() -> None:
    points = torch.randn(5, 4, generator=_generator())
    book = Codebook(20, 4)
    book.start_from(points)
    assert torch.equal(book.weight[:5], points)


def test_points_are_checked() -> None:
    book = Codebook(3, 4)
    with pytest.raises(InputError, match=r"\(n, 4\).*\(10, 5\)"):
        book.start_from(torch.randn(10, 5))
    bad = torch.randn(10, 4)
    bad[2, 1] = math.nan
    with pytest.raises(NonFiniteError):
        book.start_from(bad)
    with pytest.raises(InputError, match="unknown start"):
        book.start_from(torch.randn(10, 4), method="mean")  # type: ignore[arg-type]


def test_revival_touches_only_the_dead() -> None:
    book = Codebook(6, 3)
    before = book.weight.detach().clone()
    book.count(torch.tensor([[0, 0, 0], [2, 2, 5]]))
    features = 100.0 + torch.randn(40, 3, generator=_generator())
    version = book.weight._version
    assert book.revive(features, 2, _generator()) == 4
    assert torch.equal(book.weight[[0, 2]], before[[0, 2]])
    rows = {tuple(row) for row in features.tolist()}
    assert all(tuple(row) in rows for row in book.weight[[1, 3, 4, 5]].tolist())
    assert int(book.counts.sum()) == 0
    assert book.weight._version > version, "a search must see that the entries moved"
    again = Codebook(6, 3)
    again.count(torch.tensor([0, 0, 0, 2, 2, 5]))
    again.revive(features, 2, _generator())
    assert torch.equal(again.weight, book.weight)


def test_revival_with_fewer_rows_than_dead_entries_keeps_them_apart() -> None:
    book = Codebook(30, 3)
    assert book.revive(torch.randn(2, 3, generator=_generator()), 1, _generator()) == 30
    assert len({tuple(row) for row in book.weight.tolist()}) == 30


def test_nothing_dead_nothing_moves() -> None:
    book = Codebook(2, 3)
    book.count(torch.tensor([0, 1]))
    before = book.weight.detach().clone()
    assert book.revive(torch.randn(4, 3), 1, _generator()) == 0
    assert torch.equal(book.weight, before)


def test_perplexity_and_dead_share() -> None:
    book = Codebook(8, 2)
    assert math.isnan(book.perplexity())
    assert book.dead_share() == 1.0
    book.count(torch.arange(4).repeat(5))
    assert book.perplexity() == pytest.approx(4.0)
    assert book.dead_share() == 0.5
    book.count(torch.zeros(100000, dtype=torch.int64))
    assert 1.0 < book.perplexity() < 1.01


def test_casts_move_the_codebook_but_do_not_round_it() -> None:
    book = Codebook(8, 2)
    before = book.checksum()
    model = torch.nn.Sequential(book, torch.nn.Linear(2, 2)).half().to(torch.bfloat16).double()
    assert model[1].weight.dtype == torch.float64
    assert book.weight.dtype == torch.float32
    assert book.counts.dtype == torch.int64
    assert book.checksum() == before
    assert book.to("meta").weight.is_meta


def test_checksum_sees_one_bit() -> None:
    book = Codebook(8, 2)
    before = book.checksum()
    with torch.no_grad():
        book.weight[3, 1] = torch.nextafter(book.weight[3, 1], torch.tensor(9.0))
    assert book.checksum() != before


def test_many_points_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans_module, "_POINTS_PER_CENTROID", 4)
    points, _ = _blobs()
    book = Codebook(12, 8)
    book.start_from(points)
    assert bool(torch.isfinite(book.weight).all())


FAR = """
import importlib.util
import torch
from vqguard.codebooks.codebook import Codebook
from vqguard.search import make_search
backends = ["torch", "pruned"] + ["faiss"] * (importlib.util.find_spec("faiss") is not None)
for scale in (1e18, 1e19, 1e30, 2e38):
    points = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)) * scale
    points = points.clamp(-3e38, 3e38)
    points[::3] = points[0]  # repeated rows too
    book = Codebook(24, 8)
    book.start_from(points)
    words = book.weight.detach()
    assert torch.isfinite(words).all(), scale
    assert words.unique(dim=0).shape[0] == 24, scale
    squares = (points.double()[:, None] - words.double()).square().sum(dim=2)
    for backend in backends:
        found = make_search(words, backend)
        assert torch.equal(found(points), squares.argmin(dim=1)), (scale, backend)
"""


def test_features_beyond_the_range_of_float32_squares_end_no_process() -> None:
    # in a process of its own: an error in faiss's threads ends it, whatever is caught
    run = subprocess.run([sys.executable, "-c", FAR], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-600:]
