"""Archives and data files made to take all time or memory end within a bound, by name."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.limited_process import run_limited
from vqguard.errors import DataError, InputError
from vqguard.recipes import image_batches
from vqguard.recipes.data import image_roots
from vqguard.recipes.data.image_roots import TarRoot, ZipRoot, image_root
from vqguard.recipes.data.llava_json import read_entries, read_llava

IMPORTS = """
from pathlib import Path
from vqguard.errors import InputError
from vqguard.recipes.data.image_roots import image_root
"""
LIST = """
try:
    root = image_root(Path(sys.argv[1]))
    for name in list(root._files):
        try:
            root.check(name)
            print("fine")
        except InputError as error:
            print(error)
except InputError as error:
    print(error)
"""


def block(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A tar's header, with a size that tarfile would not write."""
    info = tarfile.TarInfo(name)
    info.type = kind
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if 0 <= size < 8**11:
        raw[124:136] = f"{size:011o}\0".encode()
    else:
        raw[124:136] = (b"\xff" if size < 0 else b"\x80") + (size % 256**11).to_bytes(11, "big")
    raw[148:156] = b" " * 8
    raw[148:156] = f"{sum(raw[:512]):06o}\0 ".encode()
    return bytes(raw[:512])


def pax(text: str) -> bytes:
    line = f"{len(text) + 3:d} {text}\n" if len(text) + 3 > 9 else f"{len(text) + 2} {text}\n"
    body = line.encode()
    return block("pax", len(body), b"x") + body.ljust(512, b"\0")


END = bytes(1024)
TARS: dict[str, tuple[bytes, str]] = {
    "back to itself": (block("a.png", -512) + END, "size|tar"),
    "back by one": (block("a.png", 0) * 2 + block("b.png", -1024) + END, "size|tar"),
    "minus one": (block("a.png", -1) + END, "size|tar"),
    "far beyond": (block("a.png", 2**80) + END, "ends before|tar"),
    "beyond the end": (block("a.png", 2**33) + END, "ends before|tar"),
    "a long name that goes back": (block("x", -512, b"L") + END, "tar"),
    "an extended header that goes back": (block("x", -512, b"x") + END, "tar"),
    "an extended header of gigabytes": (block("x", 2**33, b"x") + END, "tar"),
    "an extended size that goes back": (pax("size=-1024") + block("a.png", 0) + END, "size|tar"),
    "headers of headers": (block("x", 0, b"x") * 20_000 + END, "tar"),
    "long names of long names": (block("x", 0, b"L") * 20_000 + END, "tar"),
}


@pytest.mark.parametrize("name", TARS)
def test_crafted_tars_end(tmp_path: Path, name: str) -> None:
    content, message = TARS[name]
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        TarRoot(path)
    assert "x.tar" in str(caught.value)


def test_the_tar_of_two_kilobytes_and_the_zip_of_66(tmp_path: Path) -> None:
    """In processes of their own: a regression would not end."""
    path = tmp_path / "back.tar"
    path.write_bytes(TARS["back to itself"][0])
    assert "size" in run_limited(IMPORTS, LIST, path, seconds=5, megabytes=50)
    path = tmp_path / "bomb.zip"
    gif = io.BytesIO()
    Image.new("P", (6, 4)).save(gif, "gif")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("a.gif", gif.getvalue()[:-1] + bytes(64 * 2**20))
        archive.writestr("b.gif", gif.getvalue()[:-1] + bytes(15 * 2**20))
    assert path.stat().st_size < 90_000
    said = run_limited(IMPORTS, LIST, path, seconds=10, megabytes=100).splitlines()
    assert "unpacks from" in said[0]
    assert "too many" in said[1]


def test_a_member_is_unpacked_once_however_its_reader_steps(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    content = bytes(range(256)) * 1000
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", content)
    with ZipRoot(path).stream("a") as stream:
        for place in (200_000, 5, 255_990, 0, 100):
            stream.seek(place)
            assert stream.read(20) == content[place : place + 20]
        stream.seek(-10, io.SEEK_END)
        assert stream.read() == content[-10:]


def test_a_zip_s_directory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(100):
            archive.writestr(f"{number}.png", b"")
    monkeypatch.setattr(image_roots, "MAX_DIRECTORY", 1000)
    with pytest.raises(DataError, match="cannot be read as a zip"):
        image_root(path)


def test_members_are_counted_folders_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_roots, "MAX_MEMBERS", 10)
    (tmp_path / "x.tar").write_bytes(block("folder/", 0, b"5") * 20 + END)
    with pytest.raises(DataError, match="more than 10 members"):
        image_root(tmp_path / "x.tar")


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_archives_raise_the_projects_errors_only(
    tmp_path: Path, data: st.DataObject
) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    kind = data.draw(st.sampled_from(["tar", "zip"]))
    buffer = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name in ("a.png", "é" * 120 + ".png"):
                info = tarfile.TarInfo(name)
                info.size = len(picture.getvalue())
                tar.addfile(info, io.BytesIO(picture.getvalue()))
    else:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.png", picture.getvalue())
            archive.writestr("b.png", picture.getvalue())
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, min(len(content), 3000) - 1))] = data.draw(
            st.sampled_from([0, 0x2D, 0x37, 0x80, 0xFF])
        )
    path = tmp_path / f"x.{kind}"
    path.write_bytes(content)
    try:
        root = image_root(path)
        for name in ("a.png", "b.png"):
            root.check(name)
            root.read(name)
    except InputError:
        pass


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png", "x" * 5000 + ".png", "loop/a.png"])
def test_names_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    data = tmp_path / "data.json"
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]
    data.write_text(json.dumps([{"id": 0, "image": name, "conversations": turns}]))
    with pytest.raises(DataError, match="entry 0"):
        read_llava(data, tmp_path)


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b"])
def test_texts_that_cannot_be_encoded(tmp_path: Path, text: str) -> None:
    data = tmp_path / "data.json"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A."}]
    data.write_text(json.dumps([{"id": 0, "conversations": turns}]))
    with pytest.raises(DataError, match="half a character"):
        read_llava(data, tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**5, "[" + "9" * 5000 + "]", "[" * 90 + "]" * 90, "{"])
def test_data_files_that_are_no_entries(tmp_path: Path, text: str) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=r"data\.json"):
        read_entries(tmp_path / "data.json")


def test_sizes_are_written_as_tars_have_them() -> None:
    assert struct.unpack(">q", block("a", -512)[128:136])[0] == -512


def test_batches_end_where_their_pictures_are_too_many_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(image_batches, "MAX_BATCH_PIXELS", 100)
    monkeypatch.setattr(image_batches, "IMAGES", 3)
    sides = [5, 5, 5, 9, 20, 5, 9, 2, 2, 2, 2]
    opened: list[int] = []

    def open_them() -> Iterator[Image.Image]:
        for side in sides:
            opened.append(side)
            yield Image.new("L", (side, side))

    found = []
    for batch in image_batches.batches(open_them(), image_batches.pixel_count):
        found.append([image.width for image in batch])
        assert len(opened) <= sum(map(len, found)) + 1
    assert found == [[5, 5, 5], [9], [20], [5], [9, 2, 2], [2, 2]]


def _sparse_extensions() -> bytes:
    """A member whose map of holes goes on in block after block, some 6 MB of them."""
    header = bytearray(block("a.png", 10, b"S"))
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    more = bytearray(b"00000000001\0" * 42 + b"\1" + bytes(7))
    return bytes(header) + bytes(more) * 12_000


def _extended_headers(kind: bytes) -> bytes:
    """Extended headers of 900 kB, one after another."""
    body = b"".join(b"13 k%06d=v\n" % number for number in range(64_000))
    one = block("x", len(body), kind) + body + bytes(-len(body) % 512)
    return b"".join([one + (block("a.png", 0) if kind == b"x" else b"")] * 20) + bytes(1024)


@pytest.mark.parametrize("name", ["sparse", "x", "g"])
def test_a_tar_of_headers_is_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "a.tar"
    kinds = {"x": b"x", "g": b"g"}
    content = _extended_headers(kinds[name]) if name in kinds else _sparse_extensions()
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"more bytes are asked for"):
        TarRoot(archive)


def test_a_zip_s_name_of_no_letters_is_no_crash(tmp_path: Path) -> None:
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", b"x")
        file.writestr("b.png", b"x")
    # zipfile ends a name at a NUL
    archive.write_bytes(archive.read_bytes().replace(b"a.png", b"\0.png"))
    names = list(ZipRoot(archive)._files)
    assert "b.png" in names
