"""Each argument that carries visual vectors: the leak without the guard, the refusal with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.adapters import build_guard, guard_model
from vqguard.adapters.proof.guarded_subject import NEW_TOKENS, REFUSAL, flag, guarded
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.errors import BypassError

Smuggle = Callable[[Any, dict[str, Any], Tensor], dict[str, Any]]


def only(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: inputs[name] for name in names if name in inputs}


def states(model: Any, inputs: dict[str, Any], noise: Tensor) -> dict[str, Any]:
    text = only(inputs, "input_ids", "attention_mask", "cross_attention_mask")
    return {**text, "cross_attention_states": noise.expand(8, 17, 32)}


def perceived(model: Any, inputs: dict[str, Any], noise: Tensor) -> dict[str, Any]:
    text = only(inputs, "input_ids", "attention_mask", "image_attention_mask")
    return {**text, "image_encoder_embeddings": noise.expand(4, 17, 32)}


def embeds(model: Any, inputs: dict[str, Any], noise: Tensor) -> dict[str, Any]:
    text = only(inputs, "input_ids", "attention_mask", "image_embeds_position_mask")
    return {**text, "image_embeds": noise.expand(2, 4, 32)}


def encoded(model: Any, inputs: dict[str, Any], noise: Tensor) -> dict[str, Any]:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output: Any = BaseModelOutputWithPooling
    text = only(inputs, "decoder_input_ids")
    filled = noise.expand(2, 5, 32)
    found = output(last_hidden_state=filled, pooler_output=filled)
    found.attention_mask = torch.ones(2, 5)  # UDOP's encoder gives it with its states
    return {**text, "encoder_outputs": found}


def pooled(model: Any, inputs: dict[str, Any], noise: Tensor) -> dict[str, Any]:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    output: Any = BaseModelOutputWithPooling
    features = model.get_image_features(
        pixel_values=inputs["pixel_values"], image_grid_thw=inputs["image_grid_thw"]
    ).pooler_output
    other = [one + noise for one in features]
    text = only(inputs, "input_ids", "attention_mask", "mm_token_type_ids", "image_grid_thw")
    return {**text, "mm_encoder_outputs": {"image": output(pooler_output=other)}}


def embedded(model: Any, inputs: dict[str, Any], noise: Tensor) -> dict[str, Any]:
    vectors = model.get_input_embeddings()(inputs["input_ids"]).detach()
    vectors[:, 1:4] = noise
    return {"inputs_embeds": vectors, **only(inputs, "attention_mask")}


CASES: dict[str, tuple[str, Smuggle]] = {
    "cross_attention_states": ("mllama", states),
    "image_encoder_embeddings": ("idefics", perceived),
    "image_embeds": ("kosmos-2", embeds),
    "image_embeds 2.5": ("kosmos-2.5", embeds),
    "encoder_outputs": ("pix2struct", encoded),
    "encoder_outputs florence": ("florence2", encoded),
    "encoder_outputs udop": ("udop", encoded),
    "encoder_outputs t5gemma": ("t5gemma2", encoded),
    "encoder_outputs formulanet": ("pp_formulanet", encoded),
    "encoder_outputs pair": ("vision-encoder-decoder", encoded),
    "mm_encoder_outputs": ("qwen2_vl", pooled),
    "inputs_embeds": ("gemma3", embedded),
}


YOUNG = pytest.mark.transformers_from("5.24", why="before, the argument shows the model nothing")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=YOUNG)
        if case in ("image_encoder_embeddings", "mm_encoder_outputs")
        else case
        for case in CASES
    ],
)
@torch.no_grad()
def test_the_argument_leaks_without_the_guard_and_is_refused_with_it(case: str) -> None:
    kind, smuggle = CASES[case]
    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 2))
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(32, generator=generator), torch.randn(32, generator=generator)
    calls = [smuggle(model, inputs, noise) for noise in (one, other)]
    assert not torch.equal(model(**calls[0]).logits, model(**calls[1]).logits)
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    for run in (model, model.generate):
        with pytest.raises(BypassError, match=case.split()[0]):
            run(**calls[0])


@pytest.mark.parametrize("kind", ["chameleon", "emu3", "apertus1p5"])
@torch.no_grad()
def test_image_tokens_that_a_user_types(kind: str) -> None:
    model = build_tiny(kind)
    text = make_inputs(model, (0, 0))
    tokens = torch.tensor([[50, 52, 55], [51, 53, 54]] if kind == "apertus1p5" else [[60, 61, 63]])
    typed = torch.cat([text["input_ids"], tokens.expand(2, -1)], 1)
    other = typed.clone()
    other[:, -2] += 1
    assert not torch.equal(model(input_ids=typed).logits, model(input_ids=other).logits)
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    model(input_ids=text["input_ids"])
    for run in (model, model.generate, model.model):
        with pytest.raises(BypassError, match="image tokens"):
            run(input_ids=typed)


@torch.no_grad()
def test_deep_stack_features_given_by_name() -> None:
    model = build_tiny("qwen3_vl")
    inputs = make_inputs(model, (1,))
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    places = inputs["input_ids"] == 100
    vectors = [torch.randn(int(places.sum()), 32)] * 2
    for run in (model, model.model, model.generate):
        with pytest.raises(BypassError, match="deepstack_visual_embeds"):
            run(**inputs, visual_pos_masks=places, deepstack_visual_embeds=vectors)


VECTOR = torch.zeros(2, 3)


@pytest.mark.parametrize("value", [VECTOR, [VECTOR], {"x": VECTOR}])
def test_vectors_under_unknown_names(value: Any) -> None:
    model = build_tiny("llava")
    inputs = make_inputs(model, (1,))
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    for run in (model, model.model, model.generate):
        with pytest.raises(BypassError, match="wherever is not an argument"):
            run(**inputs, wherever=value)


@YOUNG
@torch.no_grad()
def test_a_cache_filled_in_its_cross_attention_alone() -> None:
    """Its first layer is empty, so its length says nothing."""
    model = build_tiny("mllama")
    inputs = make_inputs(model, (1,))
    text = {k: inputs[k] for k in ("input_ids", "attention_mask", "cross_attention_mask")}

    def caches() -> list[Any]:
        from transformers import DynamicCache

        found = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            cache: Any = DynamicCache(config=model.config.get_text_config())
            cache.layers[1].update(torch.randn(1, 2, 34, 8), torch.randn(1, 2, 34, 8))
            found.append(cache)
        return found

    plain = [model(**text, cache=cache).logits for cache in caches()]
    assert not torch.equal(*plain)
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    with pytest.raises(BypassError, match="did not put there"):
        model(**text, cache=caches()[0])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("vision-encoder-decoder", "pixel_values"),
        ("pix2struct", "flattened_patches"),
        ("kosmos-2", "pixel_values"),
    ],
)
def test_pixels_without_a_name_are_judged(kind: str, name: str) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 1))
    with guarded(model, inputs, "projected"):
        flag(model, {0, 1})
        pixels = inputs.pop(name)
        answers = model.generate(pixels, **inputs, max_new_tokens=NEW_TOKENS)
        assert answers[:, -NEW_TOKENS:].tolist() == [list(REFUSAL)] * 2


def test_floats_without_a_name_are_no_pixels_elsewhere() -> None:
    model = build_tiny("llava")
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    with pytest.raises(BypassError, match="would take for embeddings"):
        model.generate(torch.randn(1, 4, 32), max_new_tokens=2)


def test_pixels_under_a_name_that_nobody_judged() -> None:
    """Whatever the name, what reaches the encoder in generate has been judged."""
    model = build_tiny("fuyu")
    inputs = make_inputs(model, (1,))
    original = type(model).prepare_inputs_for_generation

    class Renames(type(model)):  # type: ignore[misc]
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            prepared = original(self, *args, **kwargs)
            return {**prepared, "pixel_values": inputs["pixel_values"]}

    model.__class__ = Renames
    with guarded(model, inputs, "projected"):
        text = only(inputs, "input_ids", "attention_mask")
        with pytest.raises(BypassError, match="not judged"):
            model.generate(**text, max_new_tokens=2)
