"""Verdicts by majority over noisy copies, in whole models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from vqguard.adapters import build_guard, guard_model, unguard_model, visual_features
from vqguard.adapters.proof.random_models.build import build_tiny
from vqguard.adapters.proof.random_models.inputs import make_inputs
from vqguard.adapters.runtime.smoothing import noisy_copies
from vqguard.config import SmoothingSettings
from vqguard.errors import ConfigError
from vqguard.guard import VQGuard
from vqguard.safety_map import SafetyMap

REFUSAL = (7, 8, 9)
COPIES = SmoothingSettings(copies=3, noise=0.5)


def smoothed_model(kind: str, site: Any = "projected") -> tuple[Any, dict[str, Any]]:
    """A tiny model that judges three noisy copies by eight cells, every other one flagged."""
    model: Any = build_tiny(kind)
    inputs = make_inputs(model, (1, 1, 1), modality="image")
    guard = build_guard(
        model, site=site, patch_codes=8, semantic_codes=8, smoothing=COPIES, search="torch"
    ).eval()
    near = [visual_features(model, site, **copy) for copy in copies_of(model, inputs, 7)]
    semantic = torch.cat([torch.cat(features.semantic_units) for features in near])
    guard.semantic.codebook.start_from(semantic.detach(), "sample")
    counts = torch.tensor([[code % 2, (code + 1) % 2] for code in range(8)])
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))
    guard_model(model, guard, refusal_ids=REFUSAL)
    return model, inputs


def copies_of(model: Any, inputs: dict[str, Any], copies: int) -> list[dict[str, Any]]:
    return list(noisy_copies(["pixel_values"], inputs, replace(COPIES, copies=copies)))


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("llava", "projected"),
        ("llava", "encoder"),
        ("llava_next", "projected"),
        ("qwen2_vl", "projected"),
    ],
)
def test_most_copies_decide_in_screen_generate_and_in_every_batch(kind: str, site: Any) -> None:
    model, inputs = smoothed_model(kind, site)
    guard = model.vqguard
    votes = torch.zeros(3, dtype=torch.int64)
    for copy in copies_of(model, inputs, 3):
        seen = visual_features(model, **copy)
        judged = guard.judged(seen.semantic, seen.semantic_mask)
        votes += guard.safety_map.flagged(*judged)
    expected = (votes >= 2).tolist()
    verdicts = model.screen(**inputs)
    assert [verdict.flagged for verdict in verdicts] == expected
    output = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    assert [verdict.to_dict() for verdict in output.verdicts] == [v.to_dict() for v in verdicts]
    refused = [row == list(REFUSAL) for row in output.sequences[:, -3:].tolist()]
    assert refused == expected
    if kind == "llava":
        for row in range(3):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            assert model.screen(**alone)[0].flagged == expected[row]


def test_noise_follows_from_the_picture_and_leaves_padding() -> None:
    pixels = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    pixels[2] = pixels[0]
    pixels[:, :, 3] = 0.0
    first, second, third = (
        copy["pixel_values"]
        for copy in noisy_copies(["pixel_values"], {"pixel_values": pixels}, COPIES)
    )
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert (first[:, :, 3] == 0).all()
    assert 0.3 < float((first - pixels)[:, :, :3].std()) < 0.7
    alone = next(noisy_copies(["pixel_values"], {"pixel_values": pixels[1:2]}, COPIES))
    assert torch.equal(alone["pixel_values"][0], first[1])


def test_features_without_pixels_are_not_judged() -> None:
    model, inputs = smoothed_model("llava")
    guard: VQGuard = model.vqguard
    features = visual_features(model, **inputs)
    with pytest.raises(ConfigError, match="features have no pixels"):
        guard.judge(features.semantic)
    with pytest.raises(ConfigError, match="features have no pixels"):
        guard(features.tokens, features.semantic)
    unguard_model(model)
