"""What is in a record is used, refused or counted: nothing is dropped silently."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vqguard.errors import DataError
from vqguard.recipes.data.llava_json import read_llava
from vqguard.recipes.data.tables import read_table
from vqguard.recipes.data.webdataset import PROMPT, read_shards
from vqguard.recipes.recipe import ColumnRecipe

ASKED = {"from": "human", "value": "<image>\nWhat?"}
ANSWER = {"from": "gpt", "value": "Red."}
TEXT_ONLY = [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "Four."}]


def picture(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), "red").save(buffer, kind)
    return buffer.getvalue()


def shard(path: Path, files: dict[str, bytes | Any]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def entries(folder: Path, *more: dict[str, Any]) -> Path:
    (folder / "a.png").write_bytes(picture())
    good = {"id": "good", "image": "a.png", "conversations": [ASKED, ANSWER]}
    (folder / "data.json").write_text(json.dumps([good, *more]))
    return folder / "data.json"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"video": "a.mp4"}, "one <video> in its questions.*found 0 for 1"),
        ({"videos": ["a.mp4"]}, "one <video> in its questions.*found 0 for 1"),
        ({"audio": {"path": "a"}}, "'audio'"),
        ({"images": ["a.png"]}, "found 0 for 1"),
        ({"second": "b.jpg"}, "'second' holds 'b.jpg'"),
        ({"clips": ["b.webm"]}, "'clips'"),
        ({"image": "a.png", "images": ["a.png"]}, "'image' and 'images'"),
        ({"conversations": [{**TEXT_ONLY[0], "video": "a.mp4"}, TEXT_ONLY[1]]}, "turn 0: 'video'"),
    ],
)
def test_media_of_llava_json_are_refused(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = entries(tmp_path, {"id": "bad", "conversations": TEXT_ONLY, **more})
    with pytest.raises(DataError, match=rf"entry 1 \(id bad\).*{message}"):
        read_llava(path, None)
    data = read_llava(path, None, skip_bad=True)
    assert ([sample.id for sample in data.samples], len(data.skipped)) == (["good"], 1)


def test_other_keys_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = {"conversations": TEXT_ONLY, "model": "", "url": "https://a.b/c.jpg", "video": None}
    path = entries(tmp_path, plain, plain, {"images": ["a.png"], "conversations": [ASKED, ANSWER]})
    with caplog.at_level(logging.INFO):
        data = read_llava(path, None)
    assert [len(sample.images) for sample in data.samples] == [1, 0, 0, 1]
    assert f"{path}: not read: 'model' (2), 'url' (2)" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.mp4": b"0", "x.txt": b"A clip."}, r"x\.mp4: cannot be read as MP4"),
        ({"x.mpg": b"0", "x.txt": b"A clip."}, r"'x\.mpg' is not read"),
        ({"x.mp4": b"0", "x.png": picture(), "x.txt": b"A"}, "png and mp4; a sample holds one"),
        ({"x.json": {"conversations": TEXT_ONLY, "images": ["a.png"]}}, "its JSON names 'images'"),
        ({"x.png": picture(), "x.mask.png": picture(), "x.txt": b"A"}, r"'x\.mask\.png'"),
        ({"x.y.png": picture(), "x.y.txt": b"A field."}, "has a dot in its name"),
        ({"x.json": {"conversations": TEXT_ONLY, "video": "a.mp4"}}, "'video'"),
        ({"x.json": {"key": "1", "video": "a.mp4"}, "x.txt": b"A."}, "'video'"),
        ({"x.png": picture(), "x.json": {"key": "1"}}, "no 'conversations'"),
        ({"x.cls": b"7"}, "neither .json nor .txt"),
    ],
)
def test_what_a_shard_s_sample_holds_is_used_or_refused(
    files: dict[str, Any], message: str, tmp_path: Path
) -> None:
    good = {"good.gif": picture("GIF"), "good.txt": b"A field."}
    path = shard(tmp_path / "0.tar", {**good, **files})
    with pytest.raises(DataError, match=rf"sample x\b.*{message}"):
        read_shards(path)
    data = read_shards(path, skip_bad=True)
    assert ([sample.id for sample in data.samples], len(data.skipped)) == (["good"], 1)


def test_img2dataset(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = {"key": "000", "caption": "A red field", "url": "https://a/b.jpg", "NSFW": float("nan")}
    files = {"000.jpg": picture("JPEG"), "000.json": known, "000.txt": b"A red field"}
    with caplog.at_level(logging.INFO):
        (sample,) = read_shards(shard(tmp_path / "0.tar", files)).samples
    assert sample.turns == ((f"<image>\n{PROMPT}", "A red field"),)
    assert len(sample.images) == 1
    assert "'url' (1)" in caplog.text


@pytest.mark.parametrize("ending", ["bmp", "gif", "tif", "jfif"])
def test_every_picture_that_opens_is_one(ending: str, tmp_path: Path) -> None:
    raw = picture({"tif": "TIFF", "jfif": "JPEG"}.get(ending, ending.upper()))
    (sample,) = read_shards(shard(tmp_path / "0.tar", {f"a.{ending}": raw, "a.txt": b"A"})).samples
    assert sample.image is not None
    assert sample.image().size == (8, 6)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.tuples(
            st.sampled_from(["a", "b/c", "d", ".e"]),
            st.sampled_from(["png", "gif", "txt", "json", "mp4", "cls", "x.png", "x.json", "y.z"]),
        ),
        st.sampled_from(["good", "odd"]),
        min_size=1,
    )
)
def test_every_member_of_a_shard_is_accounted_for(
    tmp_path: Path, write_video: Callable[..., Path], parts: dict[tuple[str, str], str]
) -> None:
    clip = tmp_path / "clip.mp4"
    if not clip.exists():
        write_video(clip, frames=3)
    contents: dict[str, Any] = {
        "mp4": clip.read_bytes(),
        "png": picture(),
        "gif": picture("GIF"),
        "txt": b"A field.",
        "json": {"conversations": [ASKED, ANSWER]},
    }
    files: dict[str, Any] = {"good.png": picture(), "good.txt": b"Fine."}
    for (key, ending), kind in parts.items():
        files[f"{key}.{ending}"] = contents.get(ending, b"?") if kind == "good" else b""
    data = read_shards(shard(tmp_path / "0.tar", files), skip_bad=True)
    keys = {key for key, _ in parts if not key.startswith(".")}
    assert {sample.id for sample in data.samples} <= {"good", *keys}
    assert len(data.samples) + len(data.skipped) == 1 + len(keys)
    for sample in data.samples:
        endings = {ending for key, ending in parts if key == sample.id}
        assert len(sample.images) == len(endings & {"png", "gif"}) or sample.id == "good"
        assert len(sample.videos) == len(endings & {"mp4"})


def test_parts_and_columns_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()

    def messages(kind: str) -> list[dict[str, Any]]:
        parts = [{"type": kind, "text": None}, {"type": "text", "text": "What?"}]
        said = [{"type": "text", "text": "Red."}]
        return [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]

    rows = {
        "image": [picture(), None, None],
        "messages": [messages("image"), messages("video"), messages("text")],
        "video": [None, None, "a.mp4"],
    }
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))
    data = read_table(tmp_path / "set", None, ColumnRecipe(), skip_bad=True)
    assert [sample.id for sample in data.samples] == ["0"]
    assert "row 1: turn 0: a part of type 'video' is not read" in data.skipped[0]
    assert "row 2: column 'video' holds a medium" in data.skipped[1]


def test_a_list_of_captions_gives_one_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    captions = ["a dog", "dog", "one dog", "a brown dog"]
    rows = {"image": [picture()] * 3, "alt": [captions, captions[:1], []]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"))

    def said(seed: int) -> list[str]:
        columns = ColumnRecipe(caption="alt")
        data = read_table(tmp_path / "set", None, columns, seed=seed, skip_bad=True)
        first, second = data.samples
        assert "row 2: expected a text or a list of texts" in data.skipped[0]
        assert second.in_epoch(3).captions == ((1, "a dog"),)
        return [first.in_epoch(epoch).captions[0][1] for epoch in range(8)]

    drawn = said(0)
    assert sorted(drawn[:4]) == sorted(captions)
    assert drawn[4:] == drawn[:4] == said(0)[:4]
    assert said(5)[:4] != drawn[:4]
