"""How many frames a video's tokens hold: processors tell it in one of three ways.

Read from the processors and `get_video_features` of transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

GRIDS = ("video_grid_thw", "video_grids")
"""(videos, 3): slices in time, rows, columns. The first are Qwen's and its followers', the second
Molmo 2's."""


def frames_of_videos(
    pixels: str, arguments: Mapping[str, Any], merged: int = 1
) -> list[int] | None:
    """Frames, or slices in time, of each video; None where the arguments do not tell.

    `pixels`: the argument that holds them, (videos, frames, C, H, W) where nothing else is given.
    `merged`: how many slices the family makes one (Ernie 4.5 VL).
    """
    for name in GRIDS:
        grid = arguments.get(name)
        if isinstance(grid, Tensor):
            return [max(int(slices) // merged, 1) for slices in grid[:, 0].tolist()]
    counts = arguments.get("num_frames_per_video")
    if counts is not None:
        return [int(count) for count in counts]
    shown = arguments.get(pixels)
    if isinstance(shown, Tensor) and shown.dim() == 5:
        return [shown.shape[1]] * len(shown)
    return None
