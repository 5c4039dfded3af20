"""Seeded k-means for the start of a codebook, over data that may be larger than memory.

Lloyd's algorithm in passes over chunks: sums and counts are exact (float64, int64), so that chunks
and processes change the result by the rounding of a float64 sum at most. Each point goes to its
nearest centre, exactly, ties to the lowest index; those of a large codebook are found by the pruned
search, which is several times as fast as faiss there. faiss does the work where it is installed,
the points are one tensor of one process, and the codebook is small.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from vqguard.distributed import Best, shared_sample, shared_sum
from vqguard.search import CodewordSearch
from vqguard.search.dense import DenseSearch
from vqguard.search.pruned import PrunedSearch

_POINTS_PER_CENTROID = 256  # more do not move the centroids (faiss's default)
_JITTER = 0.01
_FARTHEST = 512  # points remembered for centres that lost all theirs
_CHUNK = 16384
_FAISS_RANGE = 2.0**126  # of squared distances in float32; beyond, faiss aborts the process
_WORTH_A_BOUND = 2**21  # elements of a codebook that is searched faster by the pruned search


def kmeans(points: Tensor, centroids: int, seed: int, iterations: int = 20) -> Tensor:
    """Return `centroids` centres (P, d) float32 of finite float32 `points` (n, d), on their device.

    With no more points than centres the points themselves are the first centres and the rest are
    points drawn again. Every centre that repeats another, from there or from repeated points, is
    moved by seeded noise of 1 % of the points' spread: two equal codewords are one codeword.
    """
    generator = torch.Generator().manual_seed(seed)
    if points.shape[0] <= centroids:
        return separate(repeat_rows(points, centroids, generator), points, generator)
    limit = centroids * _POINTS_PER_CENTROID
    if points.shape[0] > limit:
        chosen = torch.randperm(points.shape[0], generator=generator)[:limit]
        points = points[chosen.to(points.device)]
    if not _bound_pays(centroids, points) and _faiss_can(points):
        centres = _faiss_kmeans(points, centroids, seed, iterations)
        return separate(centres, points, generator)
    return streamed_kmeans(lambda: points.split(_CHUNK), points, centroids, seed, iterations)


def streamed_kmeans(
    passes: Callable[[], Iterable[Tensor]],
    like: Tensor,
    centroids: int,
    seed: int,
    iterations: int = 20,
) -> Tensor:
    """The same over chunks: each call of `passes` gives finite float32 chunks (n_i, d) once more.

    Memory: one chunk, the centres and their float64 sums. Where torch.distributed is initialised,
    every process gives its own share of the data, calls this with the same seed, and gets the same
    centres. `like` is any tensor of the wanted width and device.

    Raises:
        InputError: without rows.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = shared_sample(passes(), centroids, generator, like)
    centres = repeat_rows(drawn, centroids, generator)
    if drawn.shape[0] == centroids:
        for _ in range(iterations):
            centres = _lloyd(passes(), centres)
    return separate(centres, drawn, generator)


def _lloyd(chunks: Iterable[Tensor], centres: Tensor) -> Tensor:
    """One pass; a centre without points takes one of the points farthest from theirs."""
    search = _search(centres)
    sums = torch.zeros(centres.shape, dtype=torch.float64, device=centres.device)
    counts = torch.zeros(centres.shape[0], dtype=torch.int64, device=centres.device)
    farthest = Best(min(_FARTHEST, centres.shape[0]), centres.shape[1], centres.device)
    for points in chunks:
        nearest = search(points)
        counts += torch.bincount(nearest, minlength=counts.shape[0])
        sums.index_add_(0, nearest, points.double())
        farthest.show((points.double() - centres[nearest]).square().sum(dim=1), points)
    sums, counts = shared_sum(sums), shared_sum(counts)
    spare = farthest.shared()
    moved = torch.where(counts[:, None] > 0, sums / counts[:, None], centres.double()).float()
    empty = (counts == 0).nonzero().flatten()[: spare.shape[0]]
    moved[empty] = spare[: empty.numel()]
    return moved


def _search(centres: Tensor) -> CodewordSearch:
    return PrunedSearch(centres) if _bound_pays(len(centres), centres) else DenseSearch(centres)


def _bound_pays(centroids: int, like: Tensor) -> bool:
    """Whether so many centres, of the width and on the device of `like`, have a pruned search."""
    large = centroids * like.shape[1] >= _WORTH_A_BOUND and like.device.type == "cpu"
    return large and PrunedSearch.problem() is None


def repeat_rows(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` rows: those given first, then some of them drawn again where they are too few."""
    if rows.shape[0] >= count:
        return rows[:count].clone()
    extra = torch.randint(rows.shape[0], (count - rows.shape[0],), generator=generator)
    return torch.cat([rows, rows[extra.to(rows.device)]])


def separate(centres: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """Move each row of `centres` (P, d) that repeats another by noise in the scale of `points`."""
    first = DenseSearch(centres).distinct()
    repeated = torch.ones(centres.shape[0], dtype=torch.bool)
    repeated[first.cpu()] = False
    if not bool(repeated.any()):
        return centres
    spread = points.std(dim=0, correction=0).mean()
    if not bool(torch.isfinite(spread)):  # the squares are beyond float32
        spread = points.double().std(dim=0, correction=0).mean().float()
    if float(spread) == 0.0:
        spread = points.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
    noise = torch.randn(int(repeated.sum()), centres.shape[1], generator=generator)
    moved = centres.clone()
    where = repeated.to(centres.device)
    moved[where] += _JITTER * spread * noise.to(centres.device)
    largest = torch.finfo(torch.float32).max
    return moved.clamp(-largest, largest)


def _faiss_can(points: Tensor) -> bool:
    """Whether faiss is here and can take these points; no error of its threads can be caught."""
    if importlib.util.find_spec("faiss") is None or points.device.type != "cpu":
        return False
    low, high = (float(extreme) for extreme in torch.aminmax(points))
    return points.shape[1] * (2.0 * max(-low, high)) ** 2 < _FAISS_RANGE


def _faiss_kmeans(points: Tensor, centroids: int, seed: int, iterations: int) -> Tensor:
    # keeps faiss, an optional package, out of start-up
    faiss = importlib.import_module("faiss")
    run = faiss.Kmeans(
        points.shape[1],
        centroids,
        niter=iterations,
        seed=seed % 2**31,
        min_points_per_centroid=1,
        max_points_per_centroid=_POINTS_PER_CENTROID,
    )
    run.train(points.numpy())
    return torch.from_numpy(run.centroids.reshape(centroids, points.shape[1]).copy())
