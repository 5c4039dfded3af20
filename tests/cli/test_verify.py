"""``vqguard verify`` says whether the guard holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vqguard.cli.main import main


def test_a_type_is_checked_on_a_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "table.json"
    assert main(["verify", "mistral3", "--tiny", "--output", str(out)]) == 0
    assert "1 of 1 families" in capsys.readouterr().out
    row = json.loads(out.read_text())["families"]["mistral3"]
    assert row["status"] == "guarded"
    assert row["checks"]["image projected"]["probe"] == "passed"


def test_what_is_refused_is_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "pi0", "--tiny"]) == 1
    assert "robot actions" in capsys.readouterr().out


def test_unknown_types_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "no-such-type", "--tiny"]) == 2
    assert "no-such-type" in capsys.readouterr().err


@pytest.mark.parametrize("site", ["projected", "encoder"])
def test_the_embedded_world_passes(
    site: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found.json"
    code = main(["verify", "llava-tiny", "--site", site, "--output", str(out)])
    text = capsys.readouterr().out
    assert code == 0, text
    checks = json.loads(out.read_text())["checks"]
    assert all(status != "failed" for status, _ in checks.values())


def test_a_run_s_directory_stands_for_the_model_in_it(tmp_path: Path) -> None:
    from vqguard.cli.verify import _model_of

    (tmp_path / "model").mkdir()
    assert _model_of(str(tmp_path)) == str(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{}")
    assert _model_of(str(tmp_path)) == str(tmp_path / "model")
    assert _model_of("owner/name") == "owner/name"


def test_an_adapter_that_leaks_is_found_and_told_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vqguard.adapters.families.llava import LlavaAdapter
    from vqguard.adapters.families.registration import _ADAPTERS
    from vqguard.adapters.seams import Seam

    class OuterOnly(LlavaAdapter):
        vision_path = "model.vision_tower"
        language_path = "model.language_model"
        projector_paths = ("model.multi_modal_projector",)

        def seams(self, model: Any) -> tuple[Seam, ...]:
            return (Seam(""),)

    monkeypatch.setitem(_ADAPTERS, "llava", OuterOnly)
    assert main(["verify", "llava-tiny"]) == 1
    text = capsys.readouterr().out
    assert "llava at site 'projected': FAILED" in text
    assert "first seen in module 'model.language_model" in text
