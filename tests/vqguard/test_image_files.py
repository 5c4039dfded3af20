"""Which files of a folder are images: by content, whatever they are called and however linked."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vqguard.errors import ImageError
from vqguard.images import FORMATS, iter_images, looks_like_image, open_image
from vqguard.images.image_files import LINKED_AGAIN, NOT_AN_IMAGE, NOT_REGULAR


def encode(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, kind)
    return buffer.getvalue()


def search(folder: Path) -> tuple[list[str], dict[str, str]]:
    """What is handed on, and what is left out and why, by names in the folder."""
    left_out: dict[str, str] = {}

    def report(path: Path, reason: str) -> None:
        left_out[path.relative_to(folder).as_posix()] = reason

    found = [path.relative_to(folder).as_posix() for path in iter_images(folder, report)]
    return found, left_out


@pytest.mark.parametrize("kind", [*FORMATS, "MPO"])
@pytest.mark.parametrize("name", ["picture", "p.jpe", "p.jfif", "p.mpo", "p.apng", "p.txt", ".p"])
def test_an_image_is_found_whatever_it_is_called(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / name).write_bytes(encode(kind))
    open_image(tmp_path / name)
    assert search(tmp_path) == ([name], {})


@given(content=st.binary(max_size=40), kind=st.sampled_from(FORMATS), keep=st.integers(0, 200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
def test_whatever_opens_is_found(tmp_path: Path, content: bytes, kind: str, keep: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(encode(kind)[:keep] + content)
    try:
        open_image(path)
    except ImageError:
        return
    assert looks_like_image(path)


def test_each_other_file_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    found, left_out = search(tmp_path)
    assert found == []
    assert left_out == {"notes.txt": NOT_AN_IMAGE, "empty": NOT_AN_IMAGE, "pipe": NOT_REGULAR}


def test_what_claims_to_be_an_image_or_cannot_be_looked_at_is_handed_on(tmp_path: Path) -> None:
    (tmp_path / "broken.PNG").write_bytes(b"no image")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert search(tmp_path) == (["broken.PNG", "circle", "dangling"], {})
    for path in iter_images(tmp_path):
        with pytest.raises(ImageError):
            open_image(path)


def test_linked_files_and_folders_are_followed(tmp_path: Path) -> None:
    album, outside = tmp_path / "album", tmp_path / "outside"
    album.mkdir()
    outside.mkdir()
    (outside / "deep").write_bytes(encode("PNG"))
    (tmp_path / "single").write_bytes(encode("GIF"))
    (album / "linked").symlink_to(outside)
    (album / "file").symlink_to(tmp_path / "single")
    assert search(album) == (["file", "linked/deep"], {})


def test_a_loop_ends_and_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "one").write_bytes(encode("PNG"))
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a" / "b")
    found, left_out = search(tmp_path)
    assert found == ["a/b/one"]
    assert left_out == {
        "a/again": f"{LINKED_AGAIN}{tmp_path / 'a' / 'b'}",
        "a/b/back": f"{LINKED_AGAIN}{tmp_path}",
    }


def test_links_that_fan_out_are_searched_once_each(tmp_path: Path) -> None:
    depth = 40  # 2 ** 40 ways down
    for level in range(depth):
        folder = tmp_path / f"{level}"
        folder.mkdir()
        for way in "xy":
            (folder / way).symlink_to(tmp_path / f"{level + 1}")
    (tmp_path / f"{depth}").mkdir()
    (tmp_path / f"{depth}" / "one").write_bytes(encode("PNG"))
    assert len(list(iter_images(tmp_path / "0"))) == 1
