"""Videos that come from outside: which frames of one are taken, and how far one is read."""

from vqguard.videos.limits import FRAMES, MAX_SAMPLED
from vqguard.videos.opening import (
    ENDINGS,
    Clip,
    ClipSize,
    check_clip,
    decode_clip,
    open_video,
    sampled,
)

__all__ = [
    "ENDINGS",
    "FRAMES",
    "MAX_SAMPLED",
    "Clip",
    "ClipSize",
    "check_clip",
    "decode_clip",
    "open_video",
    "sampled",
]
