"""The suite itself is tested: guards that are broken on purpose have to be reported as broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.cli.main import main
from vqguard.codebooks.quantizer import VectorQuantizer
from vqguard.recipes.attacking import subjects as subjects_module
from vqguard.recipes.run import LoadedRun, open_run
from vqguard.records import read_record_file, select
from vqguard.safety_map import SafetyMap

GOLDEN = Path(__file__).parents[1] / "golden" / "run-1" / "run"
SUITE = """
name: broken
sentence: For tests.
requests: 3
eps_255: [255]
attacks:
  - {attack: none}
  - {attack: per_request, subjects: [base, guarded], steps: 2}
  - {attack: denial, steps: 2}
"""


def identity(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argmin is there and plays no part."""
    honest = VectorQuantizer.replace

    def passed_on(self: VectorQuantizer, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, honest(self, x)[1]

    monkeypatch.setattr(VectorQuantizer, "replace", passed_on)


def four_codes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A codebook that was never held to its features: four entries win everywhere."""
    weight = model.vqguard.patch.codebook.weight
    with torch.no_grad():
        weight[4:] = 1e4
    model.vqguard.patch.refresh()


def blind_map(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A map that flags nothing."""
    map_of(model, flagged=0)


def map_of(model: Any, flagged: int) -> None:
    """Give the guard a map whose first cells are flagged."""
    guard = model.vqguard
    counts = torch.zeros(guard.cells, 2, dtype=torch.int64)
    counts[flagged:, 1] = counts[:flagged, 0] = 5
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        (identity, "tokens_are_no_codewords"),
        (four_codes, "codebook_collapsed"),
        (blind_map, "map_flags_nothing"),
        (None, None),
    ],
)
def test_a_guard_that_is_broken_on_purpose_is_reported(
    broken: Callable[[Any, pytest.MonkeyPatch], None] | None,
    kind: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, suite, output = tmp_path / "run", tmp_path / "suite.yaml", tmp_path / "result"
    shutil.copytree(GOLDEN, run)
    suite.write_text(SUITE)

    def opened(folder: Path) -> LoadedRun:
        loaded = open_run(folder)
        map_of(loaded.model, flagged=1)
        if broken is not None:
            broken(loaded.model, monkeypatch)
        return loaded

    monkeypatch.setattr(subjects_module, "open_run", opened)
    assert main(["attack", str(run), "--suite", str(suite), "--output", str(output)]) == 0
    file = read_record_file(output / "records.json")
    alarms = [a["kind"] for a in file.sections["alarms"] if a["subject"] == "guarded"]
    health = {"tokens_are_no_codewords", "codebook_collapsed", "map_flags_nothing"}
    assert set(alarms) & health == ({kind} if kind else set()), json.dumps(alarms)
    denied = select(file.records, "asr", "guarded", attack="denial")
    assert bool(denied) == (broken is not blind_map)


@pytest.mark.slow
def test_without_an_argmin_the_trained_miniature_is_broken_by_its_own_attack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The shipped base behind a guard that quantises nothing: its answers are the base's."""
    from vqguard.adapters import build_guard, guard_model
    from vqguard.adapters.code_target import CodeTarget
    from vqguard.recipes.data.chat import prompt_text
    from vqguard.recipes.evaluation.jailbreak import pixels_of
    from vqguard.recipes.tiny.weights import load_base
    from vqguard.recipes.tiny.world import TinyWorld
    from vqguard.redteam import PGD, Budget

    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=64, semantic_codes=8), processor)
    blind_map(model, monkeypatch)
    identity(model, monkeypatch)
    cases = TinyWorld(0).attack_cases(4)
    target = CodeTarget(
        model,
        processor,
        [prompt_text(processor, case.request, picture=True) for case in cases],
        [case.opening for case in cases],
        gradient="plain",
    )
    result = PGD.within(Budget(255, 60, 1, 0, 10))(target, pixels_of(cases))
    assert result.success.all()
