"""Seeded k-means for the start of a codebook: faiss where it is installed, torch otherwise."""

from __future__ import annotations

import importlib
import importlib.util

import torch
from torch import Tensor

from vqguard.search.dense import DenseSearch

_POINTS_PER_CENTROID = 256  # more do not move the centroids (faiss's default)
_JITTER = 0.01


def kmeans(points: Tensor, centroids: int, seed: int, iterations: int = 20) -> Tensor:
    """Return `centroids` centres (P, d) float32 of finite float32 `points` (n, d), on their device.

    With no more points than centres the points themselves are the first centres and the rest are
    points drawn again. Every centre that repeats another, from there or from repeated points, is
    moved by seeded noise of 1 % of the points' spread: two equal codewords are one codeword.
    """
    generator = torch.Generator().manual_seed(seed)
    if points.shape[0] <= centroids:
        extra = torch.randint(points.shape[0], (centroids - points.shape[0],), generator=generator)
        centres = torch.cat([points, points[extra.to(points.device)]])
    else:
        limit = centroids * _POINTS_PER_CENTROID
        if points.shape[0] > limit:
            chosen = torch.randperm(points.shape[0], generator=generator)[:limit]
            points = points[chosen.to(points.device)]
        if importlib.util.find_spec("faiss") is not None and points.device.type == "cpu":
            centres = _faiss_kmeans(points, centroids, seed, iterations)
        else:
            centres = _torch_kmeans(points, centroids, generator, iterations)
    return separate(centres, points, generator)


def separate(centres: Tensor, points: Tensor, generator: torch.Generator) -> Tensor:
    """Move each row of `centres` (P, d) that repeats another by noise in the scale of `points`."""
    first = DenseSearch(centres).distinct()
    repeated = torch.ones(centres.shape[0], dtype=torch.bool)
    repeated[first.cpu()] = False
    if not bool(repeated.any()):
        return centres
    spread = points.std(dim=0, correction=0).mean()
    if float(spread) == 0.0:
        spread = points.abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
    noise = torch.randn(int(repeated.sum()), centres.shape[1], generator=generator)
    moved = centres.clone()
    where = repeated.to(centres.device)
    moved[where] += _JITTER * spread * noise.to(centres.device)
    return moved


def _faiss_kmeans(points: Tensor, centroids: int, seed: int, iterations: int) -> Tensor:
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


def _torch_kmeans(
    points: Tensor, centroids: int, generator: torch.Generator, iterations: int
) -> Tensor:
    """Lloyd's algorithm from random points; a centre without points takes the farthest point."""
    chosen = torch.randperm(points.shape[0], generator=generator)[:centroids]
    centres = points[chosen.to(points.device)].clone()
    search = DenseSearch(centres)
    for _ in range(iterations):
        search.refresh(centres)
        nearest = search(points)
        counts = torch.bincount(nearest, minlength=centroids)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = (counts == 0).nonzero().flatten()
        if empty.numel():
            farthest = (points - centres[nearest]).square().sum(dim=1).topk(empty.numel()).indices
            sums[empty] = points[farthest]
            counts[empty] = 1
        centres = sums / counts[:, None]
    return centres
