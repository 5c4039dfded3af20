"""A second process looks at pictures ahead, and what is found is the same without it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vqguard.errors import DataError
from vqguard.recipes.data.llava_json import read_llava
from vqguard.recipes.data.media import ahead
from vqguard.recipes.data.media.ahead import LookingAhead, in_blocks
from vqguard.recipes.data.records.data_set import LlavaData


def entry(name: str, *pictures: Any) -> dict[str, Any]:
    return {
        "id": name,
        "image": list(pictures),
        "conversations": [
            {"from": "human", "value": "<image>" * len(pictures) + "What?"},
            {"from": "gpt", "value": "Red."},
        ],
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number in range(5):
        Image.new("RGB", (8 + number, 6), "red").save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "0.png").read_bytes()[:45])
    (tmp_path / "text.png").write_text("nothing")
    entries: list[Any] = [entry(f"{n}", f"{n % 5}.png", f"{(n + 1) % 5}.png") for n in range(23)]
    entries[3:3] = [entry("missing", "none.png"), entry("text", "text.png"), 7]
    entries += [entry("odd", "\ud800.png"), entry("out", "../0.png"), entry("n", 5), {"image": "0"}]
    entries += [entry("again", "none.png", "0.png"), entry("cut", "broken.png"), entry("none")]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path / "data.json"


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> list[LookingAhead]:
    """Any file is checked by two processes, in small blocks; gives those that were started."""
    started: list[LookingAhead] = []
    start = LookingAhead.__init__

    def counted(self: LookingAhead, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        started.append(self)

    monkeypatch.setattr(LookingAhead, "__init__", counted)
    monkeypatch.setattr(ahead, "FROM", 0)
    monkeypatch.setattr(ahead, "BLOCK", 4)
    monkeypatch.setattr(ahead, "processors", lambda: 2)
    return started


def found(data: LlavaData) -> tuple[Any, ...]:
    samples = [(sample.id, sample.turns, len(sample.images)) for sample in data.samples]
    assert data.checked is not None
    return samples, data.skipped, data.checked.places.tolist()


@pytest.mark.parametrize("skip_bad", [True, False])
def test_two_processes_find_what_one_does(
    data: Path, skip_bad: bool, two: list[LookingAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for processors in (1, 2):
        monkeypatch.setattr(ahead, "processors", lambda count=processors: count)
        try:
            results.append(found(read_llava(data, None, skip_bad=skip_bad)))
        except DataError as error:
            results.append((str(error),))
    assert len(two) == 1
    assert results[0] == results[1]
    assert two[0]._process.returncode is not None


def test_the_second_process_does_the_looking(
    data: Path, two: list[LookingAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vqguard.recipes.data.image_roots import FolderRoot

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("looked at here")

    monkeypatch.setattr(FolderRoot, "check", never)
    assert len(read_llava(data, None, skip_bad=True).samples) == 24
    assert len(two) == 1


def test_a_second_process_that_ends_is_done_without(
    data: Path, two: list[LookingAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = LookingAhead.answers

    def ending(self: LookingAhead) -> Iterator[Any]:
        if len(self._asked) > 1:
            self._process.kill()
        return answers(self)

    monkeypatch.setattr(LookingAhead, "answers", ending)
    with_it = found(read_llava(data, None, skip_bad=True))
    monkeypatch.setattr(ahead, "processors", lambda: 1)
    assert found(read_llava(data, None, skip_bad=True)) == with_it


def test_a_broken_file_is_told_of_behind_the_records_before_it(
    data: Path, two: list[LookingAhead], monkeypatch: pytest.MonkeyPatch
) -> None:
    data.write_text(data.read_text()[:-20])
    messages = []
    for processors in (1, 2):
        monkeypatch.setattr(ahead, "processors", lambda count=processors: count)
        with pytest.raises(DataError) as refused:
            read_llava(data, None, skip_bad=True)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]


def test_blocks_hold_everything_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "BLOCK", 3)
    for count in range(8):
        all_pairs = list(in_blocks(range(count)))
        assert [n for block, _ in all_pairs for n in block] == list(range(count))
        behind = [block for block, _ in all_pairs[1:]] + ([[]] if all_pairs else [])
        assert behind == [following for _, following in all_pairs]

    def failing() -> Iterator[int]:
        yield from range(4)
        raise DataError("here")

    pairs = in_blocks(failing())
    assert [next(pairs)[0], next(pairs)[0]] == [[0, 1, 2], [3]]
    with pytest.raises(DataError, match="here"):
        next(pairs)
