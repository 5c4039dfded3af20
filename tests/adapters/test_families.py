"""Decoding, rows and features of families beyond LLaVA."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vqguard.adapters import (
    build_guard,
    encoder_features,
    get_adapter,
    guard_model,
    visual_features,
)
from vqguard.adapters.proof.guarded_subject import NEW_TOKENS, REFUSAL, flag, guarded
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.errors import InputError, SeamError

KINDS = (
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen3_vl",
    "instructblip",
    "blip-2",
    "mllama",
    "git",
    "idefics3",
    "kosmos-2",
    "florence2",
    "vision-encoder-decoder",
)
STRATEGIES: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "all beams": {"num_beams": 2, "num_return_sequences": 2},
    "samples": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_row_refuses_under_every_strategy(kind: str, strategy: str) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 1))
    settings = STRATEGIES[strategy]
    expand = settings.get("num_return_sequences", 1)
    with guarded(model, inputs, "projected") as features:
        # A picture may be judged by several tokens: a flag on any one of them refuses its row.
        codes = [model.vqguard.semantic.encode(unit) for unit in features.semantic_units]
        flag(model, {int(codes[1][-1])})
        torch.manual_seed(0)
        output = model.generate(
            **inputs, **settings, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
        answers = output[:, -NEW_TOKENS:].tolist()
    assert len(answers) == 2 * expand
    refused = [answer == list(REFUSAL) for answer in answers]
    assert refused == [False] * expand + [True] * expand


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("images", [(2, 0, 1), (0, 3), (1, 1, 1)])
def test_rows_of_shuffled_and_padded_batches(
    kind: str, right: bool, images: tuple[int, ...]
) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, images, right=right)
    adapter = get_adapter(model)
    expected = [row for row, number in enumerate(images) for _ in range(number)]
    with guarded(model, inputs, "projected") as features:
        seam = adapter.seams(model)[0]
        link = model.__dict__["_vqguard_link"]
        arguments = adapter.seam_arguments(model, seam, inputs)
        counts = link.quantise(model, seam, arguments).counts
        assert adapter.rows(model, seam, inputs, counts) == expected
        assert len(model.screen(**inputs)) == len(features.semantic) == sum(images)


def test_images_and_videos_in_one_batch() -> None:
    model = build_tiny("qwen3_vl")
    images, videos = make_inputs(model, (1,)), make_inputs(model, (1,), modality="video")
    inputs = {**images, **{k: videos[k] for k in ("pixel_values_videos", "video_grid_thw")}}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[name] = torch.cat([images[name], videos[name]], dim=1)
    with guarded(model, inputs, "projected"):
        flag(model, set())
        model.generate(**inputs, max_new_tokens=2)
        assert len(model.last_verdicts) == 2
        flag(model, {int(model.last_verdicts[1].semantic_code)})
        answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS)
        assert answer[0, -NEW_TOKENS:].tolist() == list(REFUSAL)


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
def test_newlines_are_left_alone(kind: str) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, (1,))
    with guarded(model, inputs, "projected"), torch.no_grad():
        tokens = model.get_image_features(
            **{k: inputs[k] for k in ("pixel_values", "image_sizes")}
        ).pooler_output[0]
        newline = model.model.image_newline
        static = (tokens == newline).all(-1)
        codebook = model.vqguard.patch.codebook.weight
        known = (tokens[:, None] == codebook).all(-1).any(-1)
    assert 0 < int(static.sum()) < len(tokens)
    assert bool((static ^ known).all())


@pytest.mark.parametrize("kind", ["llava_next", "qwen2_vl", "blip-2"])
def test_cached_features_stand_in_only_where_a_tokens_way_is_its_own(kind: str) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, (1,))
    features = visual_features(model, "encoder", **inputs)
    guard_model(model, build_guard(model, site="encoder", patch_codes=4, semantic_codes=2))
    text = {k: v for k, v in inputs.items() if "pixel" not in k}
    with pytest.raises(SeamError, match="pass pixels"), encoder_features(model, features):
        model(**text, pixel_values=None)


def test_a_guard_without_the_levels_of_the_family_is_refused() -> None:
    model = build_tiny("qwen3_vl")
    guard = build_guard(model, patch_codes=4, semantic_codes=2, deepstack_levels=1)
    with pytest.raises(SeamError, match="adds features in 2 later layers"):
        guard_model(model, guard)


def test_an_image_over_two_rows_is_an_error() -> None:
    model = build_tiny("qwen2_vl")
    inputs = make_inputs(model, (1, 1))
    spoiled = inputs["input_ids"].clone()
    spoiled[1, -1] = 100
    with guarded(model, inputs, "projected"), pytest.raises(InputError, match="placeholders"):
        model.generate(**{**inputs, "input_ids": spoiled})
