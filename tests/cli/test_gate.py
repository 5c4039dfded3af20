"""`vqguard scan` as a gate: 0 means that all of it was judged, and whatever was not is named."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.limited_process import run_limited
from vqguard.cli.main import main

from .conftest import FakeRun

Picture = Callable[[str, str], Path]
Captured = pytest.CaptureFixture[str]


def summary(err: str) -> dict[str, int]:
    """The closing line of `scan --json`."""
    counts = next(line for line in reversed(err.splitlines()) if line.startswith("{"))
    return dict(json.loads(counts))


@pytest.mark.parametrize("name", ["a.jpe", "a.jfif", "a.mpo", "a.apng", "a", ".a", "a.txt"])
def test_a_flagged_image_is_found_whatever_it_is_called(
    opened: list[FakeRun], tmp_path: Path, name: str, capsys: Captured
) -> None:
    (tmp_path / "album").mkdir()
    with (tmp_path / "album" / name).open("wb") as file:
        Image.new("RGB", (8, 8), "red").save(file, "PNG")
    assert main(["scan", "album"]) == 1
    assert f"{name}: flagged" in capsys.readouterr().out


def test_linked_folders_are_judged_and_loops_reported(
    opened: list[FakeRun], tmp_path: Path, picture: Picture, capsys: Captured
) -> None:
    (tmp_path / "album").mkdir()
    (tmp_path / "outside").mkdir()
    picture("outside/a.png", "red")
    (tmp_path / "album" / "link").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(tmp_path / "album")
    assert main(["scan", "album"]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith("album/link/a.png: flagged")
    assert "Searched once: album/link/back: linked again: album" in captured.err


def test_what_is_not_judged_is_named_and_counted(
    opened: list[FakeRun], tmp_path: Path, picture: Picture, capsys: Captured
) -> None:
    (tmp_path / "album").mkdir()
    picture("album/a.png", "blue")
    (tmp_path / "album" / "notes").write_text("text")
    os.mkfifo(tmp_path / "album" / "pipe")
    (tmp_path / "album" / "broken.png").write_bytes(b"text")
    (tmp_path / "album" / "gone").symlink_to("nowhere")
    skip_unknown, skip_bad = "--skip-unknown", "--skip-bad"
    for options, code in (
        ([], 2),
        ([skip_unknown], 2),
        ([skip_bad], 2),
        ([skip_unknown, skip_bad], 0),
    ):
        assert main(["scan", "album", *options]) == code
        captured = capsys.readouterr()
        assert captured.out.splitlines() == [
            "album/a.png: ok (neutral, probability 0.00, semantic code 5)"
        ]
        for name in ("notes", "pipe", "broken.png", "gone"):
            assert f"Skipped: album/{name}: " in captured.err
        assert (
            "1 judged, 0 flagged (0 ambiguous), 4 skipped (2 unusable, 2 no images)" in captured.err
        )
    assert main(["scan", "album", "--json", skip_bad]) == 2
    captured = capsys.readouterr()
    rows = {Path(row["image"]).name: row for row in map(json.loads, captured.out.splitlines())}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "a.png": "ok",
        "notes": "unknown",
        "pipe": "unknown",
        "broken.png": "unreadable",
        "gone": "unreadable",
    }
    assert summary(captured.err) == {
        "judged": 1,
        "flagged": 0,
        "ambiguous": 0,
        "skipped": 4,
        "unreadable": 2,
        "unknown": 2,
    }


def test_a_bad_image_does_not_hide_the_verdicts_on_the_others(
    opened: list[FakeRun], tmp_path: Path, picture: Picture, capsys: Captured
) -> None:
    (tmp_path / "bad.png").write_bytes(b"text")
    assert main(["scan", "bad.png", str(picture("r.png", "red"))]) == 2
    assert "r.png: flagged" in capsys.readouterr().out


@pytest.mark.parametrize("end", ["\n", "\0"])
@pytest.mark.parametrize("source", ["list", "-"])
def test_files_from_a_list(
    opened: list[FakeRun],
    tmp_path: Path,
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
    source: str,
    end: str,
) -> None:
    picture("a.png", "blue")
    (tmp_path / "deep").mkdir()
    picture("deep/two words.png", "red")
    names = ["a.png", "deep"]
    if end == "\0":
        picture("line\nend.png", "blue")
        names.append("line\nend.png")
    content = end.join([*names, ""]).encode()
    (tmp_path / "list").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert main(["scan", "--json", "--files-from", source, "a.png"]) == 1
    rows = [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()]
    assert rows == ["a.png", "a.png", "deep/two words.png", *names[2:]]


def test_a_list_that_names_what_is_missing_or_nothing(
    opened: list[FakeRun],
    tmp_path: Path,
    picture: Picture,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    picture("a.png", "blue")
    (tmp_path / "list").write_text("a.png\n" + "".join(f"gone{n}.png\n" for n in range(9)))
    assert main(["scan", "--files-from", "list"]) == 2
    assert "and 4 more" in capsys.readouterr().err
    assert main(["scan", "--files-from", "list", "--skip-bad"]) == 0
    (tmp_path / "list").write_text("\n")
    assert main(["scan", "--files-from", "list"]) == 2
    assert main(["scan", "--files-from", "nowhere"]) == 2
    monkeypatch.setattr("vqguard.cli.file_lists.LARGEST_LIST", 4)
    (tmp_path / "list").write_text("a.png\n")
    assert main(["scan", "--files-from", "list"]) == 2
    assert "longer than 4 bytes" in capsys.readouterr().err
    assert main(["scan"]) == 2


@pytest.fixture
def hidden_red(tmp_path: Path) -> Path:
    """White to readers that blend, red to those that drop the alpha channel."""
    path = tmp_path / "hidden.png"
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(path)
    return path


def test_an_ambiguous_picture_is_refused_with_the_reason(
    opened: list[FakeRun], hidden_red: Path, capsys: Captured
) -> None:
    for options in ([], ["--ambiguous", "refuse"]):
        assert main(["scan", str(hidden_red), *options]) == 1
        captured = capsys.readouterr()
        assert "hidden.png: ambiguous (shows another picture when it is read" in captured.out
        assert "1 judged, 1 flagged (1 ambiguous), 0 skipped" in captured.err
    assert main(["scan", "--json", str(hidden_red)]) == 1
    captured = capsys.readouterr()
    row = json.loads(captured.out)
    assert row["verdict"] == "ambiguous"
    assert 'convert("RGB")' in row["reason"]
    assert summary(captured.err)["ambiguous"] == 1


def test_all_readings_are_judged_where_ambiguity_is_reported(
    opened: list[FakeRun], hidden_red: Path, picture: Picture, capsys: Captured
) -> None:
    blue = picture("b.png", "blue")
    assert main(["scan", "--ambiguous", "report", str(blue), str(hidden_red), str(blue)]) == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert "b.png: ok" in first
    assert "hidden.png: flagged (gun" in second
    assert "shows another picture" in second
    assert "b.png: ok" in third
    Image.new("RGBA", (8, 8), (0, 0, 255, 0)).save(hidden_red)
    assert main(["scan", "--ambiguous", "report", "--json", str(hidden_red)]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["verdict"] == "ok"
    assert "shows another picture" in row["ambiguous"]


def test_ambiguity_may_be_ignored(
    opened: list[FakeRun], hidden_red: Path, capsys: Captured
) -> None:
    assert main(["scan", "--ambiguous", "ignore", str(hidden_red)]) == 0
    assert "hidden.png: ok" in capsys.readouterr().out


def test_the_run_says_whether_its_image_processor_converts(
    opened: list[FakeRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = Image.new("P", (8, 8), 3)
    picture.putpalette([9 * n % 256 for n in range(768)])
    picture.save(tmp_path / "palette.png")
    assert main(["scan", "palette.png"]) == 0
    original = FakeRun.__init__

    def of_a_raw_processor(self: FakeRun, path: Path) -> None:
        original(self, path, converts_to_rgb=False)

    monkeypatch.setattr(FakeRun, "__init__", of_a_raw_processor)
    assert main(["scan", "palette.png"]) == 1


def test_a_closed_pipe_is_neither_a_verdict_nor_a_pass(
    opened: list[FakeRun], picture: Picture, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    image = str(picture("a.png", "blue"))
    with os.fdopen(writing, "w") as closed, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", closed)
        assert main(["scan", image]) == 141
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["models", "--json"], ["models"], ["--help"]])
def test_a_program_into_a_closed_pipe(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "vqguard.cli", *arguments]
    try:
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


OTHERS = {
    "a.jp2": b"\0\0\0\x0cjP  \r\n\x87\n",
    "b.ico": b"\0\0\1\0\1\0\x10\x10",
    "c.heic": b"\0\0\0\x18ftypheic\0\0\0\0",
    "d.avif": b"\0\0\0\x1cftypavif\0\0\0\0",
    "e": b"8BPS\0\1\0\0\0\0\0\0\0\3",
    "f.jxl": b"\xff\x0a\0\0",
    "g.ppm": b"P6\n8 8\n255\n",
    "h.tga": b"\0\0\2\0\0\0\0\0",
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_image_of_another_format_is_not_skipped_as_no_image(
    opened: list[FakeRun], tmp_path: Path, picture: Picture, name: str, capsys: Captured
) -> None:
    """Whoever is let through opens it with a program that reads more formats."""
    (tmp_path / "album").mkdir()
    picture("album/0.png", "blue")
    (tmp_path / "album" / name).write_bytes(OTHERS[name])
    assert main(["scan", "album", "--skip-unknown"]) == 2
    assert f"{name}: an image of a format that is not read here" in capsys.readouterr().err
    assert main(["scan", "album", "--skip-bad"]) == 0


def test_a_list_of_too_many_names_is_refused(
    opened: list[FakeRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    monkeypatch.setattr("vqguard.cli.file_lists.MOST_NAMES", 3)
    (tmp_path / "list").write_text("a\n\nb\nc\nd\n")
    assert main(["scan", "--files-from", "list"]) == 2
    assert "names more than 3 files; split it" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["b'\\0'", "b'\\n'", "b'a\\n'", "b'\\0a\\n'"])
def test_a_list_takes_no_more_memory_than_its_names(tmp_path: Path, content: str) -> None:
    program = f"""
(Path(sys.argv[1])).write_bytes({content} * (128 * 2**20 // len({content})))
try:
    print(len(read_list(Path(sys.argv[1]))))
except InputError as error:
    print(error)
"""
    imports = (
        "from pathlib import Path\n"
        "from vqguard.cli.file_lists import read_list\nfrom vqguard.errors import InputError"
    )
    said = run_limited(imports, program, tmp_path / "list", seconds=10, megabytes=800)
    assert said == "0" or "split it" in said
