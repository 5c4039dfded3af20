"""Evidence about semantic cells: counted images, and the probabilities that follow from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vqguard.errors import InputError

NEUTRAL = "neutral"
"""Category of images that are not refused."""
Labels = Sequence[str | Sequence[str]]
"""One label an image, or several."""
CountOf = Literal["tokens", "images"]
Prior = Literal["counts", "balanced"]


class Counted(NamedTuple):
    """Labelled images, counted by cell."""

    counts: Tensor
    """(K, C + 1) int64 per cell and category, the last column neutral. An image of several
    categories counts under each."""
    toxic: Tensor | None
    """(K,) int64 per cell, every toxic image once; None where no image has several categories."""


def label_columns(labels: Labels, categories: Sequence[str]) -> Tensor:
    """(n, C + 1) bool: which categories an image has, the last column neutral.

    Raises:
        InputError: for labels that are no category, an image without one, and one that is neutral
            and toxic at once.
    """
    columns = {name: column for column, name in enumerate((*categories, NEUTRAL))}
    each = [(label,) if isinstance(label, str) else tuple(label) for label in labels]
    unknown = sorted({name for names in each for name in names} - columns.keys())
    if unknown:
        raise InputError(f"labels {unknown} are not among the categories {tuple(categories)}")
    marks = torch.zeros(len(each), len(columns), dtype=torch.bool)
    for row, names in enumerate(each):
        if not names or (NEUTRAL in names and len(set(names)) > 1):
            raise InputError(
                f"image {row} has the labels {list(names)}: give each image {NEUTRAL!r} alone, or"
                " one or more toxic categories"
            )
        marks[row, [columns[name] for name in names]] = True
    return marks


def count_images(
    codes: Tensor, mask: Tensor, marks: Tensor, cells: int, count: CountOf = "tokens"
) -> Counted:
    """Count the real tokens of codes (n, S) int64 under their images' categories.

    `mask` (n, S) bool, `marks` (n, C + 1) bool as `label_columns` gives them. "tokens": every token
    counts. "images": an image counts once in each cell that it has a token in, so that a cell that
    one image fills is still seen once.

    Raises:
        InputError: for other codes, and codes beyond the `cells`.
    """
    if codes.dtype != torch.int64 or not bool((codes[mask] >= 0).all()):
        raise InputError("semantic codes must be int64 and not negative")
    if bool(mask.any()) and int(codes[mask].max()) >= cells:
        raise InputError(
            f"semantic code {int(codes[mask].max())} does not fit a codebook of {cells}"
        )
    rows, seen = torch.arange(len(codes))[:, None].expand_as(codes)[mask], codes[mask]
    if count == "images":
        rows, seen = torch.stack([rows, seen], dim=1).unique(dim=0).unbind(dim=1)
    width = marks.shape[1]
    image, column = marks[rows].nonzero(as_tuple=True)
    counts = torch.bincount(seen[image] * width + column, minlength=cells * width)
    toxic = None
    if bool((marks.sum(dim=1) > 1).any()):
        toxic = torch.bincount(seen[marks[rows, :-1].any(dim=1)], minlength=cells)
    return Counted(counts.reshape(cells, width), toxic)


def held_out_half(neutral: Tensor, seed: int) -> Tensor:
    """(m,) int64: a seeded half of the images that are `neutral` (n,) bool, rounded down.

    They are not counted: they choose the threshold of a budget.
    """
    members = neutral.nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    return members[torch.randperm(len(members), generator=generator)][: len(members) // 2]


def probabilities(
    counts: Tensor,
    prior: Prior,
    smoothing: float = 0.0,
    toxic: Tensor | None = None,
    learned: Tensor | None = None,
) -> Tensor:
    """P(c|k): float64 (K, C + 1), last column neutral; a row of zeros for an empty cell.

    P(c|k) is the share of a cell's images that category c has, under "balanced" as if every
    category had as many images. Smoothed it is the mean of a Dirichlet posterior,
    (n_k share + s pi_c) / (n_k + s) with n_k images in the cell, s = `smoothing` and a prior mean
    pi: for "counts" the categories' shares of all images, for "balanced" 1/2 neutral and 1 / (2 C)
    for each toxic one; `learned` (K, C + 1) gives each cell its own, an empty one too. Source: A.
    Gelman et al., "Bayesian Data Analysis", 3rd ed., 3.4.

    `counts` (K, C + 1) of any dtype; `toxic` as in `Counted`: where an image has several categories
    the toxic columns of a row add up to more than 1.
    """
    shares = counts.double()
    if prior == "balanced":
        shares = shares / shares.sum(dim=0).clamp_min(1.0)
    tiny = torch.finfo(torch.float64).tiny
    mass, images = shares.sum(dim=1), counts.double().sum(dim=1)
    if toxic is not None:
        # an image of several categories is one image
        labels = images - counts[:, -1].double()
        mass = shares[:, :-1].sum(dim=1) * toxic / labels.clamp_min(tiny) + shares[:, -1]
        images = images - labels + toxic
    shares = shares / mass.clamp_min(tiny)[:, None]
    if smoothing == 0.0:
        return shares
    width = counts.shape[1]
    if learned is not None:
        mean = learned.double()
    elif prior == "balanced":
        mean = torch.full((width,), 0.5 / (width - 1), dtype=torch.float64)
        mean[-1] = 0.5
    else:
        mean = counts.double().sum(dim=0) / images.sum().clamp_min(tiny)
    weighted = (images[:, None] * shares + smoothing * mean) / (images[:, None] + smoothing)
    return torch.where(((images > 0) | (learned is not None))[:, None], weighted, 0.0)
