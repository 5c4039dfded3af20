"""The embedded world: deterministic, disjoint splits, true words."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vqguard.errors import ConfigError
from vqguard.recipes.tiny.glyphs import GLYPHS, NEUTRAL_IDS, TOXIC_CATEGORIES, TOXIC_IDS
from vqguard.recipes.tiny.scenes import (
    CELLS,
    COLOUR_NAMES,
    Contents,
    Scene,
    Split,
    draw,
    held_out,
    sample_scene,
)


def combinations(scene: Scene) -> set[tuple[int, str, int]]:
    return {(p.glyph, scene.colour, p.cell) for p in scene.placements}


def test_every_word_is_part_of_the_glyph_s_name_and_is_used_once() -> None:
    emoji = pytest.importorskip("emoji")
    for glyph in GLYPHS:
        data = emoji.EMOJI_DATA.get(glyph.char) or emoji.EMOJI_DATA[glyph.char + "\ufe0f"]
        names = [data["en"], *data.get("alias", [])]
        words = {w for name in names for w in name.strip(":").lower().replace("-", "_").split("_")}
        assert glyph.word in words
    assert len({glyph.word for glyph in GLYPHS}) == len(GLYPHS)
    assert {GLYPHS[i].category for i in TOXIC_IDS} == set(TOXIC_CATEGORIES)
    assert len(NEUTRAL_IDS) + len(TOXIC_IDS) == len(GLYPHS)


@settings(max_examples=60, deadline=None)
@given(
    split=st.sampled_from(["train", "calibration", "validation", "test", "attack"]),
    seed=st.integers(0, 2**20),
    index=st.integers(0, 2**20),
    least=st.integers(1, 5),
    contents=st.sampled_from(["any", "neutral", "toxic"]),
)
def test_a_scene_follows_from_its_name_and_keeps_what_it_was_asked_for(
    split: Split, seed: int, index: int, least: int, contents: Contents
) -> None:
    scene = sample_scene(split, seed, index, objects=(least, 5), contents=contents)
    again = sample_scene(split, seed, index, objects=(least, 5), contents=contents)
    assert scene == again
    assert least <= len(scene.placements) <= 5
    assert len({p.cell for p in scene.placements}) == len(scene.placements)
    toxic = [p for p in scene.placements if p.glyph in TOXIC_IDS]
    if contents != "any":
        assert len(toxic) == (1 if contents == "toxic" else 0)
    part = {"test": "test", "attack": "test", "validation": "validation"}.get(split)
    assert all(held_out(*combination) == part for combination in combinations(scene))


def test_splits_share_no_combination_and_hold_one_cell_of_each_glyph_on_each_colour() -> None:
    for glyph in range(len(GLYPHS)):
        for colour in COLOUR_NAMES:
            parts = [held_out(glyph, colour, cell) for cell in range(CELLS)]
            assert sorted(part for part in parts if part) == ["test", "validation"]
    splits: tuple[Split, ...] = ("train", "validation", "test")
    drawn = [
        set().union(*(combinations(sample_scene(split, 0, i)) for i in range(300)))
        for split in splits
    ]
    for number, some in enumerate(drawn):
        assert all(some.isdisjoint(other) for other in drawn[number + 1 :])


def test_the_same_index_draws_other_scenes_in_another_split_or_seed() -> None:
    scenes = [sample_scene(s, k, 7) for s in ("train", "calibration") for k in (0, 1)]
    assert len({(s.colour, s.texture_seed, s.placements) for s in scenes}) == 4


def test_a_picture_is_drawn_the_same_and_shows_its_object_where_it_stands() -> None:
    scene = sample_scene("train", 3, 5, objects=(1, 1))
    picture = draw(scene)
    assert picture.shape == (96, 96, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, draw(scene))
    bare = draw(Scene(scene.colour, scene.texture_seed, ()))
    rows, columns = np.nonzero((picture != bare).any(axis=-1))
    (placed,) = scene.placements
    top, left = (placed.cell // 3) * 32, (placed.cell % 3) * 32
    assert rows.min() >= top
    assert rows.max() < top + 32
    assert columns.min() >= left
    assert columns.max() < left + 32


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="train"):
        sample_scene("trian", 0, 0)  # type: ignore[arg-type]
