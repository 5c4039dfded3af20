"""Opening untrusted images: every case is a real file on disk."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from vqguard.errors import ImageError
from vqguard.images import FORMATS, check_image, iter_images, open_image

LOSSLESS = ["png", "bmp", "gif", "tiff"]


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """A smooth picture whose corners all differ."""
    y, x = np.mgrid[0:height, 0:width]
    red, green = 255 * x / (width - 1), 255 * y / (height - 1)
    values = np.stack([red, green, np.full_like(red, 40 + seed)], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


def pixels(image: Image.Image) -> npt.NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png_with_header(width: int, height: int) -> bytes:
    """A tiny file whose header promises width x height RGB pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_rgb_comes_back_unchanged(tmp_path: Path, kind: str) -> None:
    source = picture()
    if kind == "gif":  # GIF keeps 256 colours: use a picture that needs no more
        source = picture(6, 4)
    path = tmp_path / f"image.{kind}"
    source.save(path)
    opened = open_image(path)
    assert opened.mode == "RGB"
    assert (pixels(opened) == pixels(source)).all()


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_lossy_rgb_comes_back_close(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"image.{kind}"
    picture(64, 48).save(path, quality=95)
    opened = open_image(str(path))
    assert opened.mode == "RGB"
    assert abs(pixels(opened) - pixels(picture(64, 48))).mean() < 4


def test_the_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    path = tmp_path / "really_a_png.jpg"
    path.write_bytes(encode(picture(), "png"))
    assert (pixels(open_image(path)) == pixels(picture())).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "tiff", "gif"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    path = tmp_path / f"cut.{kind}"
    for share in (0.9, 0.5, 0.01):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ImageError, match=r"cut\..*(truncated or corrupt|not an image)"):
            open_image(path)


def test_empty_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty\.png: is empty"):
        open_image(empty)
    with pytest.raises(ImageError, match=r"absent\.png: no such file"):
        open_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match="is a folder"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be reached"):
        open_image("null\0byte.png")
    with pytest.raises(ImageError, match="cannot be reached"):
        open_image(empty / "inside_a_file.png")


def test_pipes_are_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(pipe)


@pytest.mark.parametrize(
    "content", [b"this is not an image\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"\0"]
)
def test_text_and_bare_signatures_named_png_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"text\.png.*(not an image|truncated)"):
        open_image(path)


def test_formats_outside_the_list_are_refused(tmp_path: Path) -> None:
    for kind in ("eps", "ppm", "tga", "pdf", "ico"):
        assert kind.upper() not in FORMATS
        path = tmp_path / f"{kind}.png"
        path.write_bytes(encode(picture(), kind))
        with pytest.raises(ImageError, match="not an image that is accepted"):
            open_image(path)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_one_pixel_images_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "dot.png"
    Image.new("RGB", size).save(path)
    with pytest.raises(ImageError, match="each side needs at least 2"):
        open_image(path)
    assert open_image(path, min_side=1).size == size


def test_two_by_two_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "small.png"
    picture(2, 2).save(path)
    assert open_image(path).size == (2, 2)
    with pytest.raises(ImageError, match="at least 32"):
        open_image(path, min_side=32)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(8001, 8000), (10_000, 10_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused_by_their_header(
    tmp_path: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("the pixels were decoded")

    path = tmp_path / "bomb.png"
    path.write_bytes(png_with_header(*size))
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    with pytest.raises(ImageError, match=r"bomb\.png.*pixels.*scale it down"):
        open_image(path)


def test_the_pixel_limit_is_exact(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    picture(24, 16).save(path)
    assert open_image(path, max_pixels=24 * 16).size == (24, 16)
    with pytest.raises(ImageError, match="max_pixels=N"):
        open_image(path, max_pixels=24 * 16 - 1)


def test_headers_without_pixels_are_refused(tmp_path: Path) -> None:
    for size in [(0, 0), (0, 10), (10, 0)]:
        path = tmp_path / "zero.png"
        path.write_bytes(png_with_header(*size))
        with pytest.raises(ImageError, match=r"zero\.png"):
            open_image(path)


def test_long_thin_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "line.png"
    Image.new("RGB", (2 * 200, 2)).save(path)
    assert open_image(path).size == (400, 2)
    Image.new("RGB", (2, 2 * 200 + 1)).save(path)
    with pytest.raises(ImageError, match="longer than 200 times"):
        open_image(path)


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_animated_images_are_refused_unless_a_frame_is_chosen(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"frames.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(ImageError, match=r"frames\..*several frames.*frame="):
        open_image(path)
    for index, frame in enumerate(frames):
        opened = open_image(path, frame=index)
        assert opened.mode == "RGB"
        assert abs(pixels(opened) - pixels(frame)).max() <= 2
    for index in (3, -1):
        with pytest.raises(ImageError, match=r"frame must lie in 0\.\.2"):
            open_image(path, frame=index)


def test_a_still_image_has_only_frame_zero(tmp_path: Path) -> None:
    path = tmp_path / "still.gif"
    picture(6, 4).save(path)
    assert (pixels(open_image(path, frame=0)) == pixels(open_image(path))).all()
    with pytest.raises(ImageError, match=r"0\.\.0"):
        open_image(path, frame=1)


def test_a_photograph_with_a_preview_gives_its_primary_picture(tmp_path: Path) -> None:
    path = tmp_path / "phone.jpg"
    path.write_bytes(
        encode(
            Image.new("RGB", (40, 30), "red"),
            "MPO",
            save_all=True,
            append_images=[Image.new("RGB", (40, 30), "blue")],
        )
    )
    with Image.open(path) as raw:
        assert raw.format == "MPO"
    opened = open_image(path)
    assert pixels(opened)[..., 0].min() > 240
    assert pixels(opened)[..., 2].max() < 20


def test_cmyk_jpeg_keeps_its_colours(tmp_path: Path) -> None:
    path = tmp_path / "print.jpg"
    for colour, cmyk in [((255, 0, 0), (0, 255, 255, 0)), ((255, 255, 255), (0, 0, 0, 0))]:
        Image.new("CMYK", (16, 16), cmyk).save(path, quality=95)
        opened = open_image(path)
        assert opened.mode == "RGB"
        assert abs(pixels(opened) - np.array(colour)).max() < 6


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_greyscale_is_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    path = tmp_path / f"deep.{kind}"
    Image.fromarray(ramp).save(path)
    opened = open_image(path)
    assert opened.mode == "RGB"
    grey = pixels(opened)
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 0] == ramp // 256).all()
    assert len(np.unique(grey)) == 256


def test_sixteen_bit_greyscale_honours_its_transparent_value(tmp_path: Path) -> None:
    values = np.array([[0, 1000], [40000, 65535]], dtype=np.uint16)
    plain = encode(Image.fromarray(values), "png")
    mark = plain.index(b"IDAT") - 4
    path = tmp_path / "deep.png"
    path.write_bytes(plain[:mark] + png_chunk(b"tRNS", struct.pack(">H", 1000)) + plain[mark:])
    assert pixels(open_image(path))[..., 0].tolist() == [[0, 255], [156, 255]]


def test_pixel_types_without_a_scale_are_refused(tmp_path: Path) -> None:
    for dtype in (np.float32, np.int32):
        path = tmp_path / "values.tiff"
        Image.fromarray(np.ones((8, 8), dtype=dtype)).save(path)
        with pytest.raises(ImageError, match="no known scale"):
            open_image(path)


def test_palette_with_transparency_is_composited_on_white(tmp_path: Path) -> None:
    indexed = Image.new("P", (4, 2), 0)
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    indexed.putpixel((0, 0), 1)
    for kind in ("png", "gif"):
        path = tmp_path / f"palette.{kind}"
        indexed.save(path, transparency=0)
        opened = open_image(path)
        assert opened.mode == "RGB"
        assert opened.getpixel((0, 0)) == (200, 100, 50)
        assert opened.getpixel((3, 1)) == (255, 255, 255)


def test_palette_with_partial_alpha_is_blended_with_white(tmp_path: Path) -> None:
    indexed = Image.new("P", (2, 2), 0)
    indexed.putpalette([0, 0, 0, 100, 100, 100])
    path = tmp_path / "palette.png"
    indexed.save(path, transparency=bytes([51, 255]))  # entry 0: black, one fifth opaque
    assert open_image(path).getpixel((1, 1)) == (204, 204, 204)


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (0, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (100, 0), (255, 255, 255)),
        ("LA", (100, 255), (100, 100, 100)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_alpha_and_grey_modes(
    tmp_path: Path, mode: str, colour: int, expected: tuple[int, int, int]
) -> None:
    path = tmp_path / "image.png"
    Image.new(mode, (3, 3), colour).save(path)
    opened = open_image(path)
    assert opened.mode == "RGB"
    assert opened.getpixel((1, 1)) == expected


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (9, 8, 7)), ("L", 9)])
def test_a_transparent_colour_key_becomes_white(
    tmp_path: Path, mode: str, colour: int | tuple[int, int, int]
) -> None:
    path = tmp_path / "key.png"
    Image.new(mode, (3, 3), colour).save(path, transparency=colour)
    assert open_image(path).getpixel((1, 1)) == (255, 255, 255)


TURNS: dict[int, Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]] = {
    1: lambda a: a,
    3: lambda a: np.rot90(a, 2),
    6: lambda a: np.rot90(a, -1),
    8: lambda a: np.rot90(a, 1),
    2: lambda a: a[:, ::-1],
}


@pytest.mark.parametrize("orientation", list(TURNS))
@pytest.mark.parametrize("kind", ["png", "tiff", "jpeg", "webp"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{kind}"
    picture(48, 32).save(path, exif=exif, quality=95)
    with Image.open(path) as raw:
        stored = pixels(raw.convert("RGB"))
    if kind == "tiff":  # Pillow turns TIFF by itself while loading
        stored = pixels(picture(48, 32))
    opened = pixels(open_image(path))
    expected = TURNS[orientation](stored)
    assert opened.shape == expected.shape
    assert abs(opened - expected).max() <= 1


def test_colour_profiles_do_not_change_the_pixels(tmp_path: Path) -> None:
    path = tmp_path / "profile.png"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    picture().save(path, icc_profile=profile)
    assert (pixels(open_image(path)) == pixels(picture())).all()


@given(data=st.data())
@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_give_a_picture_or_an_image_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    kind = data.draw(st.sampled_from(["png", "jpeg", "webp", "gif", "bmp", "tiff"]))
    content = bytearray(encode(picture(), kind))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        opened = open_image(path, max_pixels=1_000_000)
    except ImageError:
        return  # anything else that is raised fails the test
    assert opened.mode == "RGB"
    assert min(opened.size) >= 2


def test_iter_images_searches_folders_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.png", "a/z.JPG", "a/c/x.webp", "a/.hidden.gif", "notes.txt", "a/data.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    found = [path.relative_to(tmp_path).as_posix() for path in iter_images(tmp_path)]
    assert found == ["a/.hidden.gif", "a/c/x.webp", "a/z.JPG", "b.png"]
    assert list(iter_images(str(tmp_path))) == list(iter_images([tmp_path]))


def test_iter_images_hands_on_named_files_and_keeps_their_order(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "one.bmp").write_bytes(b"x")
    named = [tmp_path / "z.txt", tmp_path / "folder", tmp_path / "absent.png"]
    assert list(iter_images(named)) == [named[0], tmp_path / "folder" / "one.bmp", named[2]]
    assert list(iter_images([])) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_iter_images_refuses_a_folder_it_cannot_list(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o000)
    try:
        with pytest.raises(ImageError, match="cannot list"):
            list(iter_images(tmp_path))
    finally:
        locked.chmod(0o755)


def test_iter_images_reports_a_folder_that_fails_while_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(ImageError, match="cannot list this folder: Permission denied"):
        list(iter_images(tmp_path))


def test_a_header_check_refuses_what_opening_refuses_and_decodes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    for content in (b"", b"no image", png_with_header(60_000, 60_000), png_with_header(1, 1)):
        path.write_bytes(content)
        with pytest.raises(ImageError) as opening:
            open_image(path)
        with pytest.raises(ImageError) as checking:
            check_image(path)
        assert str(checking.value) == str(opening.value)
    path.write_bytes(png_with_header(24, 16))  # its body is too short
    check_image(path)
    with pytest.raises(ImageError, match="truncated"):
        open_image(path)
