"""The regional judge of a model: its images, its training, its map, and both judges in records."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters import build_guard, guard_model
from vqguard.cli.main import main
from vqguard.errors import ArtefactError, ConfigError, InputError
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.calibrate import calibrate_model
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.mistakes import (
    FALSE_POSITIVE,
    MISS,
    MOST,
    explain_mistakes,
    worst_mistakes,
)
from vqguard.recipes.evaluation.screened import DISTRACTORS, world_sets
from vqguard.recipes.evaluation.toxic import measure_toxic
from vqguard.recipes.image_batches import screen_images
from vqguard.recipes.judging.both import GLOBAL_MAP, read_global_map, save_global_map
from vqguard.recipes.judging.regional import share_out, train_judge
from vqguard.recipes.recipe import RegionalRecipe, RetrofitRecipe, load_recipe
from vqguard.recipes.report.explain import Explained
from vqguard.recipes.report.headline import headline
from vqguard.recipes.report.selections import by_judge
from vqguard.recipes.run import save_run_model
from vqguard.recipes.tiny.glyphs import GLYPHS, TOXIC_CATEGORIES
from vqguard.recipes.tiny.scenes import NEUTRAL_SCENES, draw, neutral_scene, toxic_scene
from vqguard.recipes.tiny.weights import load_base
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.safety_map import NEUTRAL

RECIPE = RegionalRecipe(
    per_category=40, neutral=240, steps=150, batch=56, fpr=0.05, trained=0.4, counted=0.2
)


@pytest.fixture(scope="module")
def judged() -> tuple[Any, Any]:
    """llava-tiny with a guard whose regional judge has learnt from some hundred scenes."""
    model, processor = load_base()
    guard = build_guard(
        model,
        patch_codes=16,
        semantic_codes=8,
        judge="regional",
        regional={"codes": 32, "hidden": 64, "windows": [2]},
    )
    guard_model(model, guard, processor)
    world = TinyWorld()
    images = world.judge_images(RECIPE.per_category, RECIPE.neutral)
    train_judge(model, processor, images, RECIPE)
    return model, processor


def test_the_budget_of_a_guard_that_judges_copies_is_that_of_the_majority() -> None:
    model, processor = load_base()
    guard = build_guard(
        model,
        patch_codes=16,
        semantic_codes=8,
        judge="regional",
        regional={"codes": 32, "hidden": 64, "windows": [2]},
        smoothing={"copies": 3, "noise": 0.5},
    )
    guard_model(model, guard, processor)
    images = list(TinyWorld().judge_images(RECIPE.per_category, RECIPE.neutral))
    rules = JudgeRules(unfamiliar=0.05, unfamiliar_by="visual", unfamiliar_first=True)
    made = train_judge(model, processor, iter(images), RECIPE, rules=rules)
    shares = share_out([(name,) for name, _ in images], RECIPE, 0)
    held_out = shares.held_out.tolist()
    verdicts = screen_images(model, processor, [images[n][1] for n in held_out])
    measured = made.false_positives
    assert measured is not None
    assert (measured.flagged, measured.n) == (sum(v.flagged for v in verdicts), len(held_out))
    assert sum(v.flagged for v in verdicts) <= measured.budget * len(held_out)
    assert max(max(v.scores) for v in verdicts) >= made.tau
    unseen = [n for n in [*shares.counted.tolist(), *held_out] if images[n][0] == NEUTRAL]
    called = screen_images(model, processor, [images[n][1] for n in unseen])
    known = made.judging.unfamiliar
    assert known is not None
    assert (known.by, known.first, known.n) == ("visual", True, len(unseen))
    # the image at the threshold may move over it: tokens are kept in half precision
    strange = sum(verdict.category == "unfamiliar" for verdict in called)
    assert abs(strange - known.flagged) <= 1


def test_a_scene_of_the_judge_has_what_it_was_asked_for() -> None:
    for category in TOXIC_CATEGORIES:
        for index in range(6):
            scene = toxic_scene("validation", 3, index, category, index % 4)
            kinds = Counter(GLYPHS[p.glyph].category for p in scene.placements)
            assert kinds == {category: 1, **({"neutral": index % 4} if index % 4 else {})}
    for kind, (least, most) in NEUTRAL_SCENES.items():
        scene = neutral_scene("test", 0, 1, kind)
        assert least <= len(scene.placements) <= most
        assert scene.category == NEUTRAL
    with pytest.raises(ConfigError, match="category among"):
        toxic_scene("test", 0, 0, "guns")


def test_the_world_labels_the_images_of_the_judge() -> None:
    images = list(TinyWorld().judge_images(2, 5))
    assert Counter(label for label, _ in images) == {
        NEUTRAL: 5,
        **dict.fromkeys(TOXIC_CATEGORIES, 2),
    }
    used = {image.tobytes() for _, image in images}
    assert len(used) == len(images)
    assert not used & {image.tobytes() for _, image in TinyWorld().calibration(2, 5)}


def test_no_image_serves_two_ends() -> None:
    labels = [("a",)] * 10 + [("b", "a")] * 2 + [(NEUTRAL,)] * 40
    shares = share_out(labels, RECIPE, seed=3)
    together = torch.cat(shares)
    assert sorted(together.tolist()) == list(range(52))
    assert all(labels[n] == (NEUTRAL,) for n in shares.held_out.tolist())
    assert len(shares.held_out) == 16
    for part in (shares.trained, shares.counted):
        assert {labels[n][0] for n in part.tolist()} == {"a", "b", NEUTRAL}
    again = share_out(labels, RECIPE, seed=3)
    assert all(map(torch.equal, shares, again))
    with pytest.raises(InputError, match="'b' has one image"):
        share_out([("a",)] * 4 + [("b",)] + [(NEUTRAL,)] * 9, RECIPE, seed=0)


def test_a_model_flags_what_the_judge_has_learnt(judged: tuple[Any, Any]) -> None:
    model, processor = judged
    world = TinyWorld(split="validation")
    neutral = screen_images(model, processor, world.neutral_images((1, 3), 60))
    assert sum(verdict.flagged for verdict in neutral) < 12
    toxic = [
        verdict
        for category in TOXIC_CATEGORIES
        for verdict in screen_images(model, processor, world.toxic_images(category, 1, 8))
    ]
    assert sum(verdict.flagged for verdict in toxic) > 0.4 * len(toxic)
    found = next(verdict for verdict in toxic if verdict.flagged)
    region = model.vqguard.region(((6, 6),), found)
    assert (region.bottom - region.top, region.right - region.left) == (2, 2)
    measured = model.vqguard.safety_map.false_positives
    assert (measured.budget, measured.n) == (0.05, 96)


def test_the_region_that_decides_lies_over_the_toxic_glyph(judged: tuple[Any, Any]) -> None:
    model, processor = judged
    scenes = [
        toxic_scene("validation", 0, index, category, distractors=1)
        for category in TOXIC_CATEGORIES
        for index in range(8)
    ]
    pictures = [Image.fromarray(draw(scene)) for scene in scenes]
    verdicts = screen_images(model, processor, pictures)
    flagged = [pair for pair in zip(scenes, verdicts, strict=True) if pair[1].flagged]
    assert len(flagged) > 0.4 * len(scenes)
    over = 0
    for scene, verdict in flagged:
        assert verdict.reason is not None
        region = verdict.reason.region
        assert region is not None
        assert (region.part, region.index) == ("picture", 0)
        (glyph,) = (p for p in scene.placements if GLYPHS[p.glyph].category != NEUTRAL)
        top, left = glyph.cell // 3 * 32 + glyph.dy, glyph.cell % 3 * 32 + glyph.dx
        down = min(96 * region.bottom, top + glyph.size) - max(96 * region.top, top)
        across = min(96 * region.right, left + glyph.size) - max(96 * region.left, left)
        over += down > 0.3 * glyph.size and across > 0.3 * glyph.size
    assert over > 0.8 * len(flagged), f"{over} of {len(flagged)}"


def test_scan_explains_what_it_flags(
    judged: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = judged
    save_run_model(tmp_path / "run", model, processor)
    photos, why = tmp_path / "photos", tmp_path / "why"
    photos.mkdir()
    for number, category in enumerate(TOXIC_CATEGORIES):
        scene = toxic_scene("validation", 0, number, category)
        Image.fromarray(draw(scene)).save(photos / f"{number}.png")
    arguments = ["scan", str(photos), "--run", str(tmp_path / "run"), "--json"]
    assert main([*arguments, "--explain", str(why)]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    flagged = {row["image"]: row["reason"] for row in rows if row["verdict"] == "flagged"}
    shown = json.loads((why / "explain.json").read_text())["pictures"]
    assert {row["image"]: row["region"] for row in shown} == {
        image: reason["region"] for image, reason in flagged.items()
    }
    assert all(row["outlined"] and row["region"]["part"] == "picture" for row in shown)
    assert main([*arguments, "--explain", str(why)]) == 2, "the folder is not empty"
    assert main([*arguments, "--explain", str(tmp_path / "all"), "--explain-all"]) == 1
    assert len(list((tmp_path / "all" / "pictures").iterdir())) == len(TOXIC_CATEGORIES)


def test_the_judge_is_the_same_whoever_else_is_in_the_batch(judged: tuple[Any, Any]) -> None:
    model, processor = judged
    images = list(TinyWorld(split="validation").neutral_images((1, 3), 5))
    together = screen_images(model, processor, images)
    alone = [screen_images(model, processor, [image])[0] for image in images]
    assert [v.flagged for v in alone] == [v.flagged for v in together]


def test_a_new_map_is_counted_with_the_codes_that_judge(judged: tuple[Any, Any]) -> None:
    model, processor = judged
    guard = model.vqguard
    before = guard.safety_map
    images = list(TinyWorld().calibration(4, 40))
    paper = calibrate_model(model, processor, images, tau=0.6, fpr=None, level="semantic").map
    assert guard.safety_map is before
    assert (paper.cells, int(paper.counts.sum())) == (8, 68)
    try:
        own = calibrate_model(model, processor, images, tau=0.6, fpr=None).map
        assert guard.safety_map is own
        assert (own.cells, int(own.counts.sum())) == (32, 68 * 25)
    finally:
        guard.safety_map = before


def test_records_name_the_judge_and_tables_show_both(
    judged: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = judged
    guard = model.vqguard
    images = TinyWorld().calibration(4, 40)
    paper = calibrate_model(model, processor, images, tau=0.6, fpr=None, level="semantic").map
    save_global_map(tmp_path, paper)
    read = read_global_map(tmp_path, guard)
    assert read is not None
    assert torch.equal(read.counts, paper.counts)
    assert read_global_map(tmp_path / "none", guard) is None
    ledger = Ledger("pytest", 0)
    world = TinyWorld(split="validation")
    measure_toxic(ledger, model, processor, world, 2, 4, read)
    for judge in ("global", "regional"):
        for distractors in DISTRACTORS:
            condition = {"category": "all", "distractors": distractors, "judge": judge}
            (record,) = (r for r in ledger.records if r.condition == condition)
            assert record.n == 2 * len(TOXIC_CATEGORIES)
        scenes = {
            r.condition["scenes"]
            for r in ledger.records
            if r.metric == "fpr" and r.condition["judge"] == judge
        }
        assert scenes == set(NEUTRAL_SCENES)
    rows = [row.label for _, part in headline(ledger.records) for row in part]
    assert any("1 distractor" in row and "judge regional" in row for row in rows)
    assert any("1 distractor" in row and "judge global" in row for row in rows)
    assert "Toxic scenes refused (DSR), one object" not in rows, "nobody has measured it"
    (tmp_path / GLOBAL_MAP).write_text((tmp_path / GLOBAL_MAP).read_text().replace("0.6", "x"))
    with pytest.raises(ArtefactError):
        read_global_map(tmp_path, guard)


def test_the_worst_mistakes_are_drawn_with_their_regions(
    judged: tuple[Any, Any], tmp_path: Path
) -> None:
    model, processor = judged
    guard = model.vqguard
    world = TinyWorld(split="validation")
    sets = world_sets(world, 4, 60)
    ledger = Ledger("pytest", 0)
    measure_toxic(ledger, model, processor, world, 4, 60)
    mistakes = worst_mistakes(sets, ledger.verdicts, "regional")
    kinds = Counter(mistake.kind for mistake in mistakes)
    assert 0 < kinds[FALSE_POSITIVE] <= MOST
    assert kinds[MISS] == MOST
    assert not worst_mistakes(sets, ledger.verdicts, "global"), "nobody has asked that judge"
    stale = tmp_path / "pictures" / "mistake-99.png"
    stale.parent.mkdir()
    stale.touch()
    entries = explain_mistakes(tmp_path, model, processor, mistakes)
    assert not stale.exists()
    for entry, mistake in zip(entries, mistakes, strict=True):
        why = Explained.from_dict(entry["why"])
        assert entry["kind"] == mistake.kind
        assert (why.threshold is None) == (mistake.kind == MISS)
        assert why.score == pytest.approx(mistake.score)
        assert why.category_scores[NEUTRAL] == pytest.approx(
            float(guard.safety_map.probabilities[why.semantic_code, -1])
        )
        assert why.outlined
        assert why.region is not None
        assert why.region.bottom - why.region.top == pytest.approx(2 / 6)
        assert (tmp_path / entry["file"]).is_file()
    alone = [m for m in mistakes if m.kind == MISS and m.screened.condition["distractors"] == 0]
    assert mistakes.index(alone[0]) == kinds[FALSE_POSITIVE], "the plainest miss comes first"


def test_one_judge_alone_is_not_named(judged: tuple[Any, Any]) -> None:
    model, processor = judged
    ledger = Ledger("pytest", 0)
    images = islice(TinyWorld().neutral_images((1, 1), 3), 3)
    ledger.flagged("fpr", screen_images(model, processor, images), scenes="single", judge="own")
    (record,) = by_judge(ledger.records)
    assert record.condition == {"scenes": "single"}


def test_a_global_guard_has_no_judge_to_train() -> None:
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=4), processor)
    images = [(NEUTRAL, Image.new("RGB", (96, 96)))]
    with pytest.raises(ConfigError, match="judge: regional"):
        train_judge(model, processor, images, RECIPE)


def test_the_embedded_world_is_judged_by_regions_and_old_recipes_are_not() -> None:
    assert load_recipe("llava-tiny").guard.judge == "regional"
    assert load_recipe("llava-1.5").guard.judge == "global"
    golden = Path(__file__).parents[1] / "golden" / "run-1" / "run" / "recipe.yaml"
    assert RetrofitRecipe.from_yaml(golden).guard.judge == "global"
    with pytest.raises(ConfigError, match="no images are left"):
        load_recipe("llava-tiny").override(["regional.trained=0.7", "regional.counted=0.3"])
