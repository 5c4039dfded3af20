"""``vqguard scan --output``: exit codes and messages; what is written, `recipes` tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vqguard.cli.main import main

from .conftest import FakeRun

parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra ray")
Picture = Callable[[str, str], Path]


@pytest.fixture(autouse=True)
def judged(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Red pictures are flagged, without a model."""
    from vqguard.recipes.screening import bulk

    def open_run(path: Path, **_: Any) -> FakeRun:
        run: Any = FakeRun(path)
        run.model = SimpleNamespace(vqguard=SimpleNamespace(safety_map=safety_map))
        return run  # type: ignore[no-any-return]

    safety_map = SimpleNamespace(version="1c2f")
    monkeypatch.setattr(bulk, "open_run", open_run)
    monkeypatch.setattr(bulk, "read_map", lambda _: safety_map)
    monkeypatch.setattr(bulk, "model_checksum", lambda _: "9a")


@pytest.fixture
def uploads(tmp_path: Path, picture: Picture) -> Path:
    (tmp_path / "uploads").mkdir()
    for number in range(3):
        picture(f"uploads/{number}.png", "blue")
    return tmp_path / "uploads"


def test_the_exit_code_is_that_of_scan(
    uploads: Path, picture: Picture, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", "uploads", "--output", "clean"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith(
        "Verdicts: clean\n3 judged, 0 flagged (0 ambiguous), 0 skipped (0 unusable, 0 no images)\n"
    )
    picture("uploads/red.png", "red")
    assert main(["scan", "uploads", "--output", "flagged", "--json"]) == 1
    counts = json.loads(capsys.readouterr().err.splitlines()[-1])
    assert (counts["judged"], counts["flagged"]) == (4, 1)
    (uploads / "notes.txt").write_text("none")
    assert main(["scan", "uploads", "--output", "unknown"]) == 2
    assert "--skip-unknown" in capsys.readouterr().err
    assert main(["scan", "uploads", "--output", "unknown", "--resume", "--skip-unknown"]) == 1
    (uploads / "broken.png").write_bytes(b"no picture")
    assert main(["scan", "uploads", "--output", "bad", "--skip-unknown"]) == 2
    assert (
        main(["scan", "uploads", "--output", "bad", "--resume", "--skip-unknown", "--skip-bad"])
        == 1
    )
    rows = parquet.read_table("bad").to_pylist()
    assert sorted(row["verdict"] for row in rows) == [
        *("flagged", "ok", "ok", "ok", "unknown", "unreadable")
    ]


def test_nothing_is_not_a_pass(uploads: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (uploads / f"{number}.png").write_bytes(b"no picture")
    assert main(["scan", "uploads", "--output", "bad", "--skip-bad"]) == 2
    assert "nothing was judged" in capsys.readouterr().err
    (uploads.parent / "empty").mkdir()
    assert main(["scan", "empty", "--output", "none"]) == 2
    assert "nothing was judged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--resume"], "--resume needs --output"),
        (["--workers", "2"], "--workers needs --output"),
        (["--image-column", "photo"], "--image-column needs --output"),
        (["--output", "out", "--ray", "auto"], "--ray needs --workers"),
        (["--output", "out", "--explain", "why"], "--explain"),
        (["--output", "uploads/out"], "outside"),
        (["--output", "."], "not an empty directory"),
    ],
)
def test_what_does_not_go_together(
    uploads: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", "uploads", *options]) == 2
    assert said in capsys.readouterr().err
    assert not (uploads.parent / "out").exists()


def test_a_scan_goes_on_only_where_it_was_begun(
    uploads: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scan", "uploads", "--output", "out"]) == 0
    assert main(["scan", "uploads", "--output", "out"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["scan", "uploads", "--output", "out", "--resume"]) == 0
    assert main(["scan", "uploads", "--output", "out", "--resume", "--ambiguous", "report"]) == 2
    (uploads.parent / "mine").mkdir()
    (uploads.parent / "mine" / "poem.txt").write_text("roses")
    assert main(["scan", "uploads", "--output", "mine", "--resume"]) == 2
    assert [path.name for path in (uploads.parent / "mine").iterdir()] == ["poem.txt"]
