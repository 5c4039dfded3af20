"""Calibration with rules of one's own, and `vqguard map`, on a run of llava-tiny."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters import build_guard, guard_model, load_guarded
from vqguard.cli.main import main
from vqguard.errors import ChecksumError, ConfigError, InputError
from vqguard.judging.policies import Policy
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.calibrate import calibrate_run
from vqguard.recipes.image_batches import collect_features
from vqguard.recipes.judging.map_changes import (
    MapEdit,
    cell_rows,
    diff_maps,
    edit_map,
    read_map,
)
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.report.map_page import write_map_page
from vqguard.recipes.run import open_run, save_run_model
from vqguard.recipes.tiny.weights import load_base
from vqguard.safety_map import SafetyMap

COLOURS = {"neutral": (0, 90, 0), "gun": (200, 0, 0), "knife": (9, 9, 200)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose semantic codewords are features of the images beside it, and those images."""
    folder = tmp_path_factory.mktemp("mapped")
    pictures = []
    for category, colour in COLOURS.items():
        (folder / "images" / category).mkdir(parents=True)
        for number in range(24 if category == "neutral" else 6):
            shade = tuple(min(255, part + number) for part in colour)
            image = Image.new("RGB", (64, 64), shade)
            image.save(folder / f"images/{category}/{number}.png")
            if number == 2:
                pictures.append(image)
    model: Any
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4), processor)
    _, semantic = collect_features(model, processor, pictures)
    with torch.no_grad():
        model.vqguard.semantic.codebook.weight[:3] = semantic
    run = folder / "run"
    run.mkdir()
    load_recipe("llava-tiny").to_yaml(run / "recipe.yaml")
    save_run_model(run, model, processor)
    calibrate_run(run, folder / "images", fpr=None, tau=0.6)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished / "run", tmp_path / "run")


def test_labels_rules_and_a_kept_budget(finished: Path, run: Path, tmp_path: Path) -> None:
    lines = [
        f"{path.parent.name}/{path.name},{path.parent.name}"
        + (",red" if path.parent.name == "gun" else "")
        for path in sorted((finished / "images").rglob("*.png"))
    ]
    (tmp_path / "labels.csv").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "rules.yaml").write_text(
        "smoothing: 0.5\nunfamiliar: 0.1\nhierarchy: {weapon: [gun, knife]}\n"
        "policies: {weapon: {action: raise}, red: {action: report},\n"
        "  unfamiliar: {action: refuse}}\n",
        encoding="utf-8",
    )
    arguments = ["calibrate", str(run), "--images", str(finished / "images"), "--fpr", "0.1"]
    arguments += ["--labels", str(tmp_path / "labels.csv"), "--rules", str(tmp_path / "rules.yaml")]
    assert main(arguments) == 0
    made = read_map(run)
    assert made.categories == ("gun", "knife", "red")
    assert made.counts.sum(dim=0).tolist() == [6, 6, 6, 12]
    assert made.judging.unfamiliar is not None
    assert made.judging.unfamiliar.n == 36
    assert made.false_positives is not None
    assert (made.false_positives.n, made.false_positives.conformal) == (12, True)
    loaded = open_run(run)
    red, noise = Image.new("RGB", (64, 64), COLOURS["gun"]), Image.effect_noise((64, 64), 90)
    seen, unknown = loaded.screen_images([red, noise.convert("RGB")])
    assert (seen.category, seen.action) == ("gun", "raise")
    assert (unknown.category, unknown.flagged) == ("unfamiliar", True)


@pytest.mark.parametrize(
    ("rules", "fpr", "message"),
    [
        (JudgeRules(thresholds={"gun": 0.3}), 0.1, "use one"),
        (JudgeRules(budget="category"), None, "use --fpr"),
        (JudgeRules(budget="category"), 0.05, "use at least 39 of them"),
        (JudgeRules(policies={"gum": Policy()}), None, "Did you mean 'gun'"),
        (JudgeRules(hierarchy={"weapon": ("gum",)}), None, "'gum'"),
        (JudgeRules(unfamiliar=0.01), None, "use at least 99 of them"),
    ],
)
def test_rules_that_do_not_fit_leave_the_old_map(
    finished: Path, run: Path, rules: JudgeRules, fpr: float | None, message: str
) -> None:
    before = read_map(run).version
    with pytest.raises(InputError, match=message):
        calibrate_run(run, finished / "images", fpr=fpr, tau=None, rules=rules)
    assert read_map(run).version == before


def test_policies_that_calibration_drops_are_warned_about(finished: Path, run: Path) -> None:
    edit_map(run, MapEdit(policies={"gun": Policy("raise")}))
    result = calibrate_run(run, finished / "images", fpr=None, tau=0.6)
    assert ["the old map had policies" in text for text in result.warnings] == [True]


def test_show(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["map", "show", str(run), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["version"] == read_map(run).version
    assert [row["category"] for row in shown["categories"]] == ["gun", "knife"]
    assert shown["cells"] == json.loads(json.dumps(cell_rows(read_map(run))))
    assert main(["map", "show", str(run)]) == 0
    text = capsys.readouterr().out
    assert "gun: 6 counted, threshold 0.600, refuse" in text
    assert "neutral 24" in text


def test_edit_writes_in_place_and_the_folder_stays_whole(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gun = next(r["cell"] for r in cell_rows(read_map(run)) if r["category"] == "gun")
    edits = ["--threshold", "knife=0.2", "--policy", "knife=report", "--allow", str(gun)]
    assert main(["map", "edit", str(run), *edits]) == 2, "without a reason"
    assert "reason" in capsys.readouterr().err
    assert main(["map", "edit", str(run), *edits, "--reason", "a drill"]) == 0
    changed = load_guarded(run / "model").vqguard.safety_map
    assert changed.thresholds == {"gun": 0.6, "knife": 0.2}
    assert changed.judging.policy("knife").action == "report"
    assert changed.category_of(gun) == "neutral"
    assert "a drill" in json.dumps(cell_rows(changed))
    back = ["--threshold", "knife=", "--policy", "knife=", "--release", str(gun)]
    assert main(["map", "edit", str(run), *back]) == 0
    restored = read_map(run)
    assert restored.judging.thresholds == {}
    assert restored.category_of(gun) == "gun"
    forbidding = ["--forbid", "3=knife", "--reason", "seen"]
    assert main(["map", "edit", str(run), *forbidding]) == 0
    assert read_map(run).category_of(3) == "knife"


@pytest.mark.parametrize("with_processor", [True, False])
def test_texts_of_policies_are_said_by_what_is_loaded(
    run: Path, tmp_path: Path, with_processor: bool
) -> None:
    (tmp_path / "policies.yaml").write_text(
        "gun: {action: refuse, refusal: {en: what do you see, fr: how many}}\n"
        "knife: {action: warn, warning: how many}\n",
        encoding="utf-8",
    )
    edit = ["map", "edit", str(run), "--policies", str(tmp_path / "policies.yaml")]
    assert main(edit) == 2, "two languages, and none is chosen"
    assert main([*edit, "--language", "en"]) == 0
    loaded = open_run(run)
    if not with_processor:
        loaded = replace(loaded, model=load_guarded(run / "model"))
    red, blue = (Image.new("RGB", (64, 64), COLOURS[name]) for name in ("gun", "knife"))
    refused, warned = (loaded.ask(picture, "what do you see ?") for picture in (red, blue))
    assert refused.text.strip() == "what do you see"
    assert refused.verdict.action == "refuse"
    assert warned.text.strip().startswith("how many")
    assert warned.verdict.action == "warn"


@pytest.mark.parametrize(
    "edits",
    [
        [],
        ["--threshold", "gum=0.4"],
        ["--threshold", "gun"],
        ["--threshold", "gun=much"],
        ["--policy", "gun=shrug"],
        ["--policy", "gun=warn"],
        ["--allow", "99", "--reason", "why"],
        ["--forbid", "1=gum", "--reason", "why"],
        ["--release", "1"],
    ],
)
def test_edits_that_do_not_fit_change_nothing(run: Path, edits: list[str]) -> None:
    before = (run / "model" / "guard" / "guard.json").read_bytes()
    assert main(["map", "edit", str(run), *edits]) == 2
    assert (run / "model" / "guard" / "guard.json").read_bytes() == before


def test_an_edit_says_when_the_budget_holds_no_longer(
    finished: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calibrate_run(run, finished / "images", fpr=0.1, tau=None)
    assert main(["map", "edit", str(run), "--policy", "gun=raise"]) == 0
    assert read_map(run).false_positives is not None
    capsys.readouterr()
    assert main(["map", "edit", str(run), "--tau", "0.3"]) == 0
    assert "holds no longer" in capsys.readouterr().err
    assert read_map(run).false_positives is None


def test_diff_names_the_images_that_flip(
    finished: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    edit_map(other, MapEdit.from_dict({"policies": {"gun": {"action": "report"}}}))
    page = tmp_path / "<b>diff.html"
    arguments = ["map", "diff", str(run), "--images", str(finished / "images")]
    assert main([*arguments, "--against", str(other), "--html", str(page), "--json"]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    assert {Path(row["image"]).parent.name for row in rows} == {"gun"}
    assert len(rows) == 6
    assert rows[0]["before"]["reason"]["action"] == "refuse"
    assert rows[0]["after"]["reason"]["action"] == "report"
    assert page.read_text(encoding="utf-8").count('<img src="data:image/png;base64,') == 6
    assert main([*arguments, "--tau", "0.6"]) == 0
    assert "0 of 36 images change" in capsys.readouterr().err
    assert main(arguments) == 2


def test_names_are_escaped_in_the_page(run: Path, tmp_path: Path) -> None:
    hostile = tmp_path / "<script>.png"
    Image.new("RGB", (64, 64), COLOURS["gun"]).save(hostile)
    other = read_map(run).with_judging(policies={"gun": Policy("report")})
    diff = diff_maps(run, other, [hostile], skip_bad=False)
    write_map_page(diff, tmp_path / "page.html")
    assert "<script>" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(diff.flips) == 1


def test_a_map_for_another_judge_is_refused(run: Path, finished: Path) -> None:
    own = read_map(run)
    other = SafetyMap(own.categories, own.counts, codebook_checksum="0" * 64)
    with pytest.raises(ChecksumError, match="calibrate again"):
        diff_maps(run, other, [finished / "images"], skip_bad=False)
    smaller = SafetyMap(own.categories, own.counts[:2], codebook_checksum=own.codebook_checksum)
    with pytest.raises(ConfigError, match="2 cells"):
        diff_maps(run, smaller, [finished / "images"], skip_bad=False)
