"""What an adapter is shown of a call, and what it gives: features, global tokens, taps, frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vqguard.adapters.seams import Seam, stack_if_even
from vqguard.judging.verdict import Part
from vqguard.regional.layout import Layout

Site = Literal["projected", "encoder"]
GRIDS = ("video_grid_thw", "video_grids")
"""(videos, 3): slices in time, rows, columns. The first are Qwen's and its followers', the second
Molmo 2's."""


@dataclass(frozen=True)
class VisualFeatures:
    """Unquantised features of a batch of images, at one site; static positions left out.

    `tokens` (B, N, d) when every image has as many tokens, otherwise a list of (N_i, d).
    `semantic` (B, S, d_s): the global tokens that are judged, S = 1 as in the paper.
    `deep`: deep-stack features, for each level what `tokens` is.
    `semantic_mask` (B, S) bool: True for an image's own global tokens, where some images have fewer
    than others; None: all are their own.
    `layouts`: where each image's tokens lie, for the regional judge; None, or None for an image:
    not known. `parts`: what the grids of each image show; None: not known.
    Features have the model's floating dtype and carry gradients.
    """

    tokens: Tensor | list[Tensor]
    semantic: Tensor
    deep: tuple[Tensor | list[Tensor], ...] = field(default=())
    semantic_mask: Tensor | None = None
    layouts: tuple[Layout | None, ...] | None = None
    parts: tuple[Part, ...] | None = None

    @classmethod
    def of_units(
        cls,
        units: list[Tensor],
        semantic: Tensor | Sequence[Tensor],
        deep: Sequence[list[Tensor]] = (),
        layouts: Sequence[Layout | None] | None = None,
        parts: Sequence[Part] | None = None,
    ) -> VisualFeatures:
        """From (N_i, d) a unit, its global tokens (S_i, d_s) and (N_i, d) a unit of each level."""
        padded, mask = pad_semantic(semantic)
        levels = tuple(stack_if_even(level) for level in deep)
        known = None if layouts is None else tuple(layouts)
        shown = None if parts is None else tuple(parts)
        return cls(stack_if_even(units), padded, levels, mask, known, shown)

    @property
    def semantic_units(self) -> list[Tensor]:
        """(S_i, d_s): the global tokens of each image without padding."""
        if self.semantic_mask is None:
            return list(self.semantic)
        return [unit[own] for unit, own in zip(self.semantic, self.semantic_mask, strict=True)]

    @property
    def unit_layouts(self) -> list[Layout | None]:
        """Where the tokens of each image lie; None where that is not known."""
        return [None] * len(self.tokens) if self.layouts is None else list(self.layouts)

    @property
    def unit_parts(self) -> list[Part]:
        """What the grids of each image show; "grid" where that is not known."""
        return ["grid"] * len(self.tokens) if self.parts is None else list(self.parts)

    @property
    def counts(self) -> list[int]:
        """Visual tokens of each image, in order."""
        return [len(image) for image in self.tokens]


@dataclass(frozen=True)
class Tap:
    """A module whose *input* is quantised at site "encoder".

    `path` from the top of the model; `argument`: the keyword that holds the features, "" for the
    first argument; `level`: the deep-stack level, None for the patch level.
    """

    path: str
    argument: str = ""
    level: int | None = None


@dataclass(frozen=True)
class Shown:
    """One batch of images on its way through a seam: what a global token is read from.

    `units`: for each image its visual tokens (N_i, d) at `site`, static positions left out.
    `output`: what the tower returned; None where the tap lies inside the tower, the seam's own
    output where there is no tower to watch. `arguments`: what the encoder was given; empty where
    a seam inside `forward` was reached without them.
    """

    model: nn.Module
    seam: Seam
    site: Site
    units: Sequence[Tensor]
    output: Any
    arguments: Mapping[str, Any]


def pad_semantic(tokens: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """(B, S, d_s) and the mask (B, S) bool from (S_i, d_s) for each image; codes (S_i,) likewise.

    Zeros stand where an image has fewer tokens than another; where none has, the mask is None.
    """
    if isinstance(tokens, Tensor):
        return tokens, None
    lengths = [len(image) for image in tokens]
    if len(set(lengths)) == 1:
        return torch.stack(list(tokens)), None
    places = torch.arange(max(lengths))
    mask = places < torch.tensor(lengths)[:, None]
    return pad_sequence(list(tokens), batch_first=True), mask.to(tokens[0].device)


def frames_of_videos(
    pixels: Any, arguments: Mapping[str, Any], merged: int = 1
) -> list[int] | None:
    """Frames, or slices in time, of each video; None where the arguments do not tell.

    Processors tell it in one of three ways, read from those of transformers 5.24 and from
    `get_video_features`.

    `pixels`: (videos, frames, C, H, W) where nothing else is given.
    `merged`: how many slices the family makes one (Ernie 4.5 VL).
    """
    for name in GRIDS:
        grid = arguments.get(name)
        if isinstance(grid, Tensor):
            return [max(int(slices) // merged, 1) for slices in grid[:, 0].tolist()]
    counts = arguments.get("num_frames_per_video")
    if counts is not None:
        return [int(count) for count in counts]
    if isinstance(pixels, Tensor) and pixels.dim() == 5:
        return [pixels.shape[1]] * len(pixels)
    return None
