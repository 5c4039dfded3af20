"""Data as it comes: encodings, JSONL, roles, separators and names of archives."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vqguard.errors import DataError
from vqguard.recipes.data.image_roots import image_root
from vqguard.recipes.data.llava_json import read_llava
from vqguard.recipes.data.records import json_entries
from vqguard.recipes.data.records.turns import read_turns

TURNS = [{"from": "human", "value": "<image>\nWas ist das?"}, {"from": "gpt", "value": "Ein Ä."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    Image.new("RGB", (8, 6), "red").save(tmp_path / "deep" / "a.png")
    return tmp_path


def entry(image: str = "deep/a.png") -> dict[str, Any]:
    return {"id": "one", "image": image, "conversations": TURNS}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("lines", [False, True])
def test_encodings_and_jsonl(encoding: str, lines: bool, folder: Path) -> None:
    entries = [entry(), {**entry(), "id": "two"}]
    text = json.dumps(entries, ensure_ascii=False)
    if lines:
        text = "\n".join(json.dumps(e, ensure_ascii=False) + "\r" for e in entries) + "\n\n"
    (folder / "data.json").write_bytes(text.encode(encoding))
    data = read_llava(folder / "data.json", None)
    assert [(sample.id, sample.turns[0][1]) for sample in data.samples] == [
        ("one", "Ein Ä."),
        ("two", "Ein Ä."),
    ]


def test_a_bad_line_is_named(folder: Path) -> None:
    (folder / "data.jsonl").write_text(json.dumps(entry()) + "\n{]\n")
    with pytest.raises(DataError, match=r"data\.jsonl, line 2"):
        read_llava(folder / "data.jsonl", None)


HUMAN, GPT = {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}
SYSTEM = {"from": "system", "value": "Be brief."}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([GPT, HUMAN, GPT], [("Q", "A")]),
        ([HUMAN, GPT, HUMAN], [("Q", "A")]),
        ([SYSTEM, HUMAN, GPT], [("Be brief.\n\nQ", "A")]),
        ([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}], [("Q", "A")]),
        ([{"from": "user", "value": "Q"}, {"from": "assistant", "value": "A"}], [("Q", "A")]),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": "Q"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
            ],
            [("<image>\nQ", "A")],
        ),
    ],
)
def test_turns_as_they_are_written(turns: Any, expected: list[tuple[str, str]]) -> None:
    assert list(read_turns(turns, "x")) == expected


@pytest.mark.parametrize("turns", [[GPT], [HUMAN], [SYSTEM], [GPT, HUMAN], [SYSTEM, GPT]])
def test_nothing_left_is_an_error(turns: Any) -> None:
    with pytest.raises(DataError, match="in pairs"):
        read_turns(turns, "x")


@pytest.mark.parametrize("turns", [[HUMAN, HUMAN], [HUMAN, GPT, SYSTEM], [GPT, GPT, HUMAN, GPT]])
def test_other_orders_are_refused(turns: Any) -> None:
    with pytest.raises(DataError, match="turns alternate"):
        read_turns(turns, "x")


def test_what_is_left_out_is_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = [{**entry(), "conversations": [GPT, *TURNS, HUMAN]}]
    (folder / "data.json").write_text(json.dumps(entries))
    with caplog.at_level(logging.INFO):
        (sample,) = read_llava(folder / "data.json", None).samples
    assert len(sample.turns) == 1
    assert "first turns without a question (1)" in caplog.text
    assert "last questions without an answer (1)" in caplog.text


def test_windows_separators(folder: Path) -> None:
    (folder / "data.json").write_text(json.dumps([entry("deep\\a.png")]))
    assert len(read_llava(folder / "data.json", None).samples) == 1
    with zipfile.ZipFile(folder / "PHOTOS.ZIP", "w") as archive:
        archive.write(folder / "deep" / "a.png", "deep\\a.png")
    for name in ("deep/a.png", "deep\\a.png"):
        assert image_root(folder / "PHOTOS.ZIP").opener(name)().size == (8, 6)
    for root in (folder, folder / "PHOTOS.ZIP"):
        for name in ("..\\deep\\a.png", "deep\\..\\..\\a.png"):
            with pytest.raises(DataError, match="leaves the image root"):
                image_root(root).check(name)


def test_a_zip_s_names_without_the_flag_of_utf8(folder: Path) -> None:
    packed = folder / "photos.zip"
    name = "größe/été.png"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(folder / "deep" / "a.png", "x" * len(name.encode()))
    raw = packed.read_bytes().replace(b"x" * len(name.encode()), name.encode())
    packed.write_bytes(raw)
    assert image_root(packed).opener(name)().size == (8, 6)


@pytest.mark.parametrize("entries", [3, 40])
def test_coco_s_own_files_say_what_to_write(
    entries: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are one object on one line, as large as all captions."""
    monkeypatch.setattr(json_entries, "MAX_ENTRY", 1500)
    monkeypatch.setattr(json_entries, "_PIECE", 1000)
    captions = [{"image_id": n, "id": n, "caption": "A red field."} for n in range(entries)]
    images = [{"id": n, "file_name": "deep/a.png"} for n in range(entries)]
    content = {"info": {}, "licenses": [], "images": images, "annotations": captions}
    (folder / "captions_train2017.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"COCO.*an entry for each image"):
        read_llava(folder / "captions_train2017.json", None)
