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


def test_a_crop_is_a_window_of_the_picture_at_its_old_size() -> None:
    crops = SmoothingSettings(copies=3, noise=0.0, crop=0.25)
    row = torch.arange(1.0, 17.0)
    slopes = (row[:, None] + 100.0 * row).expand(2, 3, 16, 16).clone()
    slopes[1] += 7.0
    copies = [copy["p"] for copy in noisy_copies(["p"], {"p": slopes}, crops)]
    assert not torch.equal(copies[0], copies[1])
    for number, picture in enumerate(slopes):
        alone = noisy_copies(["p"], {"p": picture[None]}, crops)
        for copy, own in zip(copies, alone, strict=True):
            assert torch.equal(copy[number], own["p"][0])
            # a window of a plane is a plane, three quarters as steep
            down, across = copy[number, 0, 2:-2, 8].diff(), copy[number, 0, 8, 2:-2].diff()
            assert torch.allclose(down, torch.tensor(0.75), atol=1e-3)
            assert torch.allclose(across, torch.tensor(75.0), atol=1e-3)
            assert picture.min() <= copy[number].min() <= copy[number].max() <= picture.max()


def test_a_crop_carries_the_gradient_and_takes_noise_after_it() -> None:
    pixels = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    both = SmoothingSettings(copies=1, noise=0.5, crop=0.25)
    plain = next(noisy_copies(["p"], {"p": pixels}, replace(both, noise=0.0)))["p"]
    noisy = next(noisy_copies(["p"], {"p": pixels}, both))["p"]
    assert 0.3 < float((noisy - plain).std()) < 0.7
    noisy.sum().backward()
    gradient = pixels.grad
    assert gradient is not None
    assert float(gradient.sum()) == pytest.approx(3 * 64, rel=1e-4)  # weights of each pixel
    assert int((gradient[0, 0] == 0).sum()) == 64 - 36  # six of eight rows and columns are left


def test_rows_of_patches_cannot_be_cropped() -> None:
    crops = SmoothingSettings(copies=1, crop=0.1)
    with pytest.raises(ConfigError, match=r"smoothing\.crop needs pictures"):
        next(noisy_copies(["p"], {"p": torch.rand(4, 12)}, crops))


@pytest.mark.parametrize("wrong", [{"noise": 0.0}, {"crop": 1.0}, {"crop": -0.1}, {"noise": -1.0}])
def test_settings_that_change_nothing_or_everything_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected"):
        SmoothingSettings(copies=3, **wrong)


def test_features_without_pixels_are_not_judged() -> None:
    model, inputs = smoothed_model("llava")
    guard: VQGuard = model.vqguard
    features = visual_features(model, **inputs)
    with pytest.raises(ConfigError, match="features have no pixels"):
        guard.judge(features.semantic)
    with pytest.raises(ConfigError, match="features have no pixels"):
        guard(features.tokens, features.semantic)
    unguard_model(model)
