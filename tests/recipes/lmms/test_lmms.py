"""Guarded models under lmms-eval, the real one: our entry point, and its own loaders."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.recipes.conftest import MakeModel, calibrate_on, noisy_pictures
from tests.tool_pythons import ROOT, run_tool
from vqguard.recipes.run import open_run, save_run_model

pytestmark = [pytest.mark.slow, pytest.mark.alone, pytest.mark.serving]
PICTURES = noisy_pictures(12)
TASK = ROOT / "examples" / "lmms_eval"


@pytest.fixture
def run(small_guarded: MakeModel, tmp_path: Path) -> Path:
    model, processor = small_guarded()
    calibrate_on(model, processor, PICTURES)
    save_run_model(tmp_path / "run", model, processor)
    return tmp_path / "run"


def opened(order: str, folder: Path) -> tuple[bool, dict[str, str]]:
    said = run_tool("lmms_eval", Path(__file__).with_name("opening_program.py"), order, folder)
    found = json.loads(said.splitlines()[-1])
    return found["listed"], found["tried"]


def test_no_loader_of_lmms_eval_opens_a_guarded_folder_unguarded(run: Path) -> None:
    listed, tried = opened("without", run / "model")
    assert not listed
    for name, said in tried.items():
        assert not said.startswith(("opened", "guarded")), (name, said)
        if not name.startswith("vqguard"):
            assert "vqguard" in said, (name, said)


def test_with_the_package_they_open_it_guarded_or_not_at_all(run: Path) -> None:
    listed, tried = opened("with", run / "model")
    assert listed
    assert tried["vqguard, simple: False"] == "guarded"
    for name, said in tried.items():
        assert not said.startswith("opened"), (name, said)


def test_a_task_of_ones_own(run: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    loaded = open_run(run)
    said = [loaded.ask(picture, "what is it ?", max_new_tokens=8) for picture in PICTURES]
    flagged = sum(answer.verdict.flagged for answer in said)
    assert 0 < flagged < len(said)
    # what the model says counts as right, so that answers are compared and not only counted
    words = [(answer.text.split() or ["nothing"])[0] for answer in said]
    rows = {"image": PICTURES, "answer": words}
    features = datasets.Features({"image": datasets.Image(), "answer": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "naming.parquet")
    options = ["--include_path", str(TASK), "--tasks", "naming", "--batch_size", "1"]
    program = "from lmms_eval.__main__ import cli_evaluate; cli_evaluate()"
    out = run_tool(
        "lmms_eval",
        *("-c", program, "--model", "vqguard", "--model_args", f"pretrained={run}"),
        *(*options, "--output_path", str(tmp_path / "out")),
        folder=tmp_path,
    )
    results = next((tmp_path / "out").rglob("*results.json"))
    numbers = json.loads(results.read_text())["results"]["naming"]
    assert numbers["refused,none"] == pytest.approx(flagged / len(said)), out
    named = sum(bool(answer.text.split()) for answer in said)
    assert numbers["named,none"] == pytest.approx(named / len(said))


def test_what_is_not_known_is_refused(run: Path, tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from lmms_eval.models import get_model\n"
        "model = get_model('vqguard')\n"
        "for given in ({'batch_size': 4}, {'device': 'meta'}, {'trust_remote_code': True}):\n"
        "    try:\n"
        "        model(pretrained=sys.argv[1], **given)\n"
        "    except ValueError as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    said = run_tool("lmms_eval", "-c", program, run)
    assert len(re.findall("^ConfigError", said, re.MULTILINE)) == 3, said
