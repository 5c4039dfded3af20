"""Where LLaVA's features and its global token are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from vqguard.adapters import VisualFeatures, encoder_features, get_adapter, visual_features
from vqguard.errors import BypassError, InputError, NonFiniteError, SeamError

Make = Callable[..., Any]


def even(features: VisualFeatures) -> torch.Tensor:
    assert isinstance(features.tokens, torch.Tensor)
    return features.tokens


@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, 1, [-3, -1]])
def test_features_are_the_models_own(
    make_llava: Make, make_inputs: Make, strategy: str, layer: Any
) -> None:
    model = make_llava(vision_feature_select_strategy=strategy, vision_feature_layer=layer)
    pixels = make_inputs((2,))["pixel_values"]
    adapter = get_adapter(model)
    expected = torch.stack(list(model.get_image_features(pixels).pooler_output))
    projected = visual_features(model, "projected", pixel_values=pixels)
    assert torch.equal(even(projected), expected)
    raw = visual_features(model, "encoder", pixel_values=pixels)
    projector = adapter.projector(model)
    assert torch.equal(projector(even(raw)), expected)
    # The global token: row 0 before the crop, whatever the crop is.
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    layers = [layer] if isinstance(layer, int) else layer
    row = torch.cat([hidden[index][:, :1] for index in layers], -1)
    assert torch.equal(raw.semantic, row)
    assert torch.equal(projected.semantic, projector(row))


def test_call_arguments_change_both_levels(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs()
    for site in ("projected", "encoder"):
        usual = visual_features(model, site, **inputs)
        deeper = visual_features(model, site, **inputs, vision_feature_layer=-1)
        full = visual_features(model, site, **inputs, vision_feature_select_strategy="full")
        assert not torch.equal(usual.semantic, deeper.semantic)
        assert not torch.equal(even(usual), even(deeper))
        assert torch.equal(usual.semantic, full.semantic)
        assert full.counts == [17]


@pytest.mark.parametrize(
    "option", [{"vision_feature_layer": -1}, {"vision_feature_select_strategy": "full"}]
)
def test_encoder_options_of_a_call_are_the_configs(
    make_guarded: Make, make_inputs: Make, option: dict[str, Any]
) -> None:
    """The map was calibrated on other features: a verdict on these would mean nothing."""
    model, inputs = make_guarded(), make_inputs()
    pixels = {"pixel_values": inputs["pixel_values"]}
    name = next(iter(option))
    usual = {name: getattr(model.config, name)}
    for run, given in (
        (model, inputs),
        (model.model, inputs),
        (model.generate, inputs),
        (model.screen, pixels),
        (model.get_image_features, pixels),
        (model.model.get_image_features, pixels),
    ):
        with pytest.raises(BypassError, match=f"expected {name}="):
            run(**given, **option)
        run(**given, **usual)


@pytest.mark.parametrize("site", ["projected", "encoder"])
def test_a_verdict_does_not_depend_on_the_batch(
    make_guarded: Make, make_inputs: Make, site: str
) -> None:
    model = make_guarded(flag=(0, 2, 4), site=site)
    pixels = make_inputs((6,))["pixel_values"]
    together = model.screen(pixel_values=pixels)
    alone = [model.screen(pixel_values=one[None])[0] for one in pixels]
    assert together == alone
    assert len({verdict.semantic_code for verdict in together}) > 1


def test_features_carry_gradients_and_ignore_other_inputs(
    make_guarded: Make, make_inputs: Make
) -> None:
    model, inputs = make_guarded(), make_inputs()
    inputs["pixel_values"].requires_grad_()
    features = visual_features(model, **inputs)
    torch.autograd.backward(even(features).sum() + features.semantic.sum())
    assert inputs["pixel_values"].grad.abs().sum() > 0


def test_features_need_pixels_and_a_known_site(make_llava: Make, make_inputs: Make) -> None:
    model = make_llava()
    with pytest.raises(InputError, match="pixel_values"):
        visual_features(model, input_ids=torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(SeamError, match="expected one of projected, encoder"):
        visual_features(model, "middle", **make_inputs())  # type: ignore[arg-type]


def test_non_finite_pixels_are_an_error(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs()
    inputs["pixel_values"][0, 0, 0, 0] = float("nan")
    for run in (model.generate, model):
        with pytest.raises(NonFiniteError):
            run(**inputs)
    with pytest.raises(NonFiniteError):
        model.screen(pixel_values=inputs["pixel_values"])


@pytest.mark.parametrize("site", ["projected", "encoder"])
def test_cached_encoder_features_stand_in_for_pixels(
    make_guarded: Make, make_inputs: Make, count_calls: Make, site: str
) -> None:
    model, inputs = make_guarded(site=site), make_inputs((1, 2))
    with torch.no_grad():
        expected = model(**inputs).logits
        cached = visual_features(model, "encoder", **inputs)
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    tower_runs = count_calls(model.model.vision_tower)
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad(), encoder_features(model, cached):
        assert torch.allclose(model(**text).logits, expected, atol=1e-5)
        assert torch.equal(model.generate(**text, max_new_tokens=3, do_sample=False), answer)
    assert not tower_runs
    ragged = VisualFeatures(list(cached.tokens), cached.semantic)
    with torch.no_grad(), encoder_features(model, ragged):
        assert torch.allclose(model(**text).logits, expected, atol=1e-5)


def test_caption_hidden_is_the_mean_state_of_the_caption(make_llava: Make) -> None:
    model = make_llava()
    adapter = get_adapter(model)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        expected = model.model.language_model(input_ids=ids).last_hidden_state.mean(1)
    assert torch.allclose(adapter.caption_hidden(model, ids), expected, atol=1e-5)
    pad = torch.full((2, 3), 1)
    zeros, ones = torch.zeros_like(pad), torch.ones_like(ids)
    right = adapter.caption_hidden(model, torch.cat([ids, pad], 1), torch.cat([ones, zeros], 1))
    left = adapter.caption_hidden(model, torch.cat([pad, ids], 1), torch.cat([zeros, ones], 1))
    assert torch.allclose(right, expected, atol=1e-5)
    assert torch.allclose(left, expected, atol=1e-5)
    with pytest.raises(InputError, match="rows \\[1\\]"):
        adapter.caption_hidden(model, ids, torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]]))


def test_images_of_unequal_size_and_a_tower_without_cls(
    make_llava: Make, make_guarded: Make
) -> None:
    text = make_llava().config.text_config
    vision = PixtralVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=60,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    plain: Any = LlavaForConditionalGeneration(config)
    plain.eval()
    inputs = {
        "input_ids": torch.tensor([[0] + [60] * 8 + [5], [0, 5] + [60] * 4 + [6, 7, 8, 9]]),
        "pixel_values": torch.randn(2, 3, 32, 16),
        "image_sizes": torch.tensor([[32, 16], [16, 16]]),
    }
    own = plain.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"])
    for site in ("projected", "encoder"):
        features = visual_features(plain, site, **inputs)
        assert features.counts == [8, 4]
        assert torch.allclose(features.semantic[1, 0], features.tokens[1].mean(0))
    features = visual_features(plain, "projected", **inputs)
    assert all(torch.equal(a, b) for a, b in zip(features.tokens, own.pooler_output, strict=True))
    model = make_guarded(model=plain, flag=(0, 1, 2, 3, 4, 5))
    answers = model.generate(**inputs, max_new_tokens=4)
    assert answers[:, -4:].tolist() == [[50, 51, 52, 53]] * 2
    assert model(**inputs).logits.isfinite().all()
