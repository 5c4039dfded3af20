"""How else a file could be read: a verdict is about one picture, and a file may hold several.

`open_image` gives this project's reading of a file. A program that opens the same file in another
way can see another picture: what is transparent hides colours, an orientation mark turns, a deep
grey is clipped. Whoever judges a *file* that another program opens later asks for all readings;
whoever judges the very picture that the model is given has no need to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageChops

from vqguard.errors import ImageError, InputError
from vqguard.images.opening import (
    MAX_PIXELS,
    checked_image,
    load_image,
    open_file,
    rgb_picture,
    turn_upright,
)

ROUNDING = 1
"""Largest difference of a colour value, in 1/255, that is no other picture: what rounding gives
where two readings scale the same number."""

_ORIENTATION = 0x0112  # EXIF tag
_REMEDY = "save it as an opaque, upright 8-bit RGB picture"


@dataclass(frozen=True)
class Readings:
    """A file's picture, and the other pictures that it could be taken for."""

    picture: Image.Image
    """This project's reading, mode RGB: what `open_image` gives."""
    others: tuple[tuple[str, Image.Image], ...] = ()
    """(How it is read, the picture) of each reading that differs from it by more than `ROUNDING`,
    mode RGB."""

    @property
    def ambiguous(self) -> str:
        """Why the file shows more than one picture, and what to do; empty if it shows one."""
        if not self.others:
            return ""
        hows = "; ".join(how for how, _ in self.others)
        return f"shows another picture when it is read {hows}. To be unambiguous, {_REMEDY}"


def open_readings(path: Path | str, *, converted: bool = True) -> Readings:
    """Opens an image file as `open_image` does, and in the other ways that models' inputs are read.

    Those are `ImageOps.exif_transpose` and `convert("RGB")` (transformers' `load_image`),
    `convert("RGB")` alone (the usual line of Python), transparency on white without the
    orientation (an image processor that is given a picture as Pillow opens it), and, unless
    `converted`, the file's samples as they stand.

    Args:
        path: the file.
        converted: the image processors that will be used convert pictures to RGB.

    Raises:
        ImageError: as `open_image`.
    """
    path = Path(path)
    with open_file(path) as stream:
        return _read(stream, path, path, converted, MAX_PIXELS)


def decode_readings(
    stream: BinaryIO, name: str, max_pixels: int = MAX_PIXELS, *, converted: bool = True
) -> Readings:
    """As `open_readings`, from an open file that can seek; `name` stands for it in messages.

    Raises:
        ImageError: as `open_readings`, and for a TIFF: some readers take it otherwise by its name.
    """
    return _read(stream, name, None, converted, max_pixels)


def _read(
    stream: BinaryIO, name: Path | str, path: Path | None, converted: bool, max_pixels: int
) -> Readings:
    """All readings of a stream; `path` is where it can be opened by its name."""
    with checked_image(stream, name, max_pixels) as image:
        load_image(name, image)
        plain, tiff = _is_plain(image), image.format == "TIFF"
        keyed = image.mode == "P" and "transparency" in image.info and image.format == "PNG"
        picture = rgb_picture(name, image)
    if plain:
        return Readings(picture)
    ways = _CONVERTED if converted else {**_CONVERTED, "without conversion": _samples}
    if tiff:
        if path is None:
            raise ImageError(f"{name}: a TIFF is read in several ways; save it as PNG or JPEG")
        ways = {**ways, "by its name, as Pillow maps it": _mapped}
    others = []
    for how, read in ways.items():
        stream.seek(0)
        # One that fails is an error here too: nothing is said of what was not compared.
        with checked_image(stream, name, max_pixels) as image:
            if read is _mapped:
                image.filename = str(path)  # type: ignore[attr-defined]
            load_image(name, image)
            other = read(image)
        # Readers disagree about a palette's transparent entry, unused ones among them.
        if _differ(picture, other) or (keyed and read is _on_white):
            others.append((how, other))
    return Readings(picture, tuple(others))


def check_plain(image: Image.Image) -> None:
    """Refuses a picture in memory that image processors read in more than one way.

    Raises:
        InputError: its mode is not RGB, or it carries a transparent colour or an orientation that
            was not applied.
    """
    problem = ""
    if image.mode != "RGB":
        problem = f"mode {image.mode!r}"
    elif image.info.get("transparency") is not None:
        problem = "one with a transparent colour"
    elif _is_turned(image):
        problem = "one with an orientation that is not applied"
    if problem:
        raise InputError(
            f"expected an RGB picture that can be read in one way only, got {problem}; open files "
            "with vqguard.images.open_image"
        )


def _is_plain(image: Image.Image) -> bool:
    """Whether all ways to read a loaded picture agree, so that none needs to be tried."""
    return (
        image.mode in ("L", "RGB")
        and image.format != "TIFF"  # which Pillow turns while it is loaded
        and image.info.get("transparency") is None
        and not _is_turned(image)
    )


def _is_turned(image: Image.Image) -> bool:
    return bool(image.getexif().get(_ORIENTATION, 1) != 1)


def _upright(image: Image.Image) -> Image.Image:
    turn_upright(image)
    return image.convert("RGB")


def _plain(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    coloured = image.convert("RGBA")
    white = Image.new("RGBA", coloured.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, coloured).convert("RGB")


def _mapped(image: Image.Image) -> Image.Image:
    """Pillow maps some TIFFs into memory when it knows their name, and leaves those unturned."""
    return image.convert("RGB")


def _samples(image: Image.Image) -> Image.Image:
    """As an image processor without `do_convert_rgb` takes them: palette indices are greys."""
    values = np.asarray(image).clip(0, 255).astype(np.uint8)
    if values.ndim == 3:
        values = values[..., :3] if values.shape[2] > 2 else values[..., 0]
    return Image.fromarray(values).convert("RGB")


_CONVERTED: dict[str, Callable[[Image.Image], Image.Image]] = {
    'with its orientation and convert("RGB"), as load_image of transformers does': _upright,
    'with convert("RGB") alone': _plain,
    "on white without its orientation": _on_white,
}


def _differ(one: Image.Image, other: Image.Image) -> bool:
    if one.size != other.size:
        return True
    return int(np.asarray(ImageChops.difference(one, other)).max()) > ROUNDING
