"""What an image file may ask for before it is refused: bytes, steps, scans, memory.

A header of some hundred bytes can ask a decoder for hours or for all memory; the limit on pixels
says nothing of that. Each limit is far above what cameras and programs write.
"""

from __future__ import annotations

import re
from typing import Any, BinaryIO, cast

from PIL import Image

from vqguard.bounded import CountedStream
from vqguard.errors import ImageError

MAX_FILE = 256 * 2**20
"""Bytes of an image file, wherever it lies: 64 million pixels of 4 bytes, not compressed."""
MAX_BATCH_PIXELS = 128_000_000
"""Pixels that are held decoded at a time, where pictures are opened for a batch: 0.5 GB."""
MAX_HEADER = 16 * 2**20
"""Bytes that a decoder may read to tell size and type, previews and metadata among them."""
MAX_HEADER_PIECE = 2 * 2**20
"""Bytes of one entry of a header: the places of 250 000 tiles, which is 64 million pixels."""
MAX_STEPS = 1_000_000
"""Reads and seeks of a decoder's own code, a microsecond or two each: what 64 MB of GIF need."""
MAX_EXIF = 2**16
"""Bytes of EXIF, all that a JPEG segment holds. Its entries may overlap: n bytes give up to n²/48
in memory."""
MAX_SCANS = 100
"""Scans of a JPEG; each goes over the whole picture. libtiff has the same limit; cameras and
programs write 1 to 20."""
MAX_MARKERS = 10_000
"""Segments of a JPEG."""
MAX_FRAME = 1_000
"""Largest number of a frame that is asked for."""
MAX_FRAME_PIXELS = 1_000_000_000
"""Pixels decoded to come to a frame that builds on those before it (GIF, PNG, WebP): some 10 s."""

_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_WITHOUT_LENGTH, _SCAN, _END = (0x01, 0xD8), 0xDA, 0xD9
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # TIFF tags
_BUILT_ON = ("GIF", "PNG", "WEBP")


class ImageStream:
    """An image file for a decoder, which may ask it for so much and no more."""

    def __init__(self, stream: BinaryIO, name: object) -> None:
        """Refuses a file that is larger than `MAX_FILE`."""
        self._counted = CountedStream(
            stream, most_calls=MAX_STEPS, most_read=MAX_HEADER_PIECE, most_bytes=MAX_HEADER
        )
        self._name = name
        if self._counted.size > MAX_FILE:
            raise ImageError(
                f"{name}: has {self._counted.size:,} bytes, at most {MAX_FILE:,} are accepted; save"
                " it as PNG or JPEG"
            )
        self.file = cast(BinaryIO, self._counted)

    def header_is_read(self) -> None:
        """From now on the pixels may be read."""
        self._counted.most_read = None
        self._counted.most_bytes = 4 * self._counted.size + MAX_HEADER

    def check_body(self, image: Image.Image) -> None:
        """Refuses what would cost too much to decode, before that is done."""
        if image.format in ("JPEG", "MPO"):
            place = self.file.tell()
            self.file.seek(0)
            _check_scans(self._name, self.file.read())
            self.file.seek(place)
        check_exif(self._name, image)


def check_exif(name: object, image: Image.Image) -> None:
    """Refuses metadata that is too large to look through."""
    exif = image.info.get("exif") or b""
    hexed = image.info.get("Raw profile type exif") or ""
    if len(exif) > MAX_EXIF + 16 or len(hexed) > 2 * MAX_EXIF + 4096:
        raise ImageError(
            f"{name}: its EXIF data have more than {MAX_EXIF:,} bytes; save it without metadata"
        )


def check_frame(name: object, image: Image.Image, frame: int) -> None:
    """Refuses a frame that is too far to go to."""
    width, height = image.size
    steps = (frame + 1) * width * height if image.format in _BUILT_ON else 0
    if frame > MAX_FRAME or steps > MAX_FRAME_PIXELS:
        raise ImageError(
            f"{name}: frame {frame} is too far from the first (at most {MAX_FRAME:,}, and "
            f"{MAX_FRAME_PIXELS:,} pixels on the way); save the frames as separate images"
        )


def check_tiles(name: object, image: Image.Image, max_pixels: int) -> None:
    """Refuses a TIFF of tiles that are larger than a picture may be.

    The decoder makes room for a whole one, however little of it the picture shows.
    """
    tags: Any = getattr(image, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_HEIGHT, 0)
    if width * height > max_pixels:
        raise ImageError(f"{name}: its tiles have {width} x {height} pixels; save it as PNG")


def _check_scans(name: object, content: bytes) -> None:
    scans = markers = place = 0
    while found := _MARKER.search(content, place):
        code, place = content[found.start() + 1], found.end()
        if code == _END:
            break
        if code in _WITHOUT_LENGTH:
            continue
        scans += code == _SCAN
        markers += 1
        if scans > MAX_SCANS or markers > MAX_MARKERS:
            raise ImageError(
                f"{name}: has more than {MAX_SCANS} scans or {MAX_MARKERS:,} segments; save it "
                "again as PNG or JPEG"
            )
        place += max(2, int.from_bytes(content[place : place + 2], "big"))
