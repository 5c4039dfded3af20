"""``vqguard scan``: what it prints and the exit codes that scripts rely on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from vqguard.cli.main import main
from vqguard.judging.verdict import Reason

from .conftest import FakeRun, FakeVerdict

Picture = Callable[[str, str], Path]


def test_exit_code_0_when_none_is_flagged(
    opened: list[FakeRun], picture: Picture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", str(picture("a.png", "blue")), str(picture("b.png", "green"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(": ok (neutral" in line for line in lines)
    assert [run.path for run in opened] == [Path("runs/llava-tiny")]


def test_exit_code_1_when_one_is_flagged(
    opened: list[FakeRun], picture: Picture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", str(picture("a.png", "blue")), str(picture("b.png", "red"))]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert "a.png: ok" in first
    assert "b.png: flagged (gun, probability 0.75, semantic code 5)" in second


def test_json_lines(
    opened: list[FakeRun], picture: Picture, capsys: pytest.CaptureFixture[str]
) -> None:
    red, blue = picture("r.png", "red"), picture("b.png", "blue")
    assert main(["scan", "--json", str(red), str(blue)]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        {
            "image": str(red),
            "verdict": "flagged",
            "category": "gun",
            "probability": 0.75,
            "semantic_code": 5,
        },
        {
            "image": str(blue),
            "verdict": "ok",
            "category": "neutral",
            "probability": 0.0,
            "semantic_code": 5,
        },
    ]


@pytest.mark.parametrize(
    ("action", "word", "code"), [("refuse", "flagged", 1), ("report", "reported", 0)]
)
def test_json_lines_carry_the_reason(
    opened: list[FakeRun],
    picture: Picture,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    word: str,
    code: int,
) -> None:
    reason = Reason("gun", 0.75, 0.6, 0, 5, action, "1c2f")
    verdict = FakeVerdict(action != "report", "gun", reason=reason)
    monkeypatch.setattr(FakeRun, "_judge", staticmethod(lambda _: verdict))
    path = picture("r.png", "red")
    assert main(["scan", "--json", str(path)]) == code
    [row] = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert row["verdict"] == word
    assert row["reason"] == {
        "category": "gun",
        "score": 0.75,
        "threshold": 0.6,
        "token": 0,
        "semantic_code": 5,
        "action": action,
        "map_version": "1c2f",
        "region": None,
        "also": [],
    }
    assert main(["scan", str(path)]) == code
    assert f": {word} (gun, probability" in capsys.readouterr().out
    strange = Reason("unfamiliar", 9.0, 8.0, 0, 5, action, "1c2f", also=("gun",))
    both = FakeVerdict(action != "report", "unfamiliar", reason=strange)
    monkeypatch.setattr(FakeRun, "_judge", staticmethod(lambda _: both))
    assert main(["scan", str(path)]) == code
    assert f": {word} (unfamiliar, also gun, probability" in capsys.readouterr().out


def test_explanations_go_into_a_folder_of_their_own(
    opened: list[FakeRun], picture: Picture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(picture("r.png", "red"))
    assert main(["scan", path, "--explain", str(tmp_path)]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    assert main(["scan", path, "--explain-all"]) == 2
    assert "--explain DIR" in capsys.readouterr().err
    assert not opened


def test_verdicts_keep_their_images_over_batches_and_repeats(
    opened: list[FakeRun], picture: Picture, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [picture(f"{i}.png", "red" if i % 3 == 0 else "blue") for i in range(37)]
    paths.insert(4, paths[0])
    assert main(["scan", "--json", *map(str, paths)]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    expected = [int(path.stem) % 3 == 0 for path in paths]
    assert [row["verdict"] == "flagged" for row in rows] == expected
    assert len(opened) == 1


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_a_bad_image_is_an_error(
    opened: list[FakeRun],
    picture: Picture,
    tmp_path: Path,
    content: bytes,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(content)
    assert main(["scan", str(picture("r.png", "red")), str(bad)]) == 2
    error = capsys.readouterr().err
    assert "bad.png" in error
    assert "--skip-bad" in error
    assert "Traceback" not in error


def test_skip_bad_lists_them_and_goes_on(
    opened: list[FakeRun], picture: Picture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    good = picture("a.png", "blue")
    missing = tmp_path / "missing.png"
    arguments = ["scan", "--skip-bad", "--json", str(bad), str(good), str(missing)]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["verdict"] for row in rows] == ["unreadable", "ok", "unreadable"]
    assert "bad.png" in captured.err
    assert "missing.png" in captured.err
    assert main([*arguments, str(picture("r.png", "red"))]) == 1


def test_skip_bad_does_not_pass_when_nothing_was_judged(
    opened: list[FakeRun], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", "--skip-bad", str(tmp_path / "missing.png")]) == 2
    assert "nothing was judged" in capsys.readouterr().err


def test_a_missing_image_is_named_before_the_run_is_opened(
    opened: list[FakeRun], picture: Picture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", str(picture("a.png", "blue")), "nowhere.png"]) == 2
    assert "nowhere.png" in capsys.readouterr().err
    assert opened == []


def test_a_missing_verdict_is_never_a_pass(
    opened: list[FakeRun], picture: Picture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRun, "screen_images", lambda _self, images: [])
    assert main(["scan", str(picture("a.png", "blue"))]) == 3


def test_the_run_comes_from_the_option_the_environment_or_the_default(
    opened: list[FakeRun],
    picture: Picture,
    run_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = str(picture("a.png", "blue"))
    other, third = run_directory.parent / "other", run_directory.parent / "third"
    other.mkdir()
    third.mkdir()
    monkeypatch.setenv("VQGUARD_RUN", str(other))
    assert main(["scan", image]) == 0
    assert main(["scan", image, "--run", "third"]) == 0
    assert [run.path for run in opened] == [other, Path("runs/third")]


def test_a_wrong_run_is_answered_with_the_nearest(
    opened: list[FakeRun], picture: Picture, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(picture("a.png", "blue"))
    assert main(["scan", image, "--run", "runs/lava-tiny"]) == 2
    assert f"Did you mean {Path('runs/llava-tiny')}?" in capsys.readouterr().err


def test_a_directory_stands_for_its_images(
    opened: list[FakeRun], picture: Picture, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "album" / "deep").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    picture("album/a.png", "blue")
    picture("album/deep/b.png", "red")
    (tmp_path / "album" / "notes.txt").write_text("not an image")
    assert main(["scan", "album", "--skip-unknown"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["scan", "album"]) == 2  # notes.txt has no verdict
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "album/notes.txt: not an image" in captured.err
    assert main(["scan", "empty"]) == 2
