"""The judge alone: from folders of images to a run, its report, and what others do with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqguard.adapters.storage.manifest import is_guard_only, read_manifest
from vqguard.cli.main import main
from vqguard.config import GuardSettings, RegionalSettings
from vqguard.errors import ArtefactError, ChecksumError, ConfigError, InputError
from vqguard.images import open_image
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.evaluate import evaluate_run
from vqguard.recipes.judge_alone.calibrate import judge_alone
from vqguard.recipes.judge_alone.images import images_of, parts_of
from vqguard.recipes.judging.recipe import JudgeRecipe
from vqguard.recipes.recipe import RegionalRecipe
from vqguard.recipes.report.card import run_card
from vqguard.recipes.run import model_checksum, open_run
from vqguard.recipes.tiny.scenes import draw as draw_scene
from vqguard.recipes.tiny.scenes import neutral_scene, toxic_scene
from vqguard.recipes.tiny.weights import load_base
from vqguard.records import read_record_file, select
from vqguard.safety_map import NEUTRAL

GUARD = GuardSettings(
    judge="regional",
    semantic_codes=32,
    refusal_text="sorry , i cannot help with that .",
    regional=RegionalSettings(codes=32, hidden=64, windows=(2,)),
)
REGIONAL = RegionalRecipe(steps=60, batch=56, fpr=0.05)
CATEGORIES = ("gun", "knife")


def draw(folder: Path, per_category: int, neutral: int) -> Path:
    """Single objects of two categories and neutral scenes, one folder a category."""
    scenes = {
        category: [toxic_scene("calibration", 900, i, category) for i in range(per_category)]
        for category in CATEGORIES
    }
    scenes[NEUTRAL] = [neutral_scene("calibration", 901, i, "single") for i in range(neutral)]
    for category, some in scenes.items():
        (folder / category).mkdir(parents=True, exist_ok=True)
        for number, scene in enumerate(some):
            Image.fromarray(draw_scene(scene)).save(folder / category / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("pictures"), 24, 90)


@pytest.fixture(scope="module")
def recipe(pictures: Path) -> JudgeRecipe:
    return JudgeRecipe("llava-tiny", images=pictures, guard=GUARD, regional=REGIONAL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, recipe: JudgeRecipe) -> Path:
    folder = tmp_path_factory.mktemp("run") / "judge"
    judge_alone(recipe, folder, command="a test")
    return folder


def test_the_report_has_both_rates_with_intervals_on_images_held_out(run: Path) -> None:
    file = read_record_file(run / "report.json")
    assert {r.condition["judge"] for r in select(file.records, "dsr")} >= {"regional"}
    own = [r for r in file.records if r.condition.get("judge") == "regional"]
    categories = {r.condition["category"] for r in select(own, "dsr")}
    assert categories == {*CATEGORIES, "all"}
    assert all(r.condition["images"] == "held out" for r in select(own, "dsr"))
    assert all(r.threat_model == "toxic_image" for r in select(own, "dsr"))
    [fpr] = select(own, "fpr")
    assert fpr.n == 18  # a fifth of the neutral ones
    assert all(r.low is not None and r.high is not None for r in [fpr, *select(own, "dsr")])
    found = next(r for r in select(own, "dsr") if r.condition["category"] == "all")
    assert found.n == 10
    assert found.value >= 0.3
    assert file.metadata["levels"] == "semantic"
    curves = file.sections["series"]["curves"]
    assert set(curves) == set(CATEGORIES)
    for points in curves.values():
        assert all(set(point) == {"tau", "fpr", "tpr", "precision"} for point in points)
    groups = {entry["group"] for entry in file.sections["pictures"]}
    assert any(group.startswith("Codes that flag") for group in groups)
    lines = (run / "verdicts.jsonl").read_text().splitlines()
    assert all(json.loads(line)["quantised"] is False for line in lines)


def test_the_page_says_what_it_is_and_loads_nothing(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "visual tokens are judged, not quantised" in page
    assert "Jailbreak by image" not in page
    assert "http" not in page.replace("http-equiv", "").replace("https://", "http")
    assert "data:image/png;base64," in page


def test_it_takes_a_few_kilobytes_and_names_its_base(run: Path) -> None:
    manifest = read_manifest(run / "model")
    assert is_guard_only(manifest)
    assert not (run / "recipe.yaml").exists()
    weights = sum(path.stat().st_size for path in (run / "model").rglob("*.safetensors"))
    assert weights < 400_000


def test_a_picture_that_passes_is_answered_as_by_the_undefended_model(
    run: Path, pictures: Path
) -> None:
    loaded = open_run(run)
    base, processor = load_base()
    names = sorted((pictures / NEUTRAL).iterdir())[:8] + sorted((pictures / "gun").iterdir())[:8]
    images = [open_image(path) for path in names]
    verdicts = loaded.screen_images(images)
    assert not any(verdict.quantised for verdict in verdicts)
    assert 0 < sum(verdict.flagged for verdict in verdicts) < len(images)
    for image, verdict in zip(images, verdicts, strict=True):
        answer = loaded.ask(image, "what do you see ?", max_new_tokens=8)
        assert answer.verdict.flagged == verdict.flagged
        if verdict.flagged:
            assert answer.text.startswith("sorry")
            continue
        inputs = processor(images=[image], text=["<image>\nname it"], return_tensors="pt")
        with torch.no_grad():
            assert torch.equal(loaded.model(**inputs).logits, base(**inputs).logits)


def test_verify_proves_the_refusals_and_says_that_nothing_is_quantised(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "proof.json"
    assert main(["verify", str(run), "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "judged, not quantised" in text
    document = json.loads(out.read_text())
    assert "not quantised" in document["judge_alone"]
    assert document["checks"]["probe"][0] == document["checks"]["codewords"][0] == "skipped"
    assert document["checks"]["rows"][0] == document["checks"]["regional"][0] == "passed"


def test_the_card_promises_no_bottleneck(run: Path) -> None:
    card = run_card(run, run / "model")
    assert "judged, not quantised" in card
    assert "There is no bottleneck" in card
    assert "one of a fixed set of codewords" not in card
    assert "| patch codewords | none" in card
    assert "All toxic images" in card


def test_an_evaluation_finds_the_same_again(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    before = read_record_file(copy / "report.json").records
    (copy / "report.json").unlink()
    result = evaluate_run(copy, command="again")
    assert [(r.metric, r.condition, r.value, r.n) for r in result.records] == [
        (r.metric, r.condition, r.value, r.n) for r in before
    ]
    with pytest.raises(ConfigError, match="no settings"):
        evaluate_run(copy, command="again", overrides=("evaluation.neutral=3",))


def test_its_map_is_made_anew_and_it_still_judges_alone(
    run: Path, pictures: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    assert main(["calibrate", str(copy), "--images", str(pictures), "--tau", "0.5"]) == 0
    guard = open_run(copy).model.vqguard
    assert guard.safety_map.tau == 0.5
    assert not guard.quantises


def test_a_stopped_run_is_made_whole_and_another_recipe_is_refused(
    run: Path, recipe: JudgeRecipe, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "report.html").unlink()
    with pytest.raises(ConfigError, match="--resume"):
        judge_alone(recipe, copy, command="a test")
    guard = (copy / "model/guard/guard.json").read_bytes()
    judge_alone(recipe, copy, resume=True, command="a test")
    assert (copy / "report.html").is_file()
    assert (copy / "model/guard/guard.json").read_bytes() == guard
    with pytest.raises(ConfigError, match="another recipe"):
        judge_alone(replace(recipe, seed=5), copy, resume=True, command="a test")


# -- bad input


def failing(recipe: JudgeRecipe, rules: JudgeRules | None = None) -> str:
    with pytest.raises((InputError, ConfigError)) as caught:
        parts_of(images_of(recipe), recipe, rules or JudgeRules())
    return str(caught.value)


def test_too_few_neutral_images_for_the_budget_are_told_what_would_do(
    recipe: JudgeRecipe, tmp_path: Path
) -> None:
    asked = replace(recipe, regional=replace(REGIONAL, fpr=0.005))
    text = failing(asked)
    assert "needs 199 neutral images" in text
    least = int(text.split("give at least ")[1].split(" ")[0])
    enough = replace(asked, images=draw(tmp_path, 8, least))
    parts = parts_of(images_of(enough), enough, JudgeRules())
    assert len(parts.shares.held_out) >= 199
    possible = float(text.split("--fpr ")[1])
    loose = replace(recipe, regional=replace(REGIONAL, fpr=possible))
    assert parts_of(images_of(loose), loose, JudgeRules())
    assert "more" not in failing(asked, JudgeRules(budget="category")).split("needs 399")[0]


def test_the_threshold_s_share_grows_with_what_the_budget_needs(recipe: JudgeRecipe) -> None:
    asked = replace(recipe, regional=replace(REGIONAL, fpr=0.025))
    parts = parts_of(images_of(asked), asked, JudgeRules())
    assert len(parts.shares.held_out) == 39
    images = images_of(asked).images
    used = torch.cat(list(parts.shares)).unique()
    assert len(torch.cat([used, parts.tested]).unique()) == len(used) + len(parts.tested)
    assert len(used) + len(parts.tested) == len(images)
    neutral = [n for n, image in enumerate(images) if image.labels == (NEUTRAL,)]
    shares = [set(share.tolist()) & set(neutral) for share in (*parts.shares, parts.tested)]
    assert sum(map(len, shares)) == len(neutral)
    assert set(parts.shares.held_out.tolist()) <= set(neutral)


@pytest.mark.parametrize("copies", [1, 2])
def test_a_category_of_one_picture_or_of_copies_of_one_is_refused(
    recipe: JudgeRecipe, pictures: Path, tmp_path: Path, copies: int
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    (folder / "axe").mkdir()
    for number in range(copies):
        shutil.copy(folder / "gun" / "001.png", folder / "axe" / f"{number}.png")
    (folder / "gun" / "001.png").unlink()
    text = failing(replace(recipe, images=folder))
    assert "'axe' has 1 different image" in text
    assert "20 or more" in text


def test_pictures_that_are_neutral_too_missing_neutrals_and_no_folders_are_refused(
    recipe: JudgeRecipe, pictures: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    shutil.copy(folder / "gun" / "001.png", folder / NEUTRAL / "copy.png")
    assert "cannot be neutral and toxic" in failing(replace(recipe, images=folder))
    shutil.rmtree(folder / NEUTRAL)
    assert "one of them called 'neutral'" in failing(replace(recipe, images=folder))
    assert "give --images" in failing(JudgeRecipe("hub:somebody/model"))


def test_few_images_are_warned_of(recipe: JudgeRecipe, tmp_path: Path) -> None:
    few = replace(recipe, images=draw(tmp_path, 6, 90))
    [text] = images_of(few).warnings
    assert "gun (6), knife (6)" in text


def test_rules_that_name_no_category_and_too_many_categories_are_refused_before_anything_runs(
    recipe: JudgeRecipe, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("policies:\n  gum: {action: warn, warning: hm}\n")
    output = tmp_path / "run"
    with pytest.raises(InputError, match="gun"):
        judge_alone(replace(recipe, rules=rules), output, command="")
    rules.write_text("unfamiliar: 0.1\nunfamiliar_by: visual\n")
    with pytest.raises(ConfigError, match="a judge alone does not have"):
        judge_alone(replace(recipe, rules=rules), output, command="")
    narrow = replace(GUARD, regional=replace(GUARD.regional, width=1))
    with pytest.raises(ConfigError, match=r"guard.regional.width=2"):
        judge_alone(replace(recipe, guard=narrow), output, command="")
    assert not (output / "model").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--labels", "README.md"], "--labels and --fpr belong to"),
        (["--levels", "semantic", "--dry-run"], "trains no model"),
        (["--levels", "semantic", "--labels", "README.md"], "set images too"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [name.replace("README.md", __file__) for name in arguments]
    assert main(["retrofit", "--model", "llava-tiny", *given]) == 2
    assert said in capsys.readouterr().err


def test_the_command_makes_a_run_and_scan_judges_with_it(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    settings = ["regional.steps=20", "regional.batch=28", "guard.judge=global", "held_out=0.3"]
    given = [part for setting in settings for part in ("--set", setting)]
    command = ["retrofit", "--model", "llava-tiny", "--levels", "semantic", "--fpr", "0.4"]
    assert main([*command, "--images", str(pictures), "--output", str(output), *given]) == 0
    text = capsys.readouterr().out
    assert "judged, not quantised" in text
    assert "All toxic images" in text
    made = JudgeRecipe.from_yaml(output / "judge.yaml")
    assert made.guard.regional.windows == (2,)  # of the model's own recipe
    assert open_run(output).model.vqguard.regional is None
    assert main(["scan", str(pictures / "gun"), "--run", str(output), "--json"]) in (0, 1)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["quantised"] for line in lines} == {False}


# -- behind a vision encoder


def stripes(folder: Path, kind: int, count: int) -> None:
    """Pictures of stripes in one of two directions, which any encoder tells apart."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(kind)
    for number in range(count):
        wave = np.sin(np.arange(64) * random.uniform(0.4, 0.8) + random.uniform(0, 6))
        plane = wave[:, None] * np.ones(64) if kind else wave[None] * np.ones((64, 1))
        grey = (127 + 90 * plane + random.normal(0, 8, (64, 64))).clip(0, 255).astype(np.uint8)
        Image.fromarray(np.stack([grey] * 3, axis=-1)).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny vision transformer of transformers, in a folder."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=32,
        patch_size=8,
    )
    folder = tmp_path_factory.mktemp("encoder")
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder_run(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    images = tmp_path_factory.mktemp("stripes")
    stripes(images / "across", 1, 30)
    stripes(images / NEUTRAL, 0, 90)
    recipe = JudgeRecipe(
        f"transformers:{encoder}",
        images=images,
        guard=replace(GUARD, regional=RegionalSettings(codes=16, hidden=32, windows=(1, 2))),
        regional=replace(REGIONAL, steps=80),
    )
    folder = tmp_path_factory.mktemp("encoder-run") / "judge"
    judge_alone(recipe, folder, command="a test")
    return folder


def test_a_judge_behind_an_encoder_finds_what_it_was_shown(
    encoder: Path, encoder_run: Path, tmp_path: Path
) -> None:
    records = read_record_file(encoder_run / "report.json").records
    found = [r for r in select(records, "dsr") if r.condition["judge"] == "regional"]
    assert all(r.value >= 0.8 for r in found)
    stripes(tmp_path / "across", 1, 5)
    stripes(tmp_path / NEUTRAL, 0, 5)
    loaded = open_run(encoder_run, base=f"transformers:{encoder}")
    for category, wanted in (("across", True), (NEUTRAL, False)):
        images = [open_image(path) for path in sorted((tmp_path / category).iterdir())]
        flags = [verdict.flagged for verdict in loaded.screen_images(images)]
        assert flags == [wanted] * 5
    with pytest.raises(InputError, match="nobody to ask"):
        loaded.ask(images[0], "what is it ?")


def test_the_encoder_is_named_by_the_caller_and_must_be_the_same(
    encoder: Path, encoder_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ArtefactError, match="--base"):
        open_run(encoder_run)
    other = tmp_path / "other"
    shutil.copytree(encoder, other)
    from transformers import ViTModel

    model: Any = ViTModel.from_pretrained(other)
    with torch.no_grad():
        model.layernorm.weight[0] += 1e-3
    model.save_pretrained(other)
    with pytest.raises(ChecksumError, match="other weights"):
        open_run(encoder_run, base=str(other))
    assert main(["verify", str(encoder_run), "--base", str(encoder)]) == 0
    assert "no language model" in capsys.readouterr().out


def test_its_map_is_edited_in_its_place(encoder: Path, encoder_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(encoder_run, copy)
    assert main(["map", "edit", str(copy), "--policy", "across=report"]) == 0
    loaded = open_run(copy, base=str(encoder))
    assert loaded.model.vqguard.safety_map.judging.policies["across"].action == "report"
    # an audit log of a gateway names the model, which another map leaves as it is
    assert model_checksum(copy) == model_checksum(encoder_run)
    guard = copy / "model/guard/guard.json"
    guard.write_text(guard.read_text().replace("report", "refuse"))
    with pytest.raises(ChecksumError):
        open_run(copy, base=str(encoder))
    assert main(["export", str(encoder_run), "--output", str(tmp_path / "out")]) == 2
