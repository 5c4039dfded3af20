"""The named families in awkward batches: verdicts on the right rows, refusals where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vqguard.adapters import visual_features
from vqguard.adapters.features import Site
from vqguard.adapters.proof.guarded_subject import NEW_TOKENS, REFUSAL, flag, guarded
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.registry import declared_family
from vqguard.guard import recording

from .test_variants import SIGLIP

IMAGES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "llava_next_video",
    "video_llava",
    "vipllava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "instructblip",
    "blip-2",
)
VIDEOS = (
    "llava_onevision",
    "llava_next_video",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "instructblipvideo",
)
SITES: tuple[Site, ...] = ("projected", "encoder")
FEW = (
    ("llava_next", "image", "encoder"),
    ("video_llava", "video", "encoder"),
    ("instructblipvideo", "video", "projected"),
)
CASES = [
    pytest.param(
        kind,
        modality,
        site,
        marks=() if (kind, modality, site) in FEW else pytest.mark.slow,
        id=f"{kind}-{modality}-{site}",
    )
    for modality, kinds in (("image", IMAGES), ("video", VIDEOS))
    for kind in kinds
    for site in SITES
]
LAYOUTS = ((1, 0, 2), (0, 3), (2, 1), (1, 1, 1))
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 2, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
    "static cache": {"cache_implementation": "static", "do_sample": False},
}


@pytest.mark.parametrize(("kind", "modality", "site"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_layouts(kind: str, modality: str, site: Site) -> None:
    """Several pictures a row, rows without, padding on either side: the same pictures have the same
    codes, and each flag refuses the rows that show it.
    """
    model = build_tiny(kind)
    layouts = ((1, 1, 1),) if declared_family(kind).random_model.one_a_row else LAYOUTS
    known: list[list[int]] | None = None
    for images in layouts:
        owners = [row for row, number in enumerate(images) for _ in range(number)]
        for right in (False, True):
            inputs = make_inputs(model, images, modality=modality, right=right)
            with guarded(model, inputs, site) as features:
                # The guard is made of these features: the same for every layout.
                encode = model.vqguard.semantic.encode
                codes = [encode(unit).tolist() for unit in features.semantic_units]
                known = codes if known is None else known
                assert codes == known, images
                for code in sorted({code for some in codes for code in some}):
                    flag(model, {code})
                    expected = {owners[i] for i, some in enumerate(codes) if code in some}
                    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
                    answers = output[:, -NEW_TOKENS:].tolist()
                    refused = {r for r, one in enumerate(answers) if one == list(REFUSAL)}
                    assert refused == expected, (images, right, code)
                    flags = [verdict.flagged for verdict in model.last_verdicts]
                    assert flags == [code in some for some in codes]


@pytest.mark.parametrize(("kind", "modality", "site"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_strategies(kind: str, modality: str, site: Site) -> None:
    """One row of a mixed batch refuses however it is decoded."""
    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 1), modality=modality)
    with guarded(model, inputs, site):
        model.generate(**inputs, max_new_tokens=1)
        code = model.last_verdicts[1].semantic_code
        assert code != model.last_verdicts[0].semantic_code
        flag(model, {code})
        for name, settings in STRATEGIES.items():
            torch.manual_seed(0)
            output = model.generate(
                **inputs, **settings, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
            )
            answers = [one == list(REFUSAL) for one in output[:, -NEW_TOKENS:].tolist()]
            expand = settings.get("num_return_sequences", 1)
            assert answers == [False] * expand + [True] * expand, name


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "modality", "site"), CASES)
@pytest.mark.filterwarnings("ignore")
def test_prompt_lookup(kind: str, modality: str, site: Site) -> None:
    """Assisted decoding without an assistant answers as greedy decoding does, and refuses."""
    if declared_family(kind).random_model.one_a_row:
        pytest.skip("its language model is given vectors, in which no tokens can be looked up")
    model = build_tiny(kind)
    if model._is_stateful:
        pytest.skip("transformers does not take back tokens from a recurrent state")
    inputs = make_inputs(model, (1,), modality=modality)
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
    with guarded(model, inputs, site):
        expected = model.generate(**inputs, **settings)
        found = model.generate(**inputs, **settings, prompt_lookup_num_tokens=2)
        assert torch.equal(found, expected)
        flag(model, {verdict.semantic_code for verdict in model.last_verdicts})
        found = model.generate(**inputs, **settings, prompt_lookup_num_tokens=2)
        assert found[0, -NEW_TOKENS:].tolist() == list(REFUSAL)


@pytest.mark.parametrize("kind", ["video_llava", "instructblipvideo", "llava_next_video"])
@pytest.mark.parametrize("site", SITES)
def test_one_verdict_a_video_of_its_worst_frame(kind: str, site: Site) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 1), modality="video")
    name = "pixel_values" if kind == "instructblipvideo" else "pixel_values_videos"
    frames = inputs[name].shape[1]
    with guarded(model, inputs, site) as features:
        assert features.semantic.shape[:2] == (2, frames)
        codes = model.vqguard.semantic.encode(features.semantic).tolist()
        only = set(codes[1]) - set(codes[0])
        flag(model, {next(iter(only))})
        assert [verdict.flagged for verdict in model.screen(**inputs)] == [False, True]
        # The same frame as a still picture has the same code.
        still = {**inputs, name: inputs[name][:, :1].repeat(1, frames, *[1] * 3)}
        alone = model.vqguard.semantic.encode(visual_features(model, site, **still).semantic)
        assert alone.tolist() == [[one[0]] * frames for one in codes]


# Towers without a class token; two of the families have one in their usual make.
WITHOUT_CLS: dict[str, dict[str, Any]] = {
    **{
        kind: {}
        for kind in (
            "qwen2_vl",
            "qwen2_5_vl",
            "qwen3_vl",
            "qwen3_vl_moe",
            "qwen3_5",
            "llava_onevision",
        )
    },
    "llava_next_video": {"vision_config": SIGLIP, "vision_feature_select_strategy": "full"},
    "video_llava": {"vision_config": SIGLIP, "vision_feature_select_strategy": "full"},
}


# Families that the default adapter serves; they are guarded at one site. MiniMax M3 is not among
# them: its tower lets frames see each other, so that each changes with any other.
DEFAULT_VIDEOS = (
    "cosmos3_edge",
    "dots3_note",
    "exaone4_5",
    "gemma4",
    "gemma4_unified",
    "glm4v",
    "glm46v",
    "hy_v4_vl",
    "hyperclovax_vision_v2",
    "lfm3_vl",
    "molmo2",
    "muse_glimmer",
    "nemotron_h_omni",
    "qwen4_exp",
    "video_llama_3",
)
WITHOUT_CLS_AT: list[tuple[str, Site]] = [
    *((kind, site) for kind in WITHOUT_CLS for site in SITES),
    *((kind, "projected") for kind in DEFAULT_VIDEOS),
]


def halves_of_second(inputs: dict[str, Any], pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The pixels of the two frames of the second of two videos: whole frames, or patches."""
    if pixels.ndim == 5:
        frames = pixels.shape[1]
        second = pixels[1]
    elif "video_grid_thw" in inputs:
        frames = int(inputs["video_grid_thw"][1, 0])
        second = pixels[-int(inputs["video_grid_thw"][1].prod()) :]
    else:
        frames = len(pixels) // 2
        second = pixels[frames:]
    assert frames == 2
    return second.chunk(2)


@pytest.mark.parametrize(("kind", "site"), WITHOUT_CLS_AT)
def test_a_frame_cannot_hide_among_others(kind: str, site: Site) -> None:
    """Of towers without a class token, each frame's mean is judged, not one mean of a video."""
    model = build_tiny(kind, **WITHOUT_CLS.get(kind, {}))
    inputs = make_inputs(model, (1, 1), modality="video")
    changed = inputs["pixel_values_videos"].clone()
    first, last = halves_of_second(inputs, changed)
    frames = 2
    last.copy_(3 * last.flip(0, -1) + 1)
    other = {**inputs, "pixel_values_videos": changed}
    with guarded(model, other, site) as features:
        before = visual_features(model, site, **inputs).semantic
        assert features.semantic.shape[:2] == (2, frames)
        torch.testing.assert_close(features.semantic[0], before[0])
        torch.testing.assert_close(features.semantic[1, 0], before[1, 0])
        assert not torch.allclose(features.semantic[1, 1], before[1, 1], rtol=1e-3, atol=1e-4)

        codes = model.vqguard.semantic.encode(features.semantic).tolist()
        only = codes[1][1]
        assert only not in {*codes[0], codes[1][0]}
        flag(model, {only})
        assert [verdict.flagged for verdict in model.screen(**other)] == [False, True]
        last.copy_(first)
        assert [verdict.flagged for verdict in model.screen(**other)] == [False, False]


def test_every_tile_of_a_mllama_picture_is_judged() -> None:
    """Its tiles are parts of one picture, and none of them shows the whole."""
    model = build_tiny("mllama")
    inputs = make_inputs(model, (1, 1))
    # The first picture is one tile, beside one of two.
    inputs["aspect_ratio_ids"][0] = 1
    inputs["aspect_ratio_mask"][0, 0, 1:] = 0
    inputs["cross_attention_mask"][0, ..., 1:] = 0
    inputs["pixel_values"][0, 0, 1:] = 0
    real, row = inputs["aspect_ratio_mask"][:, 0].sum(-1).tolist(), 1
    assert real == [1, 2]
    changed = inputs["pixel_values"].clone()
    last = changed[row, 0, real[row] - 1]
    last.copy_(3 * last.flip(-1) + 1)
    other = {**inputs, "pixel_values": changed}
    with guarded(model, other, "projected") as features:
        assert features.semantic.shape[1] == max(real)
        assert features.semantic_mask is not None
        assert features.semantic_mask.sum(1).tolist() == real
        codes = [model.vqguard.semantic.encode(unit).tolist() for unit in features.semantic_units]
        assert [len(tiles) for tiles in codes] == real
        only = codes[row][real[row] - 1]
        assert only not in {*codes[1 - row], *codes[row][: real[row] - 1]}
        flag(model, {only})
        verdicts = model.screen(**other)
        assert [one.flagged for one in verdicts] == [index == row for index in (0, 1)]
        # No tile is judged twice to fill up the batch, which a rule that counts would notice.
        assert [list(one.codes) for one in verdicts] == codes
        with recording(model.vqguard) as outputs:
            model(**other)
        mask = outputs[0].semantic_mask
        assert mask is not None
        assert torch.equal(mask, features.semantic_mask)
        model.generate(**other, do_sample=False, max_new_tokens=1)
        assert model.last_verdicts == verdicts


def test_every_frame_of_a_git_video_is_judged() -> None:
    """Its frames come in the argument of pictures, as one dimension more."""
    model = build_tiny("git", num_image_with_embedding=2)
    inputs = make_inputs(model, (1, 1))
    pixels = torch.stack([inputs["pixel_values"], inputs["pixel_values"].flip(0)], dim=1)
    changed = pixels.clone()
    changed[1, 1] = 3 * changed[1, 1].flip(-1) + 1
    other = {**inputs, "pixel_values": changed}
    with guarded(model, other, "projected") as features:
        assert features.semantic.shape[:2] == (2, 2)
        still = {**inputs, "pixel_values": pixels}
        before = visual_features(model, "projected", **still).semantic
        torch.testing.assert_close(before[1, 0], features.semantic[1, 0])
        codes = model.vqguard.semantic.encode(features.semantic).tolist()
        only = codes[1][1]
        assert only not in {*codes[0], codes[1][0]}
        flag(model, {only})
        assert [one.flagged for one in model.screen(**other)] == [False, True]


@pytest.mark.parametrize(
    ("kind", "slices"), [("ernie4_5_vl_moe", 2), ("kimi_k25", 1)], ids=("merged", "pooled")
)
def test_slices_that_a_family_makes_one_are_judged_as_one(kind: str, slices: int) -> None:
    """Ernie joins two neighbouring slices, Kimi takes the mean over all of them."""
    model = build_tiny(kind)
    inputs = make_inputs(model, (1,), modality="video")
    grid = inputs["video_grid_thw"]
    longer = {
        **inputs,
        "video_grid_thw": grid * torch.tensor([2, 1, 1]),
        "pixel_values_videos": inputs["pixel_values_videos"].repeat(
            2, *[1] * (inputs["pixel_values_videos"].ndim - 1)
        ),
    }
    semantic = visual_features(model, "projected", **longer).semantic
    assert semantic.shape[:2] == (1, slices)
