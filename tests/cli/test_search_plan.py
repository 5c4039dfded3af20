"""``vqguard search-plan``: what is chosen for each codebook, and why."""

from __future__ import annotations

from pathlib import Path

import pytest

from vqguard import GuardConfig, VQGuard
from vqguard.cli.main import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    guard = VQGuard(GuardConfig(24, 4, patch_codes=4200, semantic_codes=3)).eval()
    guard.save_pretrained(tmp_path / "model" / "guard")
    return tmp_path


def test_it_says_what_is_chosen_and_why(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search-plan", str(run)]) == 0
    out = capsys.readouterr().out
    assert "patch: 4200 codewords of width 24, by " in out
    assert "us a token: torch" in out
    assert "of the time of" in out
    assert "semantic: 3 codewords of width 4, by torch" in out
    assert "3 codewords do not need an index" in out


def test_a_guard_alone_will_do(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search-plan", str(run / "model" / "guard")]) == 0
    assert "by torch" in capsys.readouterr().out


def test_a_folder_without_a_guard_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search-plan", str(tmp_path)]) == 2
    assert "no guard here" in capsys.readouterr().err
