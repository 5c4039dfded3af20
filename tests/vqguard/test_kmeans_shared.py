"""Codebooks from data in chunks, and from data that two processes share."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vqguard.codebooks.codebook import Codebook
from vqguard.codebooks.kmeans import _lloyd, streamed_kmeans
from vqguard.distributed import Best, shared_sample
from vqguard.errors import InputError, NonFiniteError


def _points(n: int = 900, dim: int = 6) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return 5.0 * torch.randn(12, dim, generator=g).repeat(n // 12, 1) + torch.randn(
        n, dim, generator=g
    )


class _Chunks:
    """Chunks that are made anew in every pass, and remember the largest that was alive."""

    def __init__(self, points: Tensor, size: int) -> None:
        self.points, self.size, self.passes = points, size, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for start in range(0, len(self.points), self.size):
            yield self.points[start : start + self.size].clone()


@pytest.mark.parametrize("size", [7, 100, 900])
def test_one_pass_over_chunks_is_one_step_of_lloyd(size: int) -> None:
    points = _points()
    centres = points[:12].clone()
    nearest = torch.cdist(points.double(), centres.double()).argmin(1)
    expected = torch.stack([points[nearest == k].double().mean(0) for k in range(12)])
    found = _lloyd(points.split(size), centres)
    assert torch.allclose(found.double(), expected, rtol=1e-6)


def test_a_centre_that_lost_its_points_takes_the_farthest() -> None:
    points = torch.cat([torch.zeros(50, 2), torch.tensor([[30.0, 0.0]])])
    centres = torch.tensor([[1.0, 0.0], [-900.0, 0.0]])
    moved = _lloyd([points], centres)
    assert moved[1].tolist() == [30.0, 0.0]


def test_streamed_start_lowers_the_error_and_reads_in_passes() -> None:
    points = _points()
    chunks = _Chunks(points, 64)
    book = Codebook(24, 6)
    book.start_from(chunks, iterations=5)
    assert chunks.passes == 6, "one to draw, five to move"
    by_sample = Codebook(24, 6)
    by_sample.start_from(chunks, method="sample")
    errors = [
        float(torch.cdist(points, one.weight.detach()).amin(1).square().mean())
        for one in (book, by_sample)
    ]
    assert errors[0] < 0.8 * errors[1]
    again = Codebook(24, 6)
    again.start_from(_Chunks(points, 64), iterations=5)
    assert torch.equal(again.weight, book.weight)


def test_revival_reads_chunks() -> None:
    book = Codebook(8, 6)
    book.count(torch.tensor([0, 1]))
    rows = _points()
    assert book.revive(_Chunks(rows, 50), 1, torch.Generator().manual_seed(0)) == 6
    known = {tuple(row) for row in rows.tolist()}
    assert all(tuple(row) in known for row in book.weight[2:].tolist())


def test_a_sample_is_uniform_and_without_repeats() -> None:
    counts = torch.zeros(40)
    for seed in range(600):
        rows = torch.arange(40.0)[:, None]
        drawn = shared_sample(rows.split(7), 10, torch.Generator().manual_seed(seed), rows)
        assert len(set(drawn.flatten().tolist())) == 10
        counts[drawn.flatten().long()] += 1
    assert float(((counts - 150) ** 2 / 150).sum()) < 75, "chi-squared, 39 degrees of freedom"


def test_best_keeps_the_largest_keys() -> None:
    best = Best(3, 1, torch.device("cpu"))
    for chunk in torch.arange(20.0).split(6):
        best.show(chunk.double(), chunk[:, None])
    assert best.shared().flatten().tolist() == [19.0, 18.0, 17.0]


def test_what_cannot_be_used() -> None:
    book = Codebook(4, 6)
    with pytest.raises(InputError, match="iterator"):
        book.start_from(iter([_points()]))
    with pytest.raises(InputError, match="chunk 1"):
        book.start_from([_points(), torch.zeros(3, 5)])
    with pytest.raises(NonFiniteError, match="chunk 0"):
        book.start_from([torch.full((3, 6), torch.inf)])
    with pytest.raises(InputError, match="at least one row"):
        book.start_from([])
    with pytest.raises(InputError, match="at least one row"):
        streamed_kmeans(lambda: [], torch.zeros(1, 6), 4, 0)


_PROGRAM = """
import sys
from pathlib import Path
import torch
from torch import distributed as dist
from vqguard.codebooks.codebook import Codebook

rank, store, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
try:
    points = torch.load(folder / "points.pt", weights_only=True)
    own = points[:700] if rank == 0 else points[700:]  # shares of different size
    book = Codebook(16, 6)
    book.start_from(list(own.split(90)), iterations=4)
    started = book.weight.detach().clone()
    tensor = Codebook(16, 6)
    tensor.start_from(own, iterations=4)
    book.count(torch.arange(8) if rank == 0 else torch.arange(4, 12))
    shared = book.shared_counts()
    revived = book.revive(own, 1, torch.Generator().manual_seed(3))
    found = {"started": started, "tensor": tensor.weight.detach(), "shared": shared,
             "revived": torch.tensor(revived), "after": book.weight.detach(),
             "counts": book.counts}
    torch.save(found, folder / f"found{rank}.pt")
finally:
    dist.destroy_process_group()
"""


@pytest.mark.alone
def test_two_processes_get_one_codebook(tmp_path: Path) -> None:
    points = _points()
    torch.save(points, tmp_path / "points.pt")
    (tmp_path / "program.py").write_text(_PROGRAM)
    runs = [
        subprocess.Popen(
            [sys.executable, tmp_path / "program.py", str(rank), tmp_path / "store", tmp_path],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for run in runs:
        _, errors = run.communicate(timeout=240)
        assert run.returncode == 0, errors
    one, two = (torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in range(2))
    for name in one:
        assert torch.equal(one[name], two[name]), name
    assert one["shared"].tolist() == [1] * 4 + [2] * 4 + [1] * 4 + [0] * 4
    assert int(one["revived"]) == 4
    assert int(one["counts"].sum()) == 0
    known = {tuple(row) for row in points.tolist()}
    assert all(tuple(row) in known for row in one["after"][12:].tolist())
    assert torch.equal(one["started"], one["tensor"])
    # as good as one process with all the data
    alone = Codebook(16, 6)
    alone.start_from(list(points.split(90)), iterations=4)
    errors_ = [
        float(torch.cdist(points, weight).amin(1).square().mean())
        for weight in (one["started"], alone.weight.detach())
    ]
    assert errors_[0] < 1.2 * errors_[1]
    # one step from the same centres moves them to the same places, by the same sums
    assert torch.allclose(
        _lloyd([points], alone.weight.detach()), _lloyd(points.split(9), alone.weight.detach())
    )
