"""Where an image's visual tokens lie, and the regions of it that are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vqguard.errors import InputError
from vqguard.search.settle import tree_sum

Grid = tuple[int, int]
"""(rows, columns) of tokens that lie row by row."""
Layout = tuple[Grid, ...]
"""The grids of one image, one after another: one alone, or one for each tile or frame of it."""


class Region(NamedTuple):
    """A window of one of an image's grids, in tokens; the ends are excluded."""

    grid: int
    """Which of the image's grids: 0 where there is one alone."""
    top: int
    left: int
    bottom: int
    right: int
    rows: int
    """Rows of that grid."""
    columns: int
    """Columns of it."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(top, left, bottom, right) as shares of the grid's height and width, 0 to 1."""
        return (
            self.top / self.rows,
            self.left / self.columns,
            self.bottom / self.rows,
            self.right / self.columns,
        )


@dataclass(frozen=True)
class Windows:
    """Square windows of these sides in tokens, at every place of every grid of an image.

    A grid that is smaller than a side has one window of that scale, as large as it can be. An image
    of which no grid is known has a region for each token, and one that is the whole.
    """

    sides: tuple[int, ...]

    def count(self, layout: Layout | None, tokens: int) -> int:
        """How many regions an image of so many tokens has."""
        if layout is None:
            return tokens + 1
        return sum(
            down * across
            for rows, columns in layout
            for down, across in (self._places(side, rows, columns) for side in self.sides)
        )

    def region(self, layout: Layout, number: int) -> Region:
        """The region at this place among an image's regions, as `pool` orders them.

        Raises:
            InputError: where the image has fewer.
        """
        rest = number
        for place, (rows, columns) in enumerate(layout):
            for side in self.sides:
                down, across = self._places(side, rows, columns)
                if 0 <= rest < down * across:
                    top, left = divmod(rest, across)
                    bottom, right = top + min(side, rows), left + min(side, columns)
                    return Region(place, top, left, bottom, right, rows, columns)
                rest -= down * across
        raise InputError(f"expected the number of one of the image's regions, got {number}")

    def cells_under(self, layout: Layout, numbers: Sequence[int]) -> Tensor:
        """(N,) bool: which tokens lie under any of these regions, in every grid of the picture.

        All grids are taken to show the whole picture: a region of one covers its shares of the
        others, with every cell that it touches.

        Raises:
            InputError: for a region that the image does not have.
        """
        regions = [self.region(layout, number) for number in numbers]
        grids = []
        for rows, columns in layout:
            cells = torch.zeros(rows, columns, dtype=torch.bool)
            for region in regions:
                top, bottom = _touched(region.top, region.bottom, region.rows, rows)
                left, right = _touched(region.left, region.right, region.columns, columns)
                cells[top:bottom, left:right] = True
            grids.append(cells.flatten())
        return torch.cat(grids)

    def pool(self, features: Tensor, layout: Layout | None) -> Tensor:
        """Mean features (B, S, h) of the regions of images (B, N, h) that share a layout.

        Grid by grid, then scale by scale, then row by row. Sums are elementwise and in one order,
        so that an image's means are the same alone and in a batch, bit for bit.

        Raises:
            InputError: unless the grids hold N tokens.
        """
        if layout is None:
            total = tree_sum(features.transpose(1, 2).clone())
            return torch.cat([features, (total / features.shape[1])[:, None]], dim=1)
        require_layout(layout, features.shape[1])
        pooled, start = [], 0
        for rows, columns in layout:
            grid = features[:, start : start + rows * columns].unflatten(1, (rows, columns))
            start += rows * columns
            pooled += [self._means(grid, side).flatten(1, 2) for side in self.sides]
        return torch.cat(pooled, dim=1)

    def _means(self, grid: Tensor, side: int) -> Tensor:
        """(B, r, c, h): the means of all windows of a side in a grid (B, rows, columns, h)."""
        rows, columns = grid.shape[1:3]
        height, width = min(side, rows), min(side, columns)
        down, across = self._places(side, rows, columns)
        total = torch.zeros_like(grid[:, :down, :across])
        for top in range(height):
            for left in range(width):
                total = total + grid[:, top : top + down, left : left + across]
        return total / (height * width)

    @staticmethod
    def _places(side: int, rows: int, columns: int) -> tuple[int, int]:
        """How many places a window has from top to bottom, and from left to right."""
        return rows - min(side, rows) + 1, columns - min(side, columns) + 1


def _touched(start: int, end: int, steps: int, cells: int) -> tuple[int, int]:
    """Which of `cells` equal cells are touched by the steps from `start` to `end` of `steps`."""
    return start * cells // steps, -(-end * cells // steps)


def grid_of(tokens: int, height: int, width: int) -> Grid | None:
    """(rows, columns) of a grid of so many tokens with the image's proportions, if there is one."""
    rows = round((tokens * height / width) ** 0.5)
    if tokens < 1 or rows < 1 or tokens % rows:
        return None
    columns = tokens // rows
    # a cell may be cut at the border, so the proportions fit only to within one cell
    fits = abs(columns - rows * width / height) < 1
    return (rows, columns) if fits else None


def holds(layout: Layout, tokens: int) -> bool:
    """Whether the grids hold so many tokens, at least one each."""
    held = sum(rows * columns for rows, columns in layout)
    return held == tokens and all(min(grid) > 0 for grid in layout)


def require_layout(layout: Layout, tokens: int) -> None:
    """Raise InputError unless the grids hold so many tokens, at least one each."""
    if not holds(layout, tokens):
        raise InputError(
            f"an image of {tokens} visual tokens cannot lie on grids of {list(layout)} rows and"
            " columns"
        )


def layouts_of(
    counts: Sequence[int], layouts: Sequence[Layout | None] | None
) -> list[Layout | None]:
    """One layout an image, checked against its `counts` of tokens; None where none is known.

    Raises:
        InputError: unless there is one for each image, which holds its tokens.
    """
    if layouts is None:
        return [None] * len(counts)
    if len(layouts) != len(counts):
        raise InputError(f"{len(counts)} images but {len(layouts)} layouts of their tokens")
    for count, layout in zip(counts, layouts, strict=True):
        if layout is not None:
            require_layout(layout, count)
    return list(layouts)
