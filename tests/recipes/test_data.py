"""LLaVA's JSON: what is read, and how each bad entry is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vqguard.errors import DataError
from vqguard.recipes.data.llava_json import read_llava


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (32, 24), "red").save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "broken.png").write_bytes(b"not an image")
    frames = [Image.new("RGB", (32, 24), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "images" / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (1, 1)).save(tmp_path / "images" / "dot.png")
    return tmp_path


def entry(**changes: Any) -> dict[str, Any]:
    good: dict[str, Any] = {
        "id": "one",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is this?"},
            {"from": "gpt", "value": "A red field."},
        ],
    }
    return {k: v for k, v in {**good, **changes}.items() if v is not None}


def write(root: Path, entries: Any) -> Path:
    path = root / "data.json"
    path.write_text(json.dumps(entries))
    return path


def test_a_good_file_is_read(root: Path) -> None:
    text_only = entry(
        id="two",
        image=None,
        conversations=[
            {"from": "human", "value": "Two plus two?"},
            {"from": "gpt", "value": "Four."},
        ],
    )
    data = read_llava(write(root, [entry(), text_only]), root / "images")
    first, second = data.samples
    assert first.turns == (("<image>\nWhat is this?", "A red field."),)
    assert first.captions == ((1, "A red field."),)
    assert first.image is not None
    assert first.image().size == (32, 24)
    assert second.image is None
    assert len(data.captions(9)) == 1
    assert len(data.instructions(9)) == 2


HUMAN, GPT = {"from": "human", "value": "<image> a"}, {"from": "gpt", "value": "b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "gone.png"}, r"gone\.png is missing"),
        ({"image": "broken.png"}, "not an image that is accepted"),
        ({"image": "moving.gif"}, "several frames"),
        ({"image": "dot.png"}, "each side needs at least 2"),
        ({"image": "../data.json"}, "leaves the image root"),
        ({"image": 3}, "must be a path"),
        ({"conversations": [GPT, HUMAN]}, "expected 'human'"),
        ({"conversations": [HUMAN, {"from": "bot", "value": "b"}]}, "from 'bot'"),
        ({"conversations": [{"from": "human", "value": "a"}, GPT]}, "found 0 for 1"),
        ({"conversations": [{"from": "human", "value": "<image><image>"}, GPT]}, "found 2 for 1"),
        ({"image": ["a.png", "a.png"]}, "found 1 for 2"),
        ({"image": ["a.png", 3]}, "a list of paths, got int"),
        ({"image": []}, "found 1 for 0"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": "<image>"}]}, "in an answer"),
        ({"conversations": [HUMAN]}, "in pairs"),
        ({"conversations": []}, "non-empty list"),
        ({"conversations": [HUMAN, {"from": "gpt", "value": " "}]}, "empty answer"),
    ],
)
def test_a_bad_entry_is_named_or_skipped(root: Path, changes: dict[str, Any], message: str) -> None:
    path = write(root, [entry(), entry(id="bad", **changes)])
    with pytest.raises(DataError, match=message) as refusal:
        read_llava(path, root / "images")
    assert "entry 1" in str(refusal.value)
    assert "--skip-bad" in str(refusal.value)
    data = read_llava(path, root / "images", skip_bad=True)
    assert len(data.samples) == 1
    assert len(data.skipped) == 1
    assert "entry 1" in data.skipped[0]


def test_a_truncated_image_is_left_out_with_skip_bad(root: Path) -> None:
    whole = (root / "images" / "a.png").read_bytes()
    (root / "images" / "cut.png").write_bytes(whole[: len(whole) - 30])
    path = write(root, [entry(), entry(id="bad", image="cut.png")])
    data = read_llava(path, root / "images", skip_bad=True)
    assert len(data.samples) == 1
    assert "cut.png: truncated" in data.skipped[0]


@pytest.mark.parametrize("content", ["[", "{}", "[]", '"text"', "\x00"])
def test_a_file_that_is_no_list_is_refused(root: Path, content: str) -> None:
    path = root / "data.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"data\.json"):
        read_llava(path, root / "images")


def test_a_missing_file_or_folder_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="--data"):
        read_llava(root / "none.json", None)
    with pytest.raises(DataError, match="--images"):
        read_llava(write(root, [entry()]), root / "none")
