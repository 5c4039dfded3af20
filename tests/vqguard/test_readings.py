"""A file that shows another picture to another reader is found out, whatever makes it so."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from vqguard.errors import ImageError, InputError
from vqguard.images import check_plain, open_image, open_readings
from vqguard.images.readings import ROUNDING

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (12, 16, 4)).astype(np.uint8)


def save(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png_with(chunk: bytes, body: bytes, image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    plain = buffer.getvalue()
    mark = plain.index(b"IDAT") - 4
    made = struct.pack(">I", len(body)) + chunk + body + struct.pack(">I", zlib.crc32(chunk + body))
    return plain[:mark] + made + plain[mark:]


def test_hidden_colours_are_ambiguous(tmp_path: Path) -> None:
    values = NOISE.copy()
    values[..., 3] = 0
    readings = open_readings(save(tmp_path / "hidden.png", Image.fromarray(values)))
    assert np.asarray(readings.picture).min() == 255
    assert 'convert("RGB")' in readings.ambiguous
    assert "load_image of transformers" in readings.ambiguous
    assert any(np.array_equal(np.asarray(other), NOISE[..., :3]) for _, other in readings.others)


def test_hidden_colours_of_a_palette_and_of_a_colour_key_are_ambiguous(tmp_path: Path) -> None:
    indexed = Image.fromarray(NOISE[..., :3]).quantize(16)
    for kind in ("png", "gif"):
        path = save(tmp_path / f"palette.{kind}", indexed, transparency=3)
        assert open_readings(path).ambiguous
    flat = Image.new("RGB", (8, 8), (1, 2, 3))
    assert open_readings(save(tmp_path / "key.png", flat, transparency=(1, 2, 3))).ambiguous


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_greys_are_ambiguous(tmp_path: Path, kind: str) -> None:
    deep = Image.fromarray(RNG.integers(0, 65536, (8, 8)).astype(np.uint16))
    assert open_readings(save(tmp_path / f"deep.{kind}", deep)).ambiguous


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_orientation_mark_is_ambiguous(tmp_path: Path, kind: str, orientation: int) -> None:
    image = Image.fromarray(NOISE[..., :3])
    path = save(tmp_path / f"t.{kind}", image, exif=turned(orientation))
    assert open_readings(path).ambiguous


def test_an_orientation_that_changes_nothing_is_not(tmp_path: Path) -> None:
    flat = Image.new("RGB", (8, 8), "red")
    assert not open_readings(save(tmp_path / "flat.png", flat, exif=turned(3))).ambiguous
    image = Image.fromarray(NOISE[..., :3])
    for orientation in (0, 1, 9):  # none of the eight, or the first
        path = save(tmp_path / "same.png", image, exif=turned(orientation))
        assert not open_readings(path).ambiguous


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "gif", "tiff"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "CMYK", "LA"])
def test_pictures_without_two_readings_are_not_ambiguous(
    tmp_path: Path, mode: str, kind: str
) -> None:
    image = Image.fromarray(NOISE[..., :3])
    image.putalpha(255) if mode in ("RGBA", "LA") else None
    path = tmp_path / f"plain.{kind}"
    try:
        image.convert(mode).save(path)
    except (OSError, ValueError):
        pytest.skip("the format has no such mode")
    readings = open_readings(path)
    assert not readings.ambiguous
    assert readings.picture.tobytes() == open_image(path).tobytes()


def test_gamma_and_profiles_change_no_reading(tmp_path: Path) -> None:
    path = tmp_path / "gamma.png"
    path.write_bytes(png_with(b"gAMA", struct.pack(">I", 10), Image.fromarray(NOISE[..., :3])))
    assert not open_readings(path).ambiguous
    assert load_image(str(path)).tobytes() == open_image(path).tobytes()


def test_the_first_picture_of_an_mpo_is_every_readers(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    path = tmp_path / "stereo.mpo"
    first.save(path, "MPO", save_all=True, append_images=[second])
    assert not open_readings(path).ambiguous
    assert load_image(str(path)).tobytes() == open_image(path).tobytes()


def test_several_frames_are_refused_here_too(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / "moving.png"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="several frames"):
        open_readings(path)


def test_an_image_processor_that_does_not_convert_sees_palette_indices(tmp_path: Path) -> None:
    path = save(tmp_path / "p.png", Image.fromarray(NOISE[..., :3]).quantize(64))
    assert not open_readings(path).ambiguous
    assert "without conversion" in open_readings(path, converted=False).ambiguous
    rgb = save(tmp_path / "rgb.png", Image.fromarray(NOISE[..., :3]))
    assert not open_readings(rgb, converted=False).ambiguous


def converted(image: Image.Image) -> Image.Image:
    """What image processors make of a picture that they are given."""
    return Image.fromarray(np.asarray(convert_to_rgb(image)))


MODES = st.sampled_from(["RGB", "L", "P", "1", "RGBA", "LA", "PA", "CMYK", "I;16"])


def test_a_grey_tiff_that_only_some_readers_turn_is_ambiguous(tmp_path: Path) -> None:
    """Opened by its name it is mapped into memory, and Pillow turns what it decodes only."""
    path = tmp_path / "turned.tiff"
    Image.fromarray(NOISE[..., 0]).save(path, exif=turned(6))
    assert "by its name" in open_readings(path).ambiguous


@given(
    values=arrays.arrays(np.uint8, (4, 5, 4)),
    mode=MODES,
    kind=st.sampled_from(["png", "gif", "webp", "tiff", "jpeg"]),
    orientation=st.none() | st.integers(0, 9),
    transparency=st.none() | st.integers(0, 255),
)
@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
def test_a_file_that_is_not_ambiguous_is_one_picture_for_everyone(
    tmp_path: Path,
    values: np.ndarray[Any, np.dtype[np.uint8]],
    mode: str,
    kind: str,
    orientation: int | None,
    transparency: int | None,
) -> None:
    colour = Image.fromarray(values)
    if mode == "I;16":
        image = Image.fromarray(values.reshape(4, 20).view(np.uint16))
    elif mode == "PA":
        image = colour.convert("LA").convert("PA")
    else:
        image = (
            colour.convert("RGB").convert(mode) if mode in ("P", "CMYK") else (colour.convert(mode))
        )
    options: dict[str, Any] = {} if orientation is None else {"exif": turned(orientation)}
    if transparency is not None and mode in ("P", "L"):
        options["transparency"] = transparency
    path = tmp_path / f"drawn.{kind}"
    try:
        image.save(path, lossless=True, **options)
        readings = open_readings(path)
    except (OSError, ImageError, ValueError, TypeError, KeyError):
        assume(False)
    assert readings.picture.tobytes() == open_image(path).tobytes()
    with Image.open(path) as plain, Image.open(path) as upright:
        others = [
            load_image(str(path)),
            plain.convert("RGB"),
            ImageOps.exif_transpose(upright).convert("RGB"),
            converted(Image.open(path)),
            converted(load_image(str(path))),
        ]
    differ = any(
        other.size != readings.picture.size
        or int(np.abs(np.asarray(other, int) - np.asarray(readings.picture, int)).max()) > ROUNDING
        for other in others
    )
    if mode == "P" and transparency is not None:  # a transparent entry is enough, used or not
        assert readings.ambiguous or not differ
    else:
        assert bool(readings.ambiguous) == differ


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_a_picture_in_memory_of_another_mode_is_refused(mode: str) -> None:
    with pytest.raises(InputError, match=r"open_image"):
        check_plain(Image.new(mode, (4, 4)))


def test_a_picture_in_memory_with_something_left_to_apply_is_refused(tmp_path: Path) -> None:
    flat = Image.new("RGB", (8, 8), (1, 2, 3))
    check_plain(flat)
    path = save(tmp_path / "key.png", flat, transparency=(1, 2, 3))
    with Image.open(path) as image, pytest.raises(InputError, match="transparent"):
        check_plain(image)
    path = save(tmp_path / "turned.jpg", flat, exif=turned(6))
    with Image.open(path) as image, pytest.raises(InputError, match="orientation"):
        check_plain(image)
    check_plain(open_image(path))
    check_plain(open_image(tmp_path / "key.png"))
