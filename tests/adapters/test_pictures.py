"""Each picture, tile and frame is judged by itself, whatever lies beside it and is called."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.adapters import get_adapter, visual_features
from vqguard.adapters.families.by_row import ByRowAdapter
from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.families.llava_next import TiledAdapter
from vqguard.adapters.families.local_views import LocalViewsAdapter
from vqguard.adapters.features import Shown
from vqguard.adapters.proof.conformance import check
from vqguard.adapters.proof.guarded_subject import NEW_TOKENS, REFUSAL, flag, guarded
from vqguard.adapters.proof.picture_checks import parts_of
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.errors import InputError, SeamError

BY_ROW = ("idefics2", "idefics3", "smolvlm", "granite_docling")
LOCAL = ("deepseek_ocr2", "unlimited_ocr", "step3p7")


def answers(model: Any, inputs: dict[str, Any], **settings: Any) -> list[list[int]]:
    """The new tokens of every row."""
    tokens: Tensor = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, **settings
    )
    return [row.tolist() for row in tokens[:, -NEW_TOKENS:]]


@pytest.mark.parametrize("kind", BY_ROW)
def test_a_flagged_picture_is_refused_beside_three_harmless_ones(kind: str) -> None:
    model = build_tiny(kind)
    alone, beside = make_inputs(model, (1,)), make_inputs(model, (4, 1))
    with guarded(model, beside, "projected"):
        own = model.screen(**alone)
        flag(model, set(own[0].codes))
        verdicts = model.screen(**beside)
        assert len(verdicts) == 5
        assert verdicts[0].codes == own[0].codes
        assert [verdict.flagged for verdict in verdicts] == [True, False, False, False, False]
        given = answers(model, beside, do_sample=False)
    assert [answer == list(REFUSAL) for answer in given] == [True, False]


@pytest.mark.parametrize("kind", BY_ROW)
@pytest.mark.parametrize("images", [(2, 1), (1, 0, 2)])
def test_beams_over_rows_of_several_pictures(kind: str, images: tuple[int, ...]) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, images)
    with guarded(model, inputs, "projected"):
        usual = answers(model, inputs, num_beams=2, do_sample=False)
        last = model.screen(**inputs)[-1]
        flag(model, set(last.codes))
        given = answers(model, inputs, num_beams=2, do_sample=False)
    assert given[:-1] == usual[:-1]
    assert given[-1] == list(REFUSAL)


@pytest.mark.parametrize("kind", ["idefics2", "idefics3", "smolvlm"])
def test_what_is_neither_a_picture_nor_padding_is_refused(kind: str) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, (2, 1))
    for pixels in (inputs["pixel_values"] * 1e-6, torch.zeros_like(inputs["pixel_values"])):
        with pytest.raises(InputError, match="expected"):
            visual_features(model, **{**inputs, "pixel_values": pixels})


@pytest.mark.parametrize("kind", ["llava_next", "llava_next_video"])
@pytest.mark.parametrize("site", ["projected", "encoder"])
def test_the_tile_that_the_small_view_does_not_show_is_judged(kind: str, site: Any) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 1))
    changed = dict(inputs, pixel_values=inputs["pixel_values"].clone())
    changed["pixel_values"][0, 2] += 4
    with guarded(model, changed, site):
        usual, moved = model.screen(**inputs)[0], model.screen(**changed)[0]
        new = set(moved.codes) - set(usual.codes)
        assert len(usual.codes) == 5
        assert [i for i in range(5) if usual.codes[i] != moved.codes[i]] == [2]
        flag(model, new)
        assert not model.screen(**inputs)[0].flagged
        assert [answer == list(REFUSAL) for answer in answers(model, changed)] == [True, False]


@pytest.mark.parametrize("kind", ["llava_onevision", "granite4_vision", "molmo2", *LOCAL])
def test_tiles_without_a_token_of_their_own_have_each_a_mean(kind: str) -> None:
    model = build_tiny(kind)
    features = visual_features(model, **make_inputs(model, (1, 1)))
    expected = {"llava_onevision": [5, 3], "granite4_vision": [5, 3], "molmo2": [3, 3]}
    assert [len(unit) for unit in features.semantic_units] == expected.get(kind, [1, 3])


@pytest.mark.parametrize("kind", LOCAL)
def test_tiles_whose_tokens_cannot_be_told_apart_are_refused(kind: str) -> None:
    adapter = get_adapter(build_tiny(kind))
    assert isinstance(adapter, LocalViewsAdapter)
    views = {
        "pixel_values": torch.zeros(1, 3, 64, 64),
        "pixel_values_local": torch.zeros(2, 3, 48, 48),
    }
    assert adapter.tokens_of_a_tile(torch.zeros(16 + 2 * 9, 4), 2, views) == 9
    with pytest.raises(SeamError, match="by area"):
        adapter.tokens_of_a_tile(torch.zeros(16 + 2 * 8, 4), 2, views)


@pytest.mark.parametrize(
    ("kind", "name", "other"),
    [
        ("video_llava", "pixel_values", "pixel_values_images"),
        ("fuyu", "pixel_values", "image_patches"),
    ],
)
def test_pixels_under_the_name_that_the_processor_gives_them(
    kind: str, name: str, other: str
) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 2))
    renamed = {other if key == name else key: value for key, value in inputs.items()}
    with guarded(model, inputs, "projected"):
        flag(model, set(model.screen(**inputs)[0].codes))
        assert model.screen(**renamed) == model.screen(**inputs)
        assert torch.equal(model(**renamed).logits, model(**inputs).logits)
        if kind == "video_llava":
            given = answers(model, renamed)
            assert given == answers(model, inputs)
            assert [answer == list(REFUSAL) for answer in given] == [True, False]


def result(model: Any, name: str) -> tuple[str, str]:
    """What one check of the kit says of a model with two pictures in a row."""
    found = check(model, make_inputs(model, (1, 2)), only=(name,)).results[0]
    return found.status, found.detail


def test_the_kit_finds_a_row_that_is_judged_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny("idefics3")
    assert result(model, "pictures") == ("passed", "")
    for name in ("split", "join"):
        monkeypatch.setattr(ByRowAdapter, name, getattr(DefaultAdapter, name))
    status, detail = result(model, "pictures")
    assert status == "failed"
    assert "its verdict depends on its neighbours" in detail


def test_the_kit_finds_tiles_that_no_verdict_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny("llava_next")
    assert result(model, "covered") == ("passed", "")
    each = TiledAdapter.by_unit

    def first(self: TiledAdapter, shown: Shown, rows: Tensor) -> list[Tensor]:
        return [tiles[:1] for tiles in each(self, shown, rows)]

    monkeypatch.setattr(TiledAdapter, "by_unit", first)
    for name in ("covered", "pictures"):
        assert result(model, name)[0] == "failed"
    assert "no verdict depends on it" in result(model, "covered")[1]


def test_the_kit_finds_a_name_that_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny("fuyu")
    assert result(model, "names") == ("passed", "")
    usual = type(get_adapter(model)).seams

    def one_name(self: Any, model: Any) -> Any:
        return tuple(replace(seam, pixels=("pixel_values",)) for seam in usual(self, model))

    monkeypatch.setattr(type(get_adapter(model)), "seams", one_name)
    assert result(model, "names")[0] == "failed"


def test_parts_are_pictures_tiles_and_frames() -> None:
    tiles = torch.ones(2, 3, 3, 8, 8)
    tiles[1, 2] = 0
    assert [part.place for part in parts_of("pixel_values", tiles, {})] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]
    grid = torch.tensor([[2, 2, 2], [1, 2, 4]])
    packed = parts_of("pixel_values_videos", torch.ones(16, 5), {"video_grid_thw": grid})
    assert [(part.place, part.start, part.stop) for part in packed] == [
        ((0, 0), 0, 4),
        ((0, 1), 4, 8),
        ((1, 0), 8, 16),
    ]
