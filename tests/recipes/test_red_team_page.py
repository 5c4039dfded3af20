"""The tables that docs/generate.py makes of suites' folders."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from vqguard.errors import InputError
from vqguard.recipes.attacking.journal import Journal
from vqguard.recipes.attacking.run_suite import write_result

from .test_attacking import attempt

SCRIPT = Path(__file__).parents[2] / "docs" / "red_team_page.py"
WON = {"target_prefix": True, "refusal_phrases": True}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_red_team_page", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_suite_s_tables_are_written_between_its_markers(
    script: ModuleType, tmp_path: Path
) -> None:
    attempts = [
        attempt(suite="mine", seed=seed, request=request) for seed in (0, 1) for request in range(4)
    ]
    attempts = [
        replace(a, judges=WON, evaluations=20) if a.seed == a.request else a for a in attempts
    ]
    Journal(tmp_path).append(attempts)
    write_result(tmp_path, attempts, command="vqguard attack", title="mine")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- mine:begin -->\nold\n<!-- mine:end -->\nz\n")
    script.fill_red_team([tmp_path], page)
    text = page.read_text()
    assert text.startswith("a\n<!-- mine:begin -->\nIn brackets")
    assert text.endswith("<!-- mine:end -->\nz\n")
    assert "old" not in text
    rows = [line.split(" | ") for line in text.splitlines() if "straight" in line]
    assert [row[3] for row in rows[:3]] == ["0", "1", "0, 1"]
    assert [row[4].split(" (")[0] for row in rows[:3]] == ["25.0 %", "25.0 %", "50.0 %"]
    assert rows[3][4:] == ["0 %", "25 %", "25 %", "25 % |"]  # after 20 of 61 evaluations


def test_rows_say_what_tells_an_attack_from_the_same_one_with_other_settings(
    script: ModuleType, tmp_path: Path
) -> None:
    three = attempt(attack="several_pictures", settings={"step_255": 8.0})
    six = replace(three, settings={"pictures": 6, "step_255": 8.0})
    for attempts, shown in (
        ([three, six], ["(step 8/255)", "(pictures 6, step 8/255)"]),
        ([three, replace(three, split="heldout_verbs")], ["split test", "split heldout_verbs"]),
    ):
        folder = tmp_path / attempts[1].split
        Journal(folder).append(attempts)
        write_result(folder, attempts, command="vqguard attack", title="mine")
        page = tmp_path / "page.md"
        page.write_text("<!-- small:begin -->\n<!-- small:end -->\n")
        script.fill_red_team([folder], page)
        rows = [line for line in page.read_text().splitlines() if "Several pictures" in line]
        assert [text in row for text, row in zip(shown * 2, rows, strict=True)] == [True] * 4


def test_a_page_without_the_suite_s_markers_is_left_alone(
    script: ModuleType, tmp_path: Path
) -> None:
    attempts = [attempt(suite="mine")]
    Journal(tmp_path).append(attempts)
    write_result(tmp_path, attempts, command="vqguard attack", title="mine")
    page = tmp_path / "page.md"
    page.write_text("nothing to fill")
    with pytest.raises(InputError, match="mine:begin"):
        script.fill_red_team([tmp_path], page)
    assert page.read_text() == "nothing to fill"
