"""Images in folders, zips and tars: the same samples, and archives that cannot be trusted."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vqguard.errors import DataError, InputError
from vqguard.recipes.data import image_roots
from vqguard.recipes.data.image_roots import ImageRoot, image_root
from vqguard.recipes.data.llava_json import read_llava

NAMES = ["a.png", "deep/b.png", "deep/deeper/c.jpg"]


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for seed, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(root / name)
    return root


def pack_zip(folder: Path, to: Path) -> Path:
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in NAMES:
            archive.write(folder / name, name)
    return to


def pack_tar(folder: Path, to: Path) -> Path:
    with tarfile.open(to, "w") as archive:
        archive.add(folder, arcname=".")
    return to


PACK: dict[str, Callable[[Path, Path], Path]] = {
    "zip": pack_zip,
    "tar": pack_tar,
    "folder": lambda folder, to: folder,
}


@pytest.fixture(params=PACK)
def root(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> ImageRoot:
    return image_root(PACK[request.param](folder, tmp_path / f"images.{request.param}"))


def llava(path: Path, names: list[str]) -> Path:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Noise."}]
    path.write_text(json.dumps([{"id": n, "image": n, "conversations": turns} for n in names]))
    return path


def test_the_same_pictures_wherever_they_are(root: ImageRoot, folder: Path, tmp_path: Path) -> None:
    data = read_llava(llava(tmp_path / "data.json", NAMES), root.path)
    assert [sample.id for sample in data.samples] == NAMES
    for sample in data.samples:
        assert sample.image is not None
        opened = sample.image()
        assert opened.mode == "RGB"
        with Image.open(folder / sample.id) as wanted:
            assert opened.tobytes() == wanted.convert("RGB").tobytes()
        assert sample.image().tobytes() == opened.tobytes()  # as often as asked for


@pytest.mark.parametrize("name", ["../data.json", "deep/../../data.json", "/etc/hostname"])
def test_names_that_leave_the_root(root: ImageRoot, name: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(DataError, match="leaves the image root"):
        root.read(name)


def test_missing_and_broken_files_are_named_or_skipped(root: ImageRoot, tmp_path: Path) -> None:
    data = llava(tmp_path / "data.json", [*NAMES, "none.png"])
    with pytest.raises(DataError, match=r"entry 3 \(id none.png\).*missing"):
        read_llava(data, root.path)
    found = read_llava(data, root.path, skip_bad=True)
    assert len(found.samples) == 3
    assert "none.png" in found.skipped[0]


def tar_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


def test_hostile_members_of_a_tar_are_out_of_reach(tmp_path: Path) -> None:
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    hard = tarfile.TarInfo("hard.png")
    hard.type, hard.linkname = tarfile.LNKTYPE, "a.png"
    device = tarfile.TarInfo("device.png")
    device.type = tarfile.CHRTYPE
    path = tar_of(
        tmp_path / "x.tar",
        (tarfile.TarInfo("a.png"), png()),
        (link, b""),
        (hard, b""),
        (device, b""),
        (tarfile.TarInfo("../out.png"), png()),
        (tarfile.TarInfo("twice.png"), png(1)),
        (tarfile.TarInfo("./twice.png"), png(2)),
    )
    before = sorted(tmp_path.rglob("*"))
    root = image_root(path)
    assert root.read("a.png") == png()
    for name, message in (
        ("link.png", "link or a special"),
        ("hard.png", "link or a special"),
        ("device.png", "link or a special"),
        ("../out.png", "leaves the image root"),
        ("twice.png", "more than once"),
    ):
        with pytest.raises(DataError, match=message):
            root.read(name)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is unpacked to disk


def test_a_zip_that_lies_about_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_roots, "MAX_BYTES", 10_000)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("honest.png", bytes(50_000))
    with pytest.raises(DataError, match="50,000 bytes unpacked"):
        image_root(path).read("honest.png")
    raw = path.read_bytes()
    # both headers promise 100 bytes
    path.write_bytes(raw.replace(struct.pack("<I", 50_000), struct.pack("<I", 100)))
    with pytest.raises(DataError, match="unpacked"):
        image_root(path).read("honest.png")


def test_encrypted_doubled_and_damaged_zips(tmp_path: Path) -> None:
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", png())
        archive.writestr("twice.png", png(1))
        archive.writestr("./twice.png", png(2))
    with pytest.raises(DataError, match="more than once"):
        image_root(path).read("twice.png")
    raw = bytearray(path.read_bytes())
    raw[raw.index(png()[8:40]) + 20] ^= 0xFF  # the content, so its CRC fails
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="cannot be unpacked"):
        image_root(path).read("a.png")
    directory = raw.index(b"PK\x01\x02")
    raw[directory + 8] |= 1  # the flag of encryption
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="encrypted"):
        image_root(path).read("a.png")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.rar", "none.zip"])
def test_what_is_no_archive(name: str, tmp_path: Path) -> None:
    if not name.startswith("none"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(DataError, match=name):
        image_root(tmp_path / name)


def test_compressed_and_cut_off_tars(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "gz.tar"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(folder, arcname=".")
    with pytest.raises(DataError, match="gunzip"):
        image_root(packed)
    whole = tar_of(tmp_path / "cut.tar", (tarfile.TarInfo("a.png"), os.urandom(50_000)))
    whole.write_bytes(whole.read_bytes()[:20_000])
    with pytest.raises(DataError, match=r"cut\.tar"):
        image_root(whole)


def test_a_member_that_is_no_image(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", (tarfile.TarInfo("a.png"), b"text"))
    with pytest.raises(InputError, match="not an image that is accepted"):
        image_root(path).check("a.png")
    entries: Any = llava(tmp_path / "data.json", ["a.png"])
    with pytest.raises(DataError, match=r"entry 0.*not an image that is accepted"):
        read_llava(entries, path)


@pytest.mark.alone
def test_workers_may_share_a_root(root: ImageRoot) -> None:
    wanted = {name: root.read(name) for name in NAMES}
    assert {name: pickle.loads(pickle.dumps(root)).read(name) for name in NAMES} == wanted
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for _ in range(3):
            assert pool.map(root.read, NAMES) == list(wanted.values())
    assert {name: root.read(name) for name in NAMES} == wanted


def test_a_check_reads_headers_only(root: ImageRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(self: ImageRoot, name: str) -> bytes:
        raise AssertionError("read the whole file")

    monkeypatch.setattr(ImageRoot, "read", never)
    monkeypatch.setattr(image_roots.ZipRoot, "read", never)
    for name in NAMES:
        root.check(name)


@given(
    content=st.binary(max_size=300),
    steps=st.lists(st.tuples(st.integers(-40, 320), st.integers(0, 99))),
)
def test_a_part_of_a_file_reads_like_a_file(
    content: bytes, steps: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("tar") / "x.tar"
    tar_of(path, (tarfile.TarInfo("a"), content), (tarfile.TarInfo("b"), b"behind"))
    wanted = io.BytesIO(content)
    with image_root(path).stream("a") as stream:
        for to, count in steps:
            assert stream.seek(max(0, to)) == wanted.seek(max(0, to))
            assert stream.read(count) == wanted.read(count)
        assert stream.seek(0, io.SEEK_END) == len(content)
