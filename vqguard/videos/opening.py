"""Opening videos that come from outside: limits, which frames are taken, orientation.

A model is shown `frames` frames, evenly spread from the first to the last, in training as in
inference. Nothing else of a video is seen, so nothing else is judged. Of the file FFmpeg's readers
of MP4, Matroska, WebM and AVI are let near, by `av`, and no playlist that names other files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vqguard.bounded import open_regular
from vqguard.errors import ConfigError, VideoError, first_line
from vqguard.images import MIN_SIDE
from vqguard.images.opening import MAX_ASPECT
from vqguard.videos.limits import (
    FRAMES,
    MAX_CLIP_PIXELS,
    MAX_DECODED_PIXELS,
    MAX_FILE,
    MAX_FRAME_PIXELS,
    MAX_FRAMES,
    MAX_SAMPLED,
    MAX_SECONDS,
)

ENDINGS = frozenset("mp4 m4v mov mkv webm avi".split())
"""Endings of the videos that are read; what is in a file decides, not its name."""
_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
_OPTIONS = {
    "format_whitelist": _CONTAINERS,
    "protocol_whitelist": "none",
    "max_pixels": str(MAX_FRAME_PIXELS),
}
_MARGIN = 2**20
"""Pixels that a frame may have beyond what the file says: codecs fill up their blocks."""


class ClipSize(NamedTuple):
    """What a model is shown of a video."""

    frames: int
    width: int
    height: int
    """In pixels, as the file has them: a player may turn them."""
    sound: bool = False
    """Whether there is sound, which is not read."""


@dataclass(frozen=True)
class Clip:
    """The frames that are taken of a video."""

    frames: NDArray[np.uint8]
    """(T, H, W, 3), RGB, turned as the file asks for."""
    seconds: tuple[float, ...]
    """When each is shown, from the video's beginning."""
    duration: float
    """Seconds from the first frame to behind the last."""


class _Place(NamedTuple):
    """A frame before it is decoded."""

    time: int
    """In the stream's unit."""
    key: bool
    """Whether it can be decoded by itself."""


def sampled(total: int, frames: int) -> list[int]:
    """Which of `total` frames are taken: `frames` of them, evenly spread, the ends among them.

    Where there are fewer, some are taken more than once: every video of a batch has as many.
    """
    return [int(place) for place in np.linspace(0, total - 1, frames).round()]


def open_video(path: Path | str, frames: int = FRAMES) -> Clip:
    """The frames of a video file that a model is shown.

    Args:
        path: MP4, Matroska, WebM or AVI; its content decides, not its name.
        frames: how many.

    Raises:
        VideoError: naming the file, what is wrong and what to do: missing, no video of these,
            cut off, or beyond a limit of `vqguard.videos.limits`.
        ConfigError: `av` is not installed, or a number of frames that is not taken.
    """
    try:
        stream = open_regular(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"cannot read the video {path}: {reason}") from error
    with stream:
        return decode_clip(stream, path, frames)


def check_clip(stream: BinaryIO, name: object, frames: int = FRAMES) -> ClipSize:
    """What a model would be shown of a video, from its packets: nothing is decoded.

    Raises:
        VideoError, ConfigError: as `open_video`.
    """
    with _opened(stream, name, frames) as (container, video):
        _checked_places(name, container, video, frames)
        sound = bool(container.streams.audio)
        return ClipSize(frames, video.codec_context.width, video.codec_context.height, sound)


def decode_clip(stream: BinaryIO, name: object, frames: int = FRAMES) -> Clip:
    """The frames of a video that a model is shown.

    Raises:
        VideoError, ConfigError: as `open_video`.
    """
    with _opened(stream, name, frames) as (container, video):
        places = _checked_places(name, container, video, frames)
        chosen = sampled(len(places), frames)
        pictures = dict(
            zip(sorted(set(chosen)), _decoded(name, container, video, places, chosen), strict=True)
        )
    shapes = {picture.shape for picture in pictures.values()}
    if len(shapes) > 1:
        raise VideoError(f"{name}: its frames are not of one size; encode it again")
    unit, first = float(video.time_base), places[0].time
    seconds = tuple((places[number].time - first) * unit for number in chosen)
    each = (places[-1].time - first) / max(1, len(places) - 1)
    duration = (places[-1].time - first + each) * unit
    return Clip(np.stack([pictures[number] for number in chosen]), seconds, duration)


@contextmanager
def _opened(stream: BinaryIO, name: object, frames: int) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream; whatever goes wrong inside is a `VideoError`."""
    if not 1 <= frames <= MAX_SAMPLED:
        raise ConfigError(f"expected 1 to {MAX_SAMPLED} frames of a video, got {frames}")
    av = _library()
    size = stream.seek(0, 2)
    stream.seek(0)
    if size > MAX_FILE:
        raise VideoError(f"{name}: has {size:,} bytes, at most {MAX_FILE:,} are read; cut it")
    try:
        with warnings.catch_warnings(), av.open(stream, options=_OPTIONS) as container:
            if not container.streams.video:
                raise VideoError(f"{name}: has no video in it")
            video = container.streams.video[0]
            width, height = video.codec_context.width, video.codec_context.height
            _check_size(name, width, height, frames)
            video.codec_context.options = {"max_pixels": str(_most_pixels(video))}
            yield container, video
    except (VideoError, ConfigError):
        raise
    except Exception as error:  # FFmpeg's errors, and what is raised in the stream that it reads
        raise VideoError(
            f"{name}: cannot be read as MP4, Matroska, WebM or AVI ({first_line(error)}); encode it"
            " again"
        ) from error


def _check_size(name: object, width: int, height: int, frames: int) -> None:
    pixels = width * height
    if not pixels or pixels > MAX_FRAME_PIXELS:
        said = f"{width} x {height}" if pixels else "more, or none,"
        raise VideoError(
            f"{name}: its frames have {said} pixels, at most {MAX_FRAME_PIXELS:,} are read; make it"
            " smaller"
        )
    if pixels * frames > MAX_CLIP_PIXELS:
        raise VideoError(
            f"{name}: {frames} frames of {width} x {height} pixels are more than "
            f"{MAX_CLIP_PIXELS:,} together; make it smaller, or take fewer frames"
        )
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        raise VideoError(
            f"{name}: frames of {width} x {height} pixels are too small, or too long and thin"
        )


def _checked_places(name: object, container: Any, video: Any, frames: int) -> list[_Place]:
    """Every frame in the order in which they are shown, and that what is asked for is not much."""
    places: list[_Place] = []
    for packet in container.demux(video):
        if not packet.size or packet.is_discard:
            continue
        time = packet.dts if packet.pts is None else packet.pts
        if time is None:
            raise VideoError(f"{name}: a frame has no time; encode it again")
        places.append(_Place(int(time), bool(packet.is_keyframe)))
        if len(places) > MAX_FRAMES:
            raise VideoError(f"{name}: has more than {MAX_FRAMES:,} frames; cut it")
    if not places:
        raise VideoError(f"{name}: has no frame in it")
    places.sort()
    seconds = (places[-1].time - places[0].time) * float(video.time_base)
    if seconds > MAX_SECONDS:
        raise VideoError(
            f"{name}: takes {seconds:,.0f} s, at most {MAX_SECONDS:,} are read; cut it"
        )
    work = sum(end - start + 1 for start, end in _ways(places, sampled(len(places), frames)))
    if work * _most_pixels(video) > MAX_DECODED_PIXELS:
        raise VideoError(
            f"{name}: {work:,} frames would be decoded to come to {frames} of them; encode it again"
            " with more key frames, or smaller"
        )
    return places


def _most_pixels(video: Any) -> int:
    """What a frame may have."""
    return int(video.codec_context.width * video.codec_context.height + _MARGIN)


def _ways(places: Sequence[_Place], chosen: Sequence[int]) -> Iterator[tuple[int, int]]:
    """From where to where is decoded for each frame that is taken, once each."""
    at = 0
    for end in sorted(set(chosen)):
        start = next((place for place in range(end, at, -1) if places[place].key), at)
        yield start, end
        at = end + 1


def _decoded(
    name: object, container: Any, video: Any, places: Sequence[_Place], chosen: Sequence[int]
) -> Iterator[NDArray[np.uint8]]:
    """The chosen frames, each once, in order."""
    # behind the last packet nothing more can be read: start again
    container.seek(places[0].time, stream=video)
    arriving = container.decode(video)
    at = 0
    frame = None
    for start, end in _ways(places, chosen):
        if start > at:
            container.seek(places[start].time, stream=video)
            arriving, frame = container.decode(video), None
        while frame is None or _time(frame) < places[end].time:
            frame = next(arriving, None)
            if frame is None:
                raise VideoError(f"{name}: ends in the middle; copy it again, or encode it again")
        at = end + 1
        yield _upright(frame)


def _time(frame: Any) -> int:
    return int(frame.dts if frame.pts is None else frame.pts)


def _upright(frame: Any) -> NDArray[np.uint8]:
    """A frame's pixels (H, W, 3), turned by the quarters that the file asks for."""
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


def _library() -> Any:
    try:
        return import_module("av")  # an extra, and slow to import
    except ImportError as error:
        raise ConfigError(
            "videos are read by PyAV, which is not installed. Run: pip install 'vqguard[video]'"
        ) from error
