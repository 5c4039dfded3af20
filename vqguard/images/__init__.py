"""Images that come from outside: which files are some, how one is opened, how else it could be."""

from vqguard.images.image_files import SUFFIXES, iter_images, looks_like_image
from vqguard.images.limits import MAX_BATCH_PIXELS, MAX_FILE
from vqguard.images.opening import (
    FORMATS,
    MAX_PIXELS,
    MIN_SIDE,
    check_header,
    check_image,
    decode_image,
    open_image,
)
from vqguard.images.readings import Readings, check_plain, decode_readings, open_readings

__all__ = [
    "FORMATS",
    "MAX_BATCH_PIXELS",
    "MAX_FILE",
    "MAX_PIXELS",
    "MIN_SIDE",
    "SUFFIXES",
    "Readings",
    "check_header",
    "check_image",
    "check_plain",
    "decode_image",
    "decode_readings",
    "iter_images",
    "looks_like_image",
    "open_image",
    "open_readings",
]
