"""A run's model in a folder to share, and the card that goes with it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoProcessor

from vqguard.adapters import build_guard, guard_model, load_guarded
from vqguard.adapters.storage.card import NO_FIGURES
from vqguard.cli.main import main
from vqguard.errors import InputError
from vqguard.files import LOCK
from vqguard.recipes import export
from vqguard.recipes.export import export_run
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.run import open_run, save_run_model
from vqguard.recipes.tiny.weights import load_base
from vqguard.records import Record, write_records

Make = Callable[..., Any]


def record(metric: str, subject: str, threat: str, value: float, **condition: Any) -> Record:
    return Record(
        metric, subject, condition, threat, value, 60, max(0.0, value - 0.05), value + 0.05, 0,
        "vqguard retrofit --model llava-tiny", {"vqguard": "0.1.0"},
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """llava-tiny with an untrained guard and a moved projector, and a made-up report."""
    model: Any
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4), processor)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.bias += 1
    folder = tmp_path / "run"
    folder.mkdir()
    load_recipe("llava-tiny").to_yaml(folder / "recipe.yaml")
    save_run_model(folder, model, processor)
    attack = {"attack": "per_request", "eps_255": 255}
    records = [
        record("asr", "base", "white_box", 0.9, **attack, gradient="plain"),
        record("asr", "guarded", "gradient_stopped", 0.0, **attack, gradient="stopped"),
        record("asr", "guarded", "adaptive", 0.625, **attack, gradient="straight_through"),
        record("dsr", "guarded", "toxic_image", 0.75, category="gun", distractors=0),
        record("count", "guarded", "none", 0.5),
    ]
    threats = {"adaptive": "Knows of the quantiser."}
    write_records(folder / "report.json", records, {"threat_models": threats})
    return folder


def test_guard_only(run: Path, tmp_path: Path) -> None:
    folder = export_run(run, tmp_path / "out", guard_only=True)
    assert list(load_file(folder / "changed.safetensors")) == [
        "model.multi_modal_projector.linear_1.bias"
    ]
    expected, again = load_guarded(run / "model").state_dict(), load_guarded(folder).state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.items())
    assert AutoProcessor.from_pretrained(folder).chat_template
    assert open_run(folder).model.vqguard.config.patch_codes == 16  # scan and ask take it too


def test_every_figure_of_the_card_names_its_attacker(run: Path, tmp_path: Path) -> None:
    card = ModelCard.load(export_run(run, tmp_path / "out") / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    rows = [line for line in card.text.splitlines() if line.startswith("| Per request, ε unb")]
    assert len(rows) == 2  # the headline and the whole table
    headline = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert headline[1].startswith("90.0 % (n 60, ")
    assert headline[1].endswith("threat model: white box")
    assert headline[2].endswith("threat model: gradient stopped")
    assert headline[3].startswith("62.5 % (n 60, ")
    assert headline[3].endswith("threat model: adaptive")
    assert "- *adaptive*: Knows of the quantiser." in card.text
    assert "- *white box*: not described" in card.text
    for line in card.text.splitlines():
        if "75.0 %" in line:
            assert "threat model: toxic image" in line or "All categories" in line or "Gun" in line
    assert "Threat model: toxic image." in card.text
    assert NO_FIGURES not in card.text


def test_a_run_without_a_report_says_so(run: Path, tmp_path: Path) -> None:
    (run / "report.json").unlink()
    text = (export_run(run, tmp_path / "out") / "README.md").read_text()
    assert NO_FIGURES in text
    assert "%" not in text


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = str(tmp_path / "out")
    assert main(["export", str(run), "--output", output, "--guard-only"]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 0.")
    assert main(["export", str(run), "--output", output]) == 2
    assert "not an empty directory" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"recipe\.yaml"):
        export_run(tmp_path, tmp_path / "other")


def test_an_export_that_failed_can_be_tried_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export, "replace_text", full)
        with pytest.raises(OSError, match="No space left"):
            export_run(run, output)
    left = output.iterdir() if output.exists() else ()
    assert [entry.name for entry in left if not entry.name.startswith(LOCK)] == []
    export_run(run, output)
    assert load_guarded(output).vqguard is not None
