"""Files made to take all time or memory: each ends within a bound, with the project's own error."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.limited_process import run_limited
from vqguard.errors import ArtefactError, ConfigError, ImageError
from vqguard.files import file_sha256
from vqguard.images import limits, open_image, opening
from vqguard.text_files import MAX_DEPTH, parse_json, parse_yaml, read_json, read_yaml

from .test_images import encode, picture, png_chunk

OPEN = """
from vqguard.errors import ImageError
from vqguard.images import open_image
"""
TRY = """
try:
    print(open_image(sys.argv[1]).size)
except ImageError as error:
    print(error)
"""


def sparse(path: Path, start: bytes, size: int) -> None:
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


def gif_start() -> bytes:
    return encode(picture(6, 4), "gif")[:-1]  # without its end


def deep_png(side: int) -> bytes:
    """A square of 16-bit grey, all zero."""
    rows = zlib.compress(bytes(side * (2 * side + 1)), 9)
    header = struct.pack(">IIBBBBB", side, side, 16, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", rows)
        + png_chunk(b"IEND", b"")
    )


def scans(count: int, side: int = 7000) -> bytes:
    """A progressive JPEG whose first scan stands there again and again, empty."""
    whole = encode(Image.new("L", (side, side)), "jpeg", progressive=True)
    start = whole.index(b"\xff\xda")
    length = int.from_bytes(whole[start + 2 : start + 4], "big")
    return whole[:-2] + (whole[start : start + 2 + length] + b"\x00") * count + b"\xff\xd9"


def tiff(tags: list[tuple[int, int, int, bytes]], rest: bytes = b"") -> bytes:
    """One directory of (tag, type, count, value) behind the header, then `rest`."""
    entries = b"".join(struct.pack("<HHI4s", *tag) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + rest


def overlapping_exif(entries: int, size: int) -> bytes:
    """Entries that all name the same bytes as theirs."""
    start = 8 + 2 + 12 * entries + 4
    place = struct.pack("<I", start)
    tags = [(0x9000 + number, 5, size // 8, place) for number in range(entries - 1)]
    tags.append((0x0112, 3, 1, struct.pack("<HH", 6, 0)))
    return tiff(tags, b"\x01\0\0\0" * (size // 4))


def huge_tiles() -> bytes:
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1, 322: 40_000, 323: 40_000}
    data = zlib.compress(bytes(2**20), 9)
    known = [(tag, 4, 1, struct.pack("<I", value)) for tag, value in tags.items()]
    known += [(325, 4, 1, struct.pack("<I", len(data)))]
    place = 8 + 2 + 12 * (len(known) + 1) + 4
    return tiff([*known, (324, 4, 1, struct.pack("<I", place))], data)


def png_of_pieces(count: int) -> bytes:
    whole = encode(picture(64, 64), "png")
    start = whole.index(b"IDAT") - 4
    return whole[:start] + png_chunk(b"IDAT", b"") * count + whole[start:]


CRAFTED: dict[str, tuple[Callable[[], bytes], str]] = {
    "scans": (lambda: scans(40_000), "scans"),
    "segments": (lambda: scans(1, 64)[:-2] + b"\xff\xfe\0\2" * 20_000, "segments"),
    "tiles": (huge_tiles, "tiles"),
    "exif": (
        lambda: encode(picture(), "jpeg", exif=b"Exif\0\0" + overlapping_exif(4000, 16_000)),
        r"\(16, 24\)",
    ),
    "large exif": (lambda: encode(picture(), "png", exif=overlapping_exif(9000, 400_000)), "EXIF"),
    "many pieces": (lambda: png_of_pieces(1_200_000), "too many or too small|more bytes"),
    "a bomb in a profile": (
        lambda: encode(picture(), "png", icc_profile=bytes(100 * 2**20)),
        r"\(24, 16\)|truncated",
    ),
    "half a header": (lambda: tiff([(256, 4, 1, b"\1\0\0\0")]) * 10, "not an image|truncated"),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_crafted_images_take_a_bounded_time_and_memory(tmp_path: Path, name: str) -> None:
    make, message = CRAFTED[name]
    path = tmp_path / "crafted"
    path.write_bytes(make())
    said = run_limited(OPEN, TRY, path, seconds=15, megabytes=600)
    assert re.search(message, said), said


@pytest.mark.parametrize("size", [200 * 2**20, 3 * 2**30])
@pytest.mark.parametrize("kind", ["gif", "webp", "png", "jpeg", "bmp", "tiff"])
def test_sparse_images_end_soon(tmp_path: Path, kind: str, size: int) -> None:
    start = gif_start() if kind == "gif" else encode(picture(), kind)
    path = tmp_path / "sparse"
    sparse(path, start, size)
    said = run_limited(OPEN, TRY, path, seconds=15, megabytes=900)
    assert said, "a size or an error"
    if size > limits.MAX_FILE:
        assert "bytes, at most" in said


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="has no devices")
def test_devices_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "guard.safetensors"
    path.symlink_to("/dev/zero")
    with pytest.raises(ImageError, match="not a regular file"):
        open_image(path)
    with pytest.raises(ArtefactError, match="not a regular file"):
        file_sha256(path)
    with pytest.raises(ArtefactError, match="not a regular file"):
        read_json(path, ArtefactError)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_yaml(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ArtefactError, match="not a regular file"):
        file_sha256(path)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_json(path, ConfigError)


def test_deep_grey_takes_no_more_memory_than_other_pictures(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    path.write_bytes(deep_png(8000))
    assert path.stat().st_size < 200_000
    # 64 million pixels: 128 MB as they are, 256 MB as RGB
    said = run_limited(OPEN, TRY, path, seconds=20, megabytes=500)
    assert said == "(8000, 8000)"


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_strips_give_the_picture_that_the_whole_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (60, 40, 4), dtype=np.uint8)
    image = Image.fromarray(values)
    options: dict[str, Any] = {}
    if mode == "I;16":
        image = Image.fromarray(values.view(np.uint16)[..., 0].copy())
    elif mode == "P":
        image = image.convert("RGB").quantize(20)
        options["transparency"] = bytes(range(0, 200, 10))
    elif mode == "LA":
        image = image.convert("LA")
    path = tmp_path / "image.png"
    image.save(path, **options)
    whole = open_image(path)
    monkeypatch.setattr(opening, "_STRIP_PIXELS", 41)
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(whole))


def test_a_frame_that_is_far_off_is_not_sought(tmp_path: Path) -> None:
    path = tmp_path / "frames.gif"
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match="too far"):
        open_image(path, frame=limits.MAX_FRAME + 1)
    with pytest.raises(ImageError, match=r"0\.\.2"):
        open_image(path, frame=5)


def test_ordinary_jpegs_have_few_scans(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for options in ({"progressive": True}, {"restart_marker_blocks": 1}, {"quality": 100}):
        path = tmp_path / "image.jpg"
        Image.fromarray(noise).save(path, **options)
        path.write_bytes(path.read_bytes() + os.urandom(10**6))  # as phones append a film
        assert open_image(path).size == (64, 64)


# -- texts

PARSE = """
from vqguard.errors import ConfigError
from vqguard.text_files import parse_json, parse_yaml, read_json
"""
BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
)
TEXTS: dict[str, tuple[str, str, str]] = {
    "aliases": ("parse_yaml", BOMB, "anchors"),
    "a merged alias": ("parse_yaml", "a: &a {b: 1}\nc: {<<: *a}", "anchors"),
    "an alias of itself": ("parse_yaml", "&a [*a]", "anchors"),
    "many keys": (
        "parse_json",
        json.dumps({f"k{n}": 0 for n in range(40_000)})[:-1] + ', "k7": 1}',
        "given twice: k7",
    ),
    "many keys of YAML": ("parse_yaml", "\n".join(f"k{n}: 0" for n in range(10_000)), "read"),
    "a long number": ("parse_json", "[" + "9" * 5000 + "]", "5,000 characters"),
    "a very long number": ("parse_json", "[" + "9" * 10**6 + "]", "characters"),
    "a long number of YAML": ("parse_yaml", "a: " + "9" * 5000, "5,000 characters"),
    "base sixty": ("parse_yaml", "a: 1" + ":59" * 30_000, "characters"),
    "base sixty with a point": ("parse_yaml", "a: 1" + ":59" * 30_000 + ".5", "not valid"),
    "a long fraction": ("parse_json", "[0." + "9" * 10**6 + "]", "read"),
    "beyond floats": ("parse_json", "[1e999]", "not a finite number"),
    "deep": ("parse_json", "[" * 10**6, "deep|not valid"),
    "deep and closed": ("parse_json", "[" * 900 + "]" * 900, "deep"),
    "deep mappings": ("parse_json", '{"a":' * 900 + "1" + "}" * 900, "deep"),
    "deep YAML": ("parse_yaml", "[" * 50_000, "deep"),
    "deep block YAML": ("parse_yaml", "- " * 50_000, "deep"),
    "deep questions": ("parse_yaml", "? " * 50_000, "deep"),
    "large YAML": ("parse_yaml", "a: b\n" * 10**6, "at most"),
    "half a character": ("parse_json", r'["\ud800"]', "half a character"),
    "half a character of YAML": ("parse_yaml", r'"\ud800"', "half a character"),
    "no character": ("parse_yaml", r'"\Uffffffff"', "not valid"),
    "no such day": ("parse_yaml", "a: 2001-99-99", "not valid"),
    "an odd tag": ("parse_yaml", "!!timestamp x", "not valid"),
    "an odd number": ("parse_yaml", "!!int ''", "not valid"),
    "an object": ("parse_yaml", "!!python/object/apply:os.system [x]", "not valid"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_crafted_texts_are_refused_with_their_name(name: str) -> None:
    reader, text, message = TEXTS[name]
    parse = {"parse_json": parse_json, "parse_yaml": parse_yaml}[reader]
    if message == "read":
        parse(text, "guard.json")
        return
    with pytest.raises(ConfigError, match=message) as caught:
        parse(text, "guard.json")
    assert str(caught.value).startswith("guard.json")
    assert len(str(caught.value)) < 2000


def test_crafted_texts_take_a_bounded_time_and_memory(tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    program = """
import json
for reader, text, _ in json.loads(open(sys.argv[1]).read()).values():
    try:
        globals()[reader](text)
    except ConfigError:
        pass
"""
    run_limited(PARSE, program, tmp_path / "texts.json", seconds=20, megabytes=300)


def test_the_depth_that_is_allowed() -> None:
    for parse in (parse_json, parse_yaml):
        parse("[" * MAX_DEPTH + "]" * MAX_DEPTH)
        with pytest.raises(ConfigError, match="deep"):
            parse("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_pairs_of_surrogates_are_characters() -> None:
    assert parse_json(json.dumps(["\U0001f600"])) == ["\U0001f600"]


def test_what_others_wrote_may_be_loose_but_not_unbounded() -> None:
    assert parse_json('{"a": 1, "a": NaN}', strict=False).keys() == {"a"}
    for text in ("[" * 10**5, "[" + "9" * 5000 + "]", "[" * 99 + "]" * 99):
        with pytest.raises(ConfigError):
            parse_json(text, strict=False)


def error_of(parse: Callable[..., Any], text: str) -> str:
    """What is said of a text called "the file"; any error but the project's own comes out."""
    try:
        parse(text, "the file")
    except ConfigError as error:
        return str(error)
    return "the file is fine"


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(value=_json, data=st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_json_and_yaml_raise_the_projects_errors_only(
    value: Any, data: st.DataObject
) -> None:
    text = list(json.dumps(value))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(text)))
        text.insert(place, data.draw(st.sampled_from('{}[]",:&*!|>?-#%@`\\\n\t\0u9eE.\ud800~=<')))
    for parse in (parse_json, parse_yaml):
        assert error_of(parse, "".join(text)).startswith("the file")


@given(text=st.text(alphabet="ab01:-[]{},&*!<>|?#%'\"\\\n .~=@u", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_as_yaml_raises_the_projects_errors_only(text: str) -> None:
    assert error_of(parse_yaml, text).startswith("the file")


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    for name in ("a\0b", "\ud800", "x" * 5000):
        for read in (lambda p: read_json(p, ConfigError), read_yaml):
            with pytest.raises(ConfigError, match="cannot read"):
                read(tmp_path / name)
        with pytest.raises(ArtefactError, match="cannot read"):
            file_sha256(tmp_path / name)
        with pytest.raises(ImageError, match="cannot be reached"):
            open_image(tmp_path / name)
