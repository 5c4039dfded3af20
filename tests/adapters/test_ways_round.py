"""Each way of handing a model visual vectors, tried on every family that has it: the leak without
the guard, the refusal with it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from vqguard.adapters import build_guard, get_adapter, guard_model
from vqguard.adapters.proof.guarded_subject import guarded
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.proof.random_models.build import mapped_types
from vqguard.adapters.registry import adapter_types, declared_family
from vqguard.adapters.seams import original_method, submodule
from vqguard.errors import BypassError, NonFiniteError

SEEN = sorted(
    kind for kind in set(adapter_types()) & set(mapped_types()) if not declared_family(kind).blind
)
NAMED = ("blip-2", "instructblip", "llava_next", "qwen2_5_vl", "qwen3_vl", "video_llava")
OTHERS = ("gemma4", "florence2", "mllama", "nemotron_h_omni", "qwen3_5", "vision-encoder-decoder")

WITH_PIXELS = ("blip-2", "instructblip", "instructblipvideo", "idefics", "kosmos-2")
"""Families that run only where they are shown a picture: they get one, always the same."""

Smuggle = Callable[[Any, dict[str, Any], int], dict[str, Any]]
"""(unguarded model, inputs, seed) -> a call that shows the picture of that seed, without pixels."""


NOT_TAKEN = {("gemma4", "inputs_embeds"), ("pp_formulanet", "inputs_embeds")}
NOT_TAKEN |= {("florence2", "decoder_inputs_embeds")}
"""What a family names and refuses by itself."""


def every(*few: str) -> list[Any]:
    """All families; those that are not among the few are slow."""
    return [pytest.param(k, marks=() if k in few else pytest.mark.slow) for k in SEEN]


def words(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without pixels; None for those that the family cannot do without naming."""
    names = {name for seam in get_adapter(model).seams(model) for name in seam.pixels}
    parameters = inspect.signature(model.forward).parameters
    empty = {n: None for n in names if n in parameters and parameters[n].default is inspect._empty}
    return {**{name: value for name, value in inputs.items() if name not in names}, **empty}


def inputs_embeds(model: Any, inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """A picture in the middle of the prompt's own vectors."""
    generator = torch.Generator().manual_seed(seed)
    with_pixels = model.config.model_type in WITH_PIXELS
    text = dict(inputs) if with_pixels else words(model, inputs)
    vectors = model.get_input_embeddings()(text.pop("input_ids")).detach().clone()
    vectors[:, -3:-1] = torch.randn(2, vectors.shape[-1], generator=generator)
    if with_pixels:
        text["input_ids"] = None
    return {**text, "inputs_embeds": vectors}


def decoder_inputs_embeds(model: Any, inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """The same in the decoder's input."""
    generator = torch.Generator().manual_seed(seed)
    kept = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    return {**kept, "decoder_inputs_embeds": torch.randn(2, 3, 32, generator=generator)}


def mm_encoder_outputs(model: Any, inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """The model's own features of a picture."""
    adapter = get_adapter(model)
    seam = adapter.seams(model)[0]
    shown = make_inputs(model, (1, 2), seed, modality=seam.modality)
    arguments = adapter.seam_arguments(model, seam, shown)
    owner = submodule(model, seam.path, "seam") if not seam.inner else model
    output = original_method(owner, f"get_{seam.modality}_features")(**arguments)
    return {**words(model, inputs), "mm_encoder_outputs": {seam.modality: output}}


def cache(model: Any, inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """A cache that holds a picture, and one more token a row."""
    modality = get_adapter(model).seams(model)[0].modality
    shown = make_inputs(model, (1, 2), seed, modality=modality)
    given = None
    if model.config.model_type == "granite4_vision":  # does not give back one that it made
        given = DynamicCache(config=model.config.get_text_config())
    output = model(**shown, use_cache=True, cache=given)
    filled = given if given is not None else output.past_key_values
    ids = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    # A family that reads its pictures elsewhere wants one: always the same.
    shows = model.config.is_encoder_decoder or model.config.model_type in WITH_PIXELS
    beside = {k: v for k, v in inputs.items() if k != ids} if shows else {}
    if shows and ids == "input_ids":
        beside = {k: v for k, v in beside.items() if k == "pixel_values"}
    if "image_attention_mask" in inputs:
        beside["image_attention_mask"] = inputs["image_attention_mask"][:, -1:]
    return {**beside, ids: torch.full((2, 1), 9), "cache": filled}


WAYS: dict[str, Smuggle] = {
    "inputs_embeds": inputs_embeds,
    "decoder_inputs_embeds": decoder_inputs_embeds,
    "mm_encoder_outputs": mm_encoder_outputs,
    "cache": cache,
}


def first_inputs(model: Any, images: tuple[int, ...] = (1, 2)) -> dict[str, Any]:
    return make_inputs(model, images, modality=get_adapter(model).seams(model)[0].modality)


@pytest.mark.parametrize("kind", every(*NAMED, *OTHERS))
@torch.no_grad()
def test_ways_round_leak_without_the_guard_and_are_refused_with_it(kind: str) -> None:
    model = build_tiny(kind)
    inputs = first_inputs(model)
    names = inspect.signature(model.forward).parameters
    ways = [way for way in WAYS if way in names and (kind, way) not in NOT_TAKEN]
    calls = {way: [WAYS[way](model, inputs, seed) for seed in (1, 2)] for way in ways}
    for way, (one, other) in calls.items():
        kept = copy.deepcopy(one) if way == "cache" else one
        assert not torch.equal(model(**one).logits, model(**other).logits), way
        calls[way][0] = kept
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    owner = get_adapter(model).owner(model)
    taken = inspect.signature(owner.forward).parameters
    for way, (call, _) in calls.items():
        entries: list[Callable[..., Any]] = [model, model.generate]
        if "_vqguard_link" in owner.__dict__ and way in taken and set(call) <= set(taken):
            entries.append(owner)
        told = "did not put there" if way == "cache" else way
        for run in entries:
            with pytest.raises(BypassError, match=told):
                run(**call)


def poisoned(value: Any, bad: float) -> Any:
    """Pixels with one value in the middle of the first picture that is no number."""
    if isinstance(value, (list, tuple)):
        return type(value)([poisoned(value[0], bad), *value[1:]])
    spoiled: Tensor = value.clone()
    flat = spoiled.view(-1)
    places = (flat != 0).nonzero().flatten()
    flat[places[len(places) // (4 * len(value))]] = bad
    return spoiled


@pytest.mark.parametrize("kind", every("emu3", "llava_next", "mllama", "pix2struct", "qwen3_vl"))
@torch.no_grad()
def test_pixels_that_are_no_numbers_are_an_error(kind: str) -> None:
    model = build_tiny(kind)
    inputs = first_inputs(model, (1, 1))
    seam = get_adapter(model).seams(model)[0]
    name = next(name for name in seam.pixels if inputs.get(name) is not None)
    with guarded(model, inputs, "projected"):
        for bad in (float("nan"), float("inf")):
            spoiled = {**inputs, name: poisoned(inputs[name], bad)}
            for run in (model, model.generate, model.screen):
                with pytest.raises(NonFiniteError):
                    run(**spoiled)


@pytest.mark.parametrize(
    "name",
    [
        "past_key_values",
        *(
            pytest.param(
                name, marks=pytest.mark.transformers_from("5.24", why="the names of caches")
            )
            for name in ("cache", "cache_params")
        ),
    ],
)
@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "florence2"])
@torch.no_grad()
def test_a_cache_by_each_of_its_names(kind: str, name: str) -> None:
    """transformers renames them in `generate`, after the guard has looked."""
    model = build_tiny(kind)
    inputs = first_inputs(model)
    calls = [cache(model, inputs, seed) for seed in (1, 2)]
    fillings = [call.pop("cache") for call in calls]
    own = model.generate(**inputs, max_new_tokens=2, return_dict_in_generate=True).past_key_values
    settings: dict[str, Any] = {
        "max_new_tokens": 1,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    ids = "decoder_input_ids" if kind == "florence2" else "input_ids"
    longer = torch.full((2, inputs[ids].shape[1] + 1), 9)
    moved = [
        model.generate(**{**call, ids: longer}, **{name: copy.deepcopy(one)}, **settings).logits[0]
        for call, one in zip(calls, fillings, strict=True)
    ]
    assert not torch.equal(*moved)
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    for call in (calls[0], {**calls[0], ids: longer}):
        with pytest.raises(BypassError, match="did not put there"):
            model.generate(**call, **{name: fillings[0]})
        with pytest.raises(BypassError, match=r"name the same argument|did not put there"):
            model(**call, **{"past_key_values": own, name: fillings[0]})
        with pytest.raises(BypassError, match="name the same argument"):
            model.generate(**call, cache=own, past_key_values=fillings[0])
        with pytest.raises(BypassError, match="state is not an argument"):
            model.generate(**call, state=fillings[0])


@pytest.mark.transformers_from("5.24", why="Idefics' resampler runs")
@torch.no_grad()
def test_states_of_a_resampler() -> None:
    model = build_tiny("idefics", use_resampler=True)
    inputs = first_inputs(model, (1, 1))
    text = words(model, inputs)
    width = model.config.vision_config.embed_dim
    states = [torch.randn(2, 4, width, generator=torch.Generator().manual_seed(s)) for s in (1, 2)]
    one, other = (model(**text, perceiver_embeddings=state).logits for state in states)
    assert not torch.equal(one, other)
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    for run in (model, model.model, model.generate):
        with pytest.raises(BypassError, match="perceiver_embeddings"):
            run(**text, perceiver_embeddings=states[0])
