"""What no reader reads: media are refused, all else is counted and said once a data set.

So no sample is trained as text because its picture or video stood under another name.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vqguard.errors import DataError
from vqguard.videos import ENDINGS

log = logging.getLogger(__name__)

PICTURES = frozenset("jpg jpeg jfif png webp bmp gif tif tiff".split())
"""Endings of the pictures that are read."""
OTHER_MEDIA = frozenset(
    "mpg mpeg wmv flv ts m2ts 3gp ogv mp3 wav flac ogg opus m4a aac "
    "heic heif avif jxl jp2 svg pdf ppm pgm exr dcm psd".split()
)
"""Endings of media that are neither read as pictures nor as videos."""
_KEYS = frozenset(
    "image images picture pictures video videos frames audio audios sound speech".split()
)


def refuse_media(record: Mapping[str, Any], read: Container[str], where: str) -> None:
    """Refuse a picture, a video or a sound under a key that is not read.

    Args:
        record: an entry, a turn, or a part of one.
        read: the keys that are read.
        where: how the message calls it.

    Raises:
        DataError: naming the key.
    """
    for key, value in record.items():
        if key in read or value is None or value == "" or value == [] or value == {}:
            continue
        if is_media_key(key) or _names_media(value):
            raise DataError(
                f"{where}: {key!r} holds {str(value)[:60]!r}, which is not read here. Pictures "
                "are named by 'image', videos by 'video'; sound is not trained on. Leave the key "
                "out if the text stands without it."
            )


def is_media_key(key: str) -> bool:
    """Whether a key or a column is called as pictures, videos or sound are."""
    return key.lower() in _KEYS


def count_unread(counter: Counter[str], record: Mapping[str, Any], read: Container[str]) -> None:
    """Count a record's keys that are not read."""
    counter.update(repr(key) for key in record if key not in read)


def log_unread(data: Path, counter: Counter[str]) -> None:
    """Say once what was not read of a data set."""
    if counter:
        parts = ", ".join(f"{name} ({count:,})" for name, count in counter.most_common(20))
        more = f" and {len(counter) - 20} more" if len(counter) > 20 else ""
        log.info("%s: not read: %s%s", data, parts, more)


def ending_of(name: str) -> str:
    """A name's last ending, in lower case and without its dot."""
    return PurePosixPath(name).suffix.lower().removeprefix(".")


def _names_media(value: Any) -> bool:
    """Whether this is a file name of a medium, or a list with one. An address on the web is not."""
    if isinstance(value, list):
        return any(_names_media(part) for part in value)
    if not isinstance(value, str) or len(value) > 4096 or "://" in value or "\n" in value:
        return False
    return ending_of(value) in PICTURES | ENDINGS | OTHER_MEDIA
