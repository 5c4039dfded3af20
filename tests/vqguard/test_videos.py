"""Videos from outside: which frames are taken, and what is refused before memory is."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqguard.errors import ConfigError, VideoError
from vqguard.videos import check_clip, decode_clip, limits, open_video, opening, sampled

WriteVideo = Callable[..., Path]
KINDS = [("a.mp4", "mpeg4"), ("a.webm", "libvpx"), ("a.mkv", "libx264"), ("a.avi", "mpeg4")]


@given(st.integers(1, 3000), st.integers(1, 64))
def test_frames_are_evenly_spread_from_the_first_to_the_last(total: int, frames: int) -> None:
    chosen = sampled(total, frames)
    assert len(chosen) == frames
    assert chosen == sorted(chosen)
    assert chosen[0] == 0
    if frames > 1:
        assert chosen[-1] == total - 1
        gaps = np.diff(chosen)
        assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("name", "codec"), KINDS)
def test_the_frames_of_a_video(
    name: str, codec: str, write_video: WriteVideo, tmp_path: Path
) -> None:
    path = write_video(tmp_path / name, codec=codec)
    clip = open_video(path, 4)
    assert clip.frames.shape == (4, 48, 64, 3)
    greys = clip.frames.reshape(4, -1).mean(1)
    assert np.allclose(greys, [20 * n for n in sampled(12, 4)], atol=6)
    assert clip.seconds == pytest.approx([n / 4 for n in sampled(12, 4)])
    assert clip.duration == pytest.approx(3)
    with path.open("rb") as stream:
        assert check_clip(stream, path, 4) == (4, 64, 48, False)


@pytest.mark.parametrize("gop", [1, 5, 40])
def test_a_frame_is_the_same_however_it_is_come_to(
    gop: int, write_video: WriteVideo, tmp_path: Path
) -> None:
    """Going on from the key frame before it, or through all frames."""
    path = write_video(tmp_path / "a.mkv", frames=40, codec="libx264", step=6, gop=gop)
    every = open_video(path, 40)
    for frames in (2, 3, 7):
        clip = open_video(path, frames)
        assert np.array_equal(clip.frames, every.frames[sampled(40, frames)])


def test_a_short_video_shows_frames_again(write_video: WriteVideo, tmp_path: Path) -> None:
    clip = open_video(write_video(tmp_path / "a.mp4", frames=2, step=200), 4)
    assert np.allclose(clip.frames.reshape(4, -1).mean(1), [0, 0, 200, 200], atol=6)
    assert open_video(write_video(tmp_path / "b.mp4", frames=1), 3).frames.shape[0] == 3


def test_frames_are_turned_as_the_file_asks(write_video: WriteVideo, tmp_path: Path) -> None:
    clip = open_video(write_video(tmp_path / "a.mp4", step=0, turned=90), 1)
    assert clip.frames.shape == (1, 64, 48, 3)
    upper, lower = clip.frames[0, :28], clip.frames[0, 36:]
    # a quarter to the left: what was left is below
    assert upper.mean() < 40 < 215 < lower.mean()


def test_sound_is_told_of(write_video: WriteVideo, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", sound=True)
    with path.open("rb") as stream:
        assert check_clip(stream, path).sound
    assert open_video(path).frames.shape[0] == limits.FRAMES


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 500, b"nothing", b"ffconcat version 1.0\nfile {}\n", PLAYLIST, b"GIF89a" * 40],
)
def test_what_is_no_video_is_refused(
    content: bytes, write_video: WriteVideo, tmp_path: Path
) -> None:
    """A playlist names other files, which are not opened."""
    there = write_video(tmp_path / "there.mp4")
    path = tmp_path / "a.mp4"
    path.write_bytes(content.replace(b"{}", str(there).encode()))
    with pytest.raises(VideoError, match=r"a\.mp4"):
        open_video(path)


def test_missing_and_special_files_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "none.mp4", tmp_path, Path("/dev/zero")):
        with pytest.raises(VideoError, match="cannot read the video"):
            open_video(path)


@pytest.mark.parametrize(("name", "codec"), KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_video_that_is_cut_off_is_refused_or_shorter(
    name: str, codec: str, share: float, write_video: WriteVideo, tmp_path: Path
) -> None:
    raw = write_video(tmp_path / name, codec=codec, frames=30).read_bytes()
    stream = io.BytesIO(raw[: int(share * len(raw))])
    try:
        clip = decode_clip(stream, "cut", 4)
    except VideoError:
        return
    assert clip.frames.shape == (4, 48, 64, 3)


@given(st.integers(0, 10**9), st.integers(1, 40))
def test_damage_is_an_error_of_ours(seed: int, changes: int) -> None:
    draw = np.random.default_rng(seed)
    raw = bytearray(_clean())
    for place in draw.integers(0, len(raw), changes):
        raw[place] = draw.integers(256)
    try:
        clip = decode_clip(io.BytesIO(bytes(raw)), "damaged", 3)
    except VideoError:
        return
    assert clip.frames.shape[0] == 3


_CLEAN: list[bytes] = []


def _clean() -> bytes:
    if not _CLEAN:
        import av

        buffer = io.BytesIO()
        with av.open(buffer, "w", format="matroska") as container:
            video = container.add_stream("libx264", rate=4)
            video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
            for number in range(8):
                pixels = np.full((32, 32, 3), 30 * number, np.uint8)
                container.mux(video.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
            container.mux(video.encode(None))
        _CLEAN.append(buffer.getvalue())
    return _CLEAN[0]


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        ("MAX_FILE", 100, "at most 100 are read"),
        ("MAX_FRAME_PIXELS", 3071, "64 x 48 pixels, at most 3,071"),
        ("MAX_CLIP_PIXELS", 8 * 3072 - 1, "8 frames of 64 x 48"),
        ("MAX_FRAMES", 11, "more than 11 frames"),
        ("MAX_SECONDS", 2, "at most 2 are read"),
        ("MAX_DECODED_PIXELS", (3072 + 2**20) * 12 - 1, "12 frames would be decoded"),
        ("MIN_SIDE", 50, "too small"),
        ("MAX_ASPECT", 1, "too long and thin"),
    ],
)
def test_limits_hold_before_anything_is_decoded(
    limit: str,
    value: int,
    message: str,
    write_video: WriteVideo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_video(tmp_path / "a.mp4", codec="libx264", gop=50)
    monkeypatch.setattr(opening, limit, value)

    def never(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(opening, "_decoded", never)
    with pytest.raises(VideoError, match=message):
        open_video(path)


def test_frames_that_are_larger_than_their_container_says_are_not_decoded(
    write_video: WriteVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mkv", size=(64, 48), codec="libx264")
    monkeypatch.setattr(opening, "_MARGIN", -1)
    with pytest.raises(VideoError, match="cannot be read as MP4"):
        open_video(path)


def test_a_number_of_frames_is_bounded(write_video: WriteVideo, tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4")
    for frames in (0, limits.MAX_SAMPLED + 1):
        with pytest.raises(ConfigError, match="expected 1 to 256 frames"):
            open_video(path, frames)


def test_without_the_extra_it_is_named(
    write_video: WriteVideo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"pip install 'vqguard\[video\]'"):
        open_video(path)
