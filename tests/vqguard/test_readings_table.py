"""Every form in which a file may hold a picture: one picture for all readers, or not."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin
from transformers.image_utils import load_image

from vqguard.errors import ImageError
from vqguard.images import open_image, open_readings

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (12, 16, 4)).astype(np.uint8)
RGB = Image.fromarray(NOISE[..., :3])
RGBA = Image.fromarray(NOISE)
OPAQUE = Image.fromarray(np.dstack([NOISE[..., :3], np.full((12, 16), 255, np.uint8)]))
GREY = Image.fromarray(NOISE[..., 0])
DEEP = Image.fromarray(RNG.integers(0, 65536, (12, 16)).astype(np.uint16))
INDEXED = RGB.quantize(16)
OTHER = RGB.rotate(180)
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation='
    b'"6"/></rdf:RDF></x:xmpmeta>'
)

SAME, AMBIGUOUS, REFUSED = "same", "ambiguous", "refused"


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, kind, **options)  # a save leaves its settings on what it saved
    return buffer.getvalue()


def several(kind: str, **options: Any) -> bytes:
    return saved(RGB, kind, save_all=True, append_images=[OTHER.copy()], **options)


def profile(space: Any) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def chunk(kind: bytes, body: bytes) -> bytes:
    mark = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + mark


def with_chunk(kind: bytes, body: bytes, *, behind: bool = False) -> bytes:
    plain = saved(RGB, "png")
    place = plain.index(b"IEND" if behind else b"IDAT") - 4
    return plain[:place] + chunk(kind, body) + plain[place:]


def deep_png(colour: int, channels: int) -> bytes:
    rows = RNG.integers(0, 65536, (12, 16 * channels)).astype(">u2")
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", 16, 12, 16, colour, 0, 0, 0)
    parts = (b"IHDR", header), (b"IDAT", body), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


def described(text: bytes) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", text.decode())
    return info


Make = Callable[[], bytes]
TURNED = SIDEWAYS.tobytes()[6:]
FILES: dict[str, tuple[str, Make]] = {
    # transparency
    "alpha.png": (AMBIGUOUS, lambda: saved(RGBA, "png")),
    "alpha.webp": (AMBIGUOUS, lambda: saved(RGBA, "webp", lossless=True)),
    "alpha.tiff": (AMBIGUOUS, lambda: saved(RGBA, "tiff")),
    "premultiplied.tiff": (AMBIGUOUS, lambda: saved(RGBA, "tiff", tiffinfo={338: 1})),
    "unspecified.tiff": (AMBIGUOUS, lambda: saved(RGBA, "tiff", tiffinfo={338: 0})),
    "grey-alpha.png": (AMBIGUOUS, lambda: saved(RGBA.convert("LA"), "png")),
    "grey-alpha.tiff": (AMBIGUOUS, lambda: saved(RGBA.convert("LA"), "tiff")),
    "deep-alpha.png": (AMBIGUOUS, lambda: deep_png(6, 4)),
    "deep-grey-alpha.png": (AMBIGUOUS, lambda: deep_png(4, 2)),
    "palette-entry.png": (AMBIGUOUS, lambda: saved(INDEXED, "png", transparency=3)),
    "palette-bytes.png": (AMBIGUOUS, lambda: saved(INDEXED, "png", transparency=b"\0\x80\xff")),
    "palette-entry.gif": (AMBIGUOUS, lambda: saved(INDEXED, "gif", transparency=3)),
    "colour-key.png": (
        AMBIGUOUS,
        lambda: saved(RGB, "png", transparency=tuple(map(int, NOISE[0, 0, :3]))),
    ),
    "grey-key.png": (AMBIGUOUS, lambda: saved(GREY, "png", transparency=int(NOISE[0, 0, 0]))),
    "deep-key.png": (
        AMBIGUOUS,
        lambda: saved(DEEP, "png", transparency=int(np.asarray(DEEP)[0, 0])),
    ),
    "opaque.png": (SAME, lambda: saved(OPAQUE, "png")),
    "opaque.webp": (SAME, lambda: saved(OPAQUE, "webp", lossless=True)),
    "opaque.tiff": (SAME, lambda: saved(OPAQUE, "tiff")),
    # depth and colour
    "deep-grey.png": (AMBIGUOUS, lambda: saved(DEEP, "png")),
    "deep-grey.tiff": (AMBIGUOUS, lambda: saved(DEEP, "tiff")),
    "deep-rgb.png": (SAME, lambda: deep_png(2, 3)),
    "int32.tiff": (REFUSED, lambda: saved(Image.fromarray(NOISE[..., 0].astype("i4")), "tiff")),
    "float.tiff": (REFUSED, lambda: saved(Image.fromarray(NOISE[..., 0].astype("f4")), "tiff")),
    "lab.tiff": (REFUSED, lambda: saved(RGB.convert("LAB"), "tiff")),
    "ycbcr.tiff": (SAME, lambda: saved(RGB.convert("YCbCr"), "tiff")),
    "cmyk.jpg": (SAME, lambda: saved(RGB.convert("CMYK"), "jpeg")),
    "ycck.jpg": (SAME, lambda: _ycck()),
    "cmyk.tiff": (SAME, lambda: saved(RGB.convert("CMYK"), "tiff")),
    "grey.jpg": (SAME, lambda: saved(GREY, "jpeg")),
    "one-bit.png": (SAME, lambda: saved(RGB.convert("1"), "png")),
    "one-bit.tiff": (SAME, lambda: saved(RGB.convert("1"), "tiff")),
    "two-bits.png": (SAME, lambda: saved(INDEXED, "png", bits=4)),
    "palette.png": (SAME, lambda: saved(INDEXED, "png")),
    "palette.gif": (SAME, lambda: saved(INDEXED, "gif")),
    "palette.bmp": (SAME, lambda: saved(INDEXED, "bmp")),
    "alpha.bmp": (SAME, lambda: saved(RGBA, "bmp")),  # Pillow drops a bitmap's fourth byte
    "gamma.png": (SAME, lambda: with_chunk(b"gAMA", struct.pack(">I", 10))),
    "chromaticity.png": (SAME, lambda: with_chunk(b"cHRM", struct.pack(">8I", *[1] * 8))),
    "profile.png": (SAME, lambda: saved(RGB, "png", icc_profile=profile("sRGB"))),
    "profile.jpg": (SAME, lambda: saved(RGB, "jpeg", icc_profile=profile("LAB"))),
    # orientation
    "turned.jpg": (AMBIGUOUS, lambda: saved(RGB, "jpeg", exif=SIDEWAYS)),
    "turned.png": (AMBIGUOUS, lambda: saved(RGB, "png", exif=SIDEWAYS)),
    "turned-behind.png": (AMBIGUOUS, lambda: with_chunk(b"eXIf", TURNED, behind=True)),
    "turned.webp": (AMBIGUOUS, lambda: saved(RGB, "webp", exif=SIDEWAYS)),
    "turned-xmp.jpg": (AMBIGUOUS, lambda: saved(RGB, "jpeg", xmp=XMP)),
    "turned-xmp.webp": (AMBIGUOUS, lambda: saved(RGB, "webp", xmp=XMP)),
    "turned-xmp.png": (AMBIGUOUS, lambda: saved(RGB, "png", pnginfo=described(XMP))),
    "turned-grey.tiff": (AMBIGUOUS, lambda: saved(GREY, "tiff", exif=SIDEWAYS)),
    # several pictures
    "moving.png": (REFUSED, lambda: several("png")),
    "moving-default.png": (REFUSED, lambda: several("png", default_image=True)),
    "moving.gif": (REFUSED, lambda: several("gif")),
    "moving.webp": (REFUSED, lambda: several("webp")),
    "pages.tiff": (REFUSED, lambda: several("tiff")),
    "stereo.jpg": (SAME, lambda: several("mpo")),
}


def _ycck() -> bytes:
    """A CMYK picture whose Adobe mark says that it is YCCK."""
    made = bytearray(saved(RGB.convert("CMYK"), "jpeg"))
    made[made.index(b"Adobe") + 11] = 2
    return bytes(made)


def outcome(path: Path) -> str:
    try:
        return AMBIGUOUS if open_readings(path).ambiguous else SAME
    except ImageError:
        return REFUSED


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_one_picture_or_not(name: str, tmp_path: Path) -> None:
    expected, make = FILES[name]
    path = tmp_path / name
    path.write_bytes(make())
    assert outcome(path) == expected
    if expected == SAME:
        usual = load_image(str(path)).convert("RGB")
        assert usual.tobytes() == open_image(path).tobytes()


def test_the_same_in_a_process_that_has_loaded_nothing_else(tmp_path: Path) -> None:
    """Whichever decoders and libraries are loaded, in whichever order the files come."""
    for name, (_, make) in FILES.items():
        (tmp_path / name).write_bytes(make())
    program = """
import json, sys
from pathlib import Path
from vqguard.errors import ImageError
from vqguard.images import open_readings
found = {}
for path in sorted(Path(sys.argv[1]).iterdir(), reverse=sys.argv[2] == "back"):
    try:
        found[path.name] = "ambiguous" if open_readings(path).ambiguous else "same"
    except ImageError:
        found[path.name] = "refused"
assert "transformers" not in sys.modules
print(json.dumps(found))
"""
    for order in ("forth", "back"):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, str(tmp_path), order],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == {name: kind for name, (kind, _) in FILES.items()}
