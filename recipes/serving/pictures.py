"""Pictures in a request: data URIs, opened within the limits."""

from __future__ import annotations

import base64
import binascii
import io
import re

from PIL import Image

from vqguard.errors import ImageError
from vqguard.images import decode_image
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.refusals import RequestError, bad_request, too_large

_DATA = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
_SHOWN = 40


def is_data_uri(url: str) -> bool:
    """Whether a picture's address holds the picture."""
    return url[:5].lower() == "data:"


def data_uri_bytes(url: str, param: str) -> bytes:
    """The file in a data URI.

    Raises:
        RequestError: 400 naming `param`.
    """
    header = _DATA.match(url)
    if header is None:
        raise bad_request(
            f"expected data:image/…;base64,…, got {url[:_SHOWN]!r}", "invalid_image_url", param
        )
    try:
        return base64.b64decode(url[header.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(
            f"the picture is not base64 ({error}); encode the file again",
            "invalid_base64",
            param,
        ) from error


def open_pictures(files: list[tuple[str, bytes]], limits: Limits) -> list[Image.Image]:
    """Each file as one RGB picture; what is judged is what the model is shown.

    `files`: what messages call it, and its content.

    Raises:
        RequestError: 400 or 413 naming the picture.
    """
    pictures: list[Image.Image] = []
    left = limits.pixels
    for param, content in files:
        if left < 1:
            raise too_large("pixels of all pictures", limits.pixels, param)
        picture = open_picture(content, param, left)
        left -= picture.width * picture.height
        pictures.append(picture)
    return pictures


def open_picture(content: bytes, param: str, most_pixels: int) -> Image.Image:
    """One picture.

    Raises:
        RequestError: 400 naming `param`.
    """
    try:
        return decode_image(io.BytesIO(content), "the picture", most_pixels)
    except ImageError as error:
        raise RequestError(400, str(error), code="invalid_image", param=param) from error
