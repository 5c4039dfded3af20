"""Opening images that come from outside: limits, modes, orientation, frames.

What is judged must be what the model sees, so every image leaves here as one plain RGB
picture, and whatever could be read in two ways (several frames, an unknown pixel scale) is
refused. Colour profiles are ignored, as image processors ignore them.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vqguard.bounded import open_regular
from vqguard.errors import ImageError
from vqguard.images.limits import ImageStream, check_exif, check_frame, check_tiles

__all__ = [
    "FORMATS",
    "check_header",
    "check_image",
    "decode_image",
    "open_image",
]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""The decoders that may run, whatever the file is called. Pillow has many more, among them
some that start other programs (EPS)."""

MAX_PIXELS = 64_000_000
MIN_SIDE = 2

# The limit of Qwen2-VL's image processor in transformers (`smart_resize`). A picture of 2 by
# 30 million pixels passes a limit on pixels and exhausts memory once its short side is scaled up.
MAX_ASPECT = 200

_EIGHT_BIT_MODES = frozenset({"1", "L", "P", "RGB", "RGBA", "LA", "PA", "CMYK", "YCbCr"})
_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_BITS_PER_SAMPLE = 258  # TIFF tag
_STRIP_PIXELS = 2**20


def open_image(
    path: Path | str,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    frame: int | None = None,
) -> Image.Image:
    """Opens one image file as an 8-bit RGB picture, or says why it cannot be used.

    EXIF orientation is applied, transparency is composited on white, CMYK and palettes are
    converted, 16-bit greyscale is scaled to 8 bit (the high byte, as Pillow does for 16-bit
    colour). Size limits are checked from the header, before anything is decoded. JPEG files
    that carry further pictures for previews or stereo (MPO) give their primary picture.

    A truncated file is refused unless the process has set Pillow's
    `ImageFile.LOAD_TRUNCATED_IMAGES`, which this function leaves alone.

    Args:
        path: the file; its content decides the format, not its name.
        max_pixels: largest width x height.
        min_side: smallest width and height, in pixels.
        frame: which frame of an animated image or page of a document, from 0. Without it
            such files are refused: judging one frame says nothing about the others.

    Returns:
        The picture, mode RGB.

    Raises:
        ImageError: naming the file, what is wrong and what to do: missing, not a regular
            file, empty, not an image of `FORMATS`, truncated or corrupt, too many pixels, too
            small, too long and thin, animated, or of a pixel type without a known scale.
    """
    path = Path(path)
    with open_file(path) as stream:
        return decode_image(stream, path, max_pixels, min_side, frame)


def decode_image(
    stream: BinaryIO,
    name: Path | str,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    frame: int | None = None,
) -> Image.Image:
    """As `open_image`, from an open file that can seek, such as a member of an archive.

    `name` stands for it in messages.

    Raises:
        ImageError: as `open_image` does.
    """
    with checked_image(stream, name, max_pixels, min_side, frame) as image:
        load_image(name, image)
        return rgb_picture(name, image)


def load_image(name: Path | str, image: Image.Image) -> None:
    """Decodes an image, and refuses metadata behind the pixels that `checked_image` could not see.

    Raises:
        ImageError: naming the file.
    """
    image.load()
    check_exif(name, image)


def rgb_picture(name: Path | str, image: Image.Image) -> Image.Image:
    """What `open_image` makes of a loaded image, which it may change: upright, RGB, 8 bits."""
    turn_upright(image)
    return _to_rgb(name, image)


def turn_upright(image: Image.Image) -> None:
    """Does what `ImageOps.exif_transpose` does in place, for the pixels alone.

    Pillow would write the metadata anew, which decodes every entry: of 64 kB, up to a gigabyte.
    """
    image.getexif()  # kept by the image
    for key in ("exif", "Raw profile type exif"):
        image.info.pop(key, None)
    ImageOps.exif_transpose(image, in_place=True)


def check_image(path: Path | str) -> None:
    """Refuses what `open_image` refuses by the header alone, without decoding the picture.

    Fast enough for every file of a data set; a truncated body is not found.

    Raises:
        ImageError: as `open_image`.
    """
    path = Path(path)
    with open_file(path) as stream:
        check_header(stream, path)


def check_header(stream: BinaryIO, name: Path | str) -> tuple[int, int]:
    """As `check_image`, from an open file that can seek; `name` stands for it in messages.

    Returns:
        Width and height in pixels, as the file has them.
    """
    with checked_image(stream, name) as image:
        return image.size


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A file to read an image from. Raises ImageError as `open_image`."""
    _check_file(path)
    try:
        stream = open_regular(path)
    except PermissionError as error:
        raise ImageError(f"{path}: no permission to read it; change its mode or owner") from error
    except OSError as error:
        raise ImageError(f"{path}: cannot be opened ({error}); copy it from its source") from error
    with stream:
        yield stream


@contextmanager
def checked_image(
    stream: BinaryIO,
    name: Path | str,
    max_pixels: int = MAX_PIXELS,
    min_side: int = MIN_SIDE,
    frame: int | None = None,
) -> Iterator[Image.Image]:
    """The image with its header checked; whatever goes wrong inside is an ImageError."""
    try:
        limited = ImageStream(stream, name)
        with Image.open(limited.file, formats=FORMATS) as image:
            limited.header_is_read()
            check_tiles(name, image, max_pixels)
            _choose_frame(name, image, frame)
            _check_size(name, image, max_pixels, min_side)
            limited.check_body(image)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image that is accepted ({', '.join(FORMATS)}), or its header is "
            "damaged; convert it to PNG or JPEG"
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: more pixels than the image library decodes; scale it down"
        ) from error
    except Exception as error:
        # Decoders raise nearly anything on crafted files (struct.error, KeyError, ...).
        # Nothing may pass as an image that did not decode, and no run may die of it.
        raise ImageError(
            f"{name}: truncated or corrupt ({type(error).__name__}: {error}); copy it again "
            "from its source"
        ) from error


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise ImageError(f"{path}: no such file; check the path") from error
    except (OSError, ValueError) as error:
        raise ImageError(f"{path}: cannot be reached ({error}); check the path") from error
    if stat.S_ISDIR(status.st_mode):
        raise ImageError(f"{path}: is a folder; name the images in it")
    if not stat.S_ISREG(status.st_mode):
        raise ImageError(f"{path}: is not a regular file; save the image to disk first")
    if status.st_size == 0:
        raise ImageError(f"{path}: is empty (0 bytes); copy it again from its source")


def _choose_frame(path: Path | str, image: Image.Image, frame: int | None) -> None:
    # An MPO file is a photograph with previews: every viewer shows its first picture.
    several = getattr(image, "is_animated", False) and image.format != "MPO"
    if frame is None:
        if several:
            raise ImageError(
                f"{path}: has several frames or pages; save them as separate images and judge "
                "each, or choose one with open_image(path, frame=N)"
            )
        return
    check_frame(path, image, frame)
    count = int(getattr(image, "n_frames", 1))
    if not 0 <= frame < count:
        raise ImageError(f"{path}: frame must lie in 0..{count - 1}, got {frame}")
    image.seek(frame)


def _check_size(path: Path | str, image: Image.Image, max_pixels: int, min_side: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{path}: {width} x {height} pixels, at most {max_pixels:,} in all are accepted; "
            "scale it down, or open it with open_image(path, max_pixels=N) if you trust its source"
        )
    if min(width, height) < min_side:
        raise ImageError(
            f"{path}: {width} x {height} pixels, each side needs at least {min_side}; "
            "use a larger version"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            f"{path}: {width} x {height} pixels is longer than {MAX_ASPECT} times its width; "
            "crop it"
        )


def _to_rgb(path: Path | str, image: Image.Image) -> Image.Image:
    if image.mode in _SIXTEEN_BIT_MODES or (image.mode == "I" and image.format == "PNG"):
        return _from_sixteen_bit(path, image)
    if image.mode not in _EIGHT_BIT_MODES:
        raise ImageError(
            f"{path}: pixel type {image.mode!r} has no known scale to 8 bits; save it as an "
            "8-bit PNG"
        )
    if image.has_transparency_data:
        return _in_strips(image, _on_white)
    return image.convert("RGB")


def _in_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """An RGB picture made some rows at a time, so that steps in between take no memory to speak of.

    `convert` looks at each pixel alone.
    """
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    made = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows)))
        made.paste(convert(strip), (0, top))
    return made


def _on_white(image: Image.Image) -> Image.Image:
    coloured = image.convert("RGBA")
    white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, coloured).convert("RGB")


def _from_sixteen_bit(path: Path | str, image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips every value above 255 to white.
    bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))
    if bits != (16,):
        raise ImageError(f"{path}: {bits[0]} bits a sample are not accepted; save it as 8-bit PNG")
    transparent = image.info.get("transparency")

    def high_byte(strip: Image.Image) -> Image.Image:
        values = np.asarray(strip).astype(np.int64)
        grey = (values >> 8).clip(0, 255).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255
        return Image.fromarray(grey).convert("RGB")

    return _in_strips(image, high_byte)
