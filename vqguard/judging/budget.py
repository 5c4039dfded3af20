"""Which thresholds of a cell table keep a false-positive budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vqguard.judging.cell_table import CellTable
from vqguard.judging.conformal import conformal_thresholds
from vqguard.judging.settings import Unfamiliar
from vqguard.judging.thresholds import FalsePositives

ALL_CATEGORIES = "all categories"
"""What messages call the one threshold of all."""


def choose_thresholds(
    table: CellTable,
    codes: Tensor,
    mask: Tensor,
    *,
    budget: float,
    groups: Mapping[str, Sequence[int]] | None,
    shares: Mapping[str, float],
) -> tuple[dict[str, float], FalsePositives]:
    """By group of categories (columns of the table) its threshold, and what was measured.

    `codes` (n, S) and `mask` (n, S) of held-out neutral images, as `require_codes` gives them;
    `groups` None: one threshold, by the rule's own image score. The rest, and what is raised, as
    `conformal_thresholds`.
    """
    # what an image scores whose tokens all lie in one cell: above it nothing is flagged
    filled = torch.arange(len(table.scores))[:, None].expand(-1, codes.shape[1])
    every = torch.ones_like(filled, dtype=torch.bool)
    scored = table.without_fixed_cells()
    if groups is None:
        names = [ALL_CATEGORIES]
        scores = table.image_scores(codes, mask)[:, None]
        highest = scored.image_scores(filled, every).amax(dim=0, keepdim=True)
    else:
        names = list(groups)
        unseen = (table.unseen[codes] & mask).any(dim=1, keepdim=True)
        images = table.category_images(codes, mask).masked_fill(unseen, math.inf)
        cells = scored.category_images(filled, every).amax(dim=0)
        scores = torch.stack([images[:, own].amax(dim=1) for own in groups.values()], dim=1)
        highest = torch.stack([cells[own].amax() for own in groups.values()])
    chosen, measured = conformal_thresholds(
        scores,
        budget,
        highest=highest.tolist(),
        names=names,
        shares=[shares.get(name, 1.0) for name in names],
    )
    return dict(zip(names, chosen, strict=True)), measured


def choose_distance(far: Tensor, budget: float) -> Unfamiliar:
    """From which distance on an image is unfamiliar.

    `far` (n,) float64: of each calibration image what is compared with it. Raises as
    `conformal_thresholds`.
    """
    [distance], measured = conformal_thresholds(
        far[:, None],
        budget,
        highest=[math.inf],
        names=["the distance"],
        images="calibration images",
    )
    return Unfamiliar(distance, budget, measured.flagged, measured.n, measured.low, measured.high)
