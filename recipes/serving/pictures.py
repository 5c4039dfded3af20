"""Pictures in a request: data URIs, opened within the limits."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Callable, Sequence

from PIL import Image

from vqguard.errors import ImageError
from vqguard.images import Readings, decode_image, decode_readings
from vqguard.recipes.serving.answering.jobs import Origin
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.wire.refusals import bad_request, too_large

_DATA = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.IGNORECASE)
_SHOWN = 40
_NAME = "the picture"

File = tuple[str, bytes]
"""What messages call a picture, and its file's content."""


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


def open_pictures(files: Sequence[File], limits: Limits) -> list[Image.Image]:
    """Each file as one RGB picture; what is judged is what the model is shown.

    Raises:
        RequestError: 400 or 413 naming the picture.
    """
    return [reading.picture for reading in _opened(files, limits, _picture)]


def open_all_readings(files: Sequence[File], limits: Limits, *, converted: bool) -> list[Readings]:
    """Each file in all the ways that it could be read: who asks shows it to somebody else.

    `converted` as for `vqguard.images.open_readings`.

    Raises:
        RequestError: 400 or 413 naming the picture.
    """

    def read(content: bytes, most: int) -> Readings:
        return decode_readings(io.BytesIO(content), _NAME, most, converted=converted)

    return _opened(files, limits, read)


def origin_of(request: str, files: Sequence[File]) -> Origin:
    """What the audit log says of these files."""
    return Origin(request, tuple(hashlib.sha256(content).hexdigest() for _, content in files))


def _opened(
    files: Sequence[File], limits: Limits, read: Callable[[bytes, int], Readings]
) -> list[Readings]:
    opened: list[Readings] = []
    left = limits.pixels
    for param, content in files:
        if left < 1:
            raise too_large("pixels of all pictures", limits.pixels, param)
        try:
            reading = read(content, left)
        except ImageError as error:
            raise bad_request(str(error), "invalid_image", param) from error
        left -= reading.picture.width * reading.picture.height
        opened.append(reading)
    return opened


def _picture(content: bytes, most: int) -> Readings:
    return Readings(decode_image(io.BytesIO(content), _NAME, most))
