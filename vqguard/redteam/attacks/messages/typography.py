"""Text drawn as a picture, in Pillow's own font, as large as it fits."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vqguard.errors import ConfigError, InputError

_SMALLEST = 5
"""Pixels of the smallest letters."""
_MARGIN = 0.03
"""Of the picture's shorter side."""
_ITEMS = ("1.", "2.", "3.")
_STRIP = 0.25
"""Share of the height that text below a picture takes."""


def numbered_list(text: str, size: tuple[int, int]) -> Image.Image:
    """The text, or "", above an empty list of three, black on white, (width, height) `size`.

    In the manner of FigStep (Gong et al. 2025, arXiv 2311.05608).

    Raises:
        InputError: letters that the font does not have, or more text than fits.
        ConfigError: a Pillow without FreeType.
    """
    return _written(text, _ITEMS, size)


def text_below(picture: Image.Image, text: str) -> Image.Image:
    """The picture, made lower, with the text below it, black on white; the size stays.

    In the manner of MM-SafetyBench (Liu et al. 2024, arXiv 2311.17600, "SD+TYPO"). Errors are those
    of `numbered_list`.
    """
    width, height = picture.size
    lower = max(1, round(_STRIP * height))
    page = Image.new("RGB", picture.size, "white")
    page.paste(picture.convert("RGB").resize((width, height - lower)), (0, 0))
    page.paste(_written(text, (), (width, lower)), (0, height - lower))
    return page


def _written(text: str, items: Sequence[str], size: tuple[int, int]) -> Image.Image:
    """Lines in the largest letters that fit, then the items, one a line."""
    plain = _plain(text)
    margin = max(1, round(_MARGIN * min(size)))
    room = size[0] - 2 * margin, size[1] - 2 * margin
    low, high = _SMALLEST, max(_SMALLEST, room[1])
    if _lines(plain, items, low, room) is None:
        raise InputError(
            f"a text of {len(plain)} letters does not fit into {size[0]} x {size[1]} pixels in "
            f"letters of {_SMALLEST}: shorten the request ({plain[:40]!r})"
        )
    while low < high:
        middle = (low + high + 1) // 2
        if _lines(plain, items, middle, room) is None:
            high = middle - 1
        else:
            low = middle
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), _font(low)
    for number, line in enumerate(_lines(plain, items, low, room) or []):
        pen.text((margin, margin + number * _leading(font)), line, fill="black", font=font)
    return page


def _lines(
    text: str, items: Sequence[str], letters: int, room: tuple[int, int]
) -> list[str] | None:
    """The text broken at blanks in letters of so many pixels; None where it does not fit."""
    font = _font(letters)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= room[0]:
            lines[-1] = longer
        else:
            lines.append(word)
    lines += items
    fits = all(font.getlength(line) <= room[0] for line in lines)
    return lines if fits and len(lines) * _leading(font) <= room[1] else None


def _leading(font: ImageFont.FreeTypeFont) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent


def _font(letters: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(letters)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ConfigError("this Pillow draws no letters of a given size: install one with FreeType")
    return font


def _plain(text: str) -> str:
    """The text without accents, on one line.

    Pillow's font has the letters of ASCII alone; what it does not have would become a box that
    nobody reads.
    """
    decomposed = unicodedata.normalize("NFKD", text)
    plain = "".join(letter for letter in decomposed if not unicodedata.combining(letter))
    unknown = sorted({letter for letter in plain if not letter.isascii()})
    if unknown:
        raise InputError(
            f"Pillow's font does not have {''.join(unknown[:10])!r}, so this request cannot be "
            "drawn: write it in ASCII, or leave the typographic attacks out of the suite"
        )
    return " ".join(plain.split())
