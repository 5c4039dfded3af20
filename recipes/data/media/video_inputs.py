"""Videos in the form that processors take them, in training as in inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vqguard.errors import DataError
from vqguard.videos import Clip

_UNIT = 1000
"""Frames are numbered in milliseconds, so that a processor writes the true time of each."""


def video_token_id(processor: Any) -> int | None:
    """The id of a video's placeholder in the text; None where the processor takes no videos."""
    token = getattr(processor, "video_token", None)
    if token is None or getattr(processor, "video_processor", None) is None:
        return None
    return int(processor.tokenizer.convert_tokens_to_ids(str(token)))


def require_videos(processor: Any, name: str) -> None:
    """Raise `DataError` for a processor that takes no videos."""
    if video_token_id(processor) is None:
        raise DataError(
            f"{name}: has a video, and {type(processor).__name__} takes none. Leave it out, or take"
            " a family that does (qwen2-vl, qwen2.5-vl, qwen3-vl, llava-onevision)."
        )


def video_inputs(clips: Sequence[Clip]) -> dict[str, Any]:
    """The processor's arguments for videos whose frames were chosen already.

    The frames are (T, 3, H, W) uint8. Their times go with them: Qwen2.5-VL places them by these,
    Qwen3-VL writes them into the text.
    """
    return {
        "videos": [torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips],
        "video_metadata": [
            {
                "total_num_frames": max(1, round(clip.duration * _UNIT)),
                "fps": float(_UNIT),
                "width": clip.frames.shape[2],
                "height": clip.frames.shape[1],
                "duration": clip.duration,
                "frames_indices": [round(second * _UNIT) for second in clip.seconds],
            }
            for clip in clips
        ],
        "do_sample_frames": False,
    }
