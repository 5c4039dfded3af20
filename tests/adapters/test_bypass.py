"""Every argument that could carry visual vectors around the guard is refused."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vqguard.adapters import unguard_model
from vqguard.errors import BypassError

Make = Callable[..., Any]
ALL = (0, 1, 2, 3, 4, 5)


def without_pixels(inputs: Any) -> Any:
    return {name: value for name, value in inputs.items() if name != "pixel_values"}


def continuous(inputs: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    output: Any = BaseModelOutputWithPooling
    return output(pooler_output=[torch.randn(16, 32, generator=generator)])


def moved_by(model: Any, inputs: Any, extra: Any) -> bool:
    """Whether the unguarded model's logits follow what `extra` carries: the leak itself."""
    with torch.no_grad():
        one = model(**inputs, **extra).logits
        other = model(**inputs).logits
    return not torch.equal(one, other)


@pytest.mark.parametrize("entry", ["generate", "forward", "owner"])
def test_mm_encoder_outputs(
    make_llava: Make, make_guarded: Make, make_inputs: Make, entry: str
) -> None:
    plain, inputs = make_llava(), without_pixels(make_inputs())
    known = "mm_encoder_outputs" in inspect.signature(plain.forward).parameters
    if known:
        assert moved_by(plain, inputs, {"mm_encoder_outputs": {"image": continuous(inputs)}})
    model = make_guarded(model=plain)
    run = {"generate": model.generate, "forward": model, "owner": model.model}[entry]
    with pytest.raises(BypassError, match="mm_encoder_outputs"):
        run(**inputs, mm_encoder_outputs={"image": continuous(inputs)})
    # Features that did come from the guard carry no global token to judge either.
    own = model.get_image_features(make_inputs()["pixel_values"])
    with pytest.raises(BypassError, match="mm_encoder_outputs"):
        run(**inputs, mm_encoder_outputs={"image": own})
    if known:
        text = without_pixels(make_inputs((0,)))
        run(**text, mm_encoder_outputs={"image": None})
        run(**text, mm_encoder_outputs={})


@pytest.mark.parametrize("entry", ["generate", "forward", "owner"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_inputs_embeds(
    make_llava: Make, make_guarded: Make, make_inputs: Make, entry: str, kind: str
) -> None:
    plain, inputs = make_llava(), make_inputs()
    embeds = plain.get_input_embeddings()(inputs["input_ids"]).detach()
    if kind == "image":
        places = inputs["input_ids"] == 60
        embeds[places] = plain.get_image_features(inputs["pixel_values"]).pooler_output[0].detach()
        with torch.no_grad():
            leaked = plain(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
            assert torch.allclose(leaked, plain(**inputs).logits, atol=1e-5)
    model = make_guarded(model=plain)
    run = {"generate": model.generate, "forward": model, "owner": model.model}[entry]
    with pytest.raises(BypassError, match="inputs_embeds"):
        run(inputs_embeds=embeds, attention_mask=inputs["attention_mask"])


def test_positional_arguments_are_refused_too(make_guarded: Make, make_inputs: Make) -> None:
    model = make_guarded()
    embeds = torch.randn(1, 4, 32)
    with pytest.raises(BypassError, match="inputs_embeds"):
        model.model(None, None, None, None, None, embeds)


@pytest.mark.parametrize("entry", ["generate", "forward"])
def test_cache_that_the_guard_did_not_fill(
    make_llava: Make, make_guarded: Make, make_inputs: Make, entry: str
) -> None:
    plain, inputs = make_llava(), make_inputs()
    with torch.no_grad():
        filled = plain(**inputs, past_key_values=DynamicCache()).past_key_values
    more = torch.cat([inputs["input_ids"], torch.tensor([[9, 10]])], 1)
    if entry == "generate":
        call = {"input_ids": more, "max_new_tokens": 2}
    else:
        call = {"input_ids": more[:, -2:]}
    plain_call = {**call, "past_key_values": copy.deepcopy(filled)}
    model = make_guarded(model=plain)
    run = model.generate if entry == "generate" else model
    with pytest.raises(BypassError, match="did not put there"):
        run(**call, past_key_values=filled)
    with pytest.raises(BypassError, match="did not put there"):
        run(**call, past_key_values=filled, pixel_values=inputs["pixel_values"])
    with pytest.raises(BypassError, match="transformers Cache"):
        run(**call, past_key_values=((torch.zeros(1), torch.zeros(1)),))
    unguard_model(model)
    run = model.generate if entry == "generate" else model
    run(**plain_call)  # what the guard refuses is what the plain model takes


def test_own_cache_goes_on(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs()
    first = model.generate(
        **inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    longer = torch.cat([first.sequences, torch.tensor([[9, 10]])], 1)
    expected = model.generate(
        input_ids=longer,
        pixel_values=inputs["pixel_values"],
        max_new_tokens=3,
        do_sample=False,
    )
    kept = copy.deepcopy(first.past_key_values)
    for cache in (first.past_key_values, kept):
        again = model.generate(
            input_ids=longer, past_key_values=cache, max_new_tokens=3, do_sample=False
        )
        assert torch.equal(again, expected)
    cache = DynamicCache()
    model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
    model(input_ids=torch.tensor([[9]]), past_key_values=cache)


def test_cache_filled_around_the_guard_afterwards(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs()
    cache = model(**inputs).past_key_values
    model.model.language_model(inputs_embeds=torch.randn(1, 4, 32), past_key_values=cache)
    with pytest.raises(BypassError, match="did not put there"):
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)


def test_flagged_image_in_a_cache_still_refuses(make_guarded: Make, make_inputs: Make) -> None:
    """`forward` refuses nobody; the cache that it filled remembers."""
    model, inputs = make_guarded(flag=ALL), make_inputs()
    cache = model(**inputs).past_key_values
    cache = model(input_ids=torch.tensor([[9]]), past_key_values=cache).past_key_values
    longer = torch.cat([inputs["input_ids"], torch.tensor([[9, 10]])], 1)
    answer = model.generate(input_ids=longer, past_key_values=cache, max_new_tokens=3)
    assert answer[0, -3:].tolist() == [50, 51, 52]


def test_cache_with_an_image_that_was_never_judged(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs()
    kept, model.vqguard.safety_map = model.vqguard.safety_map, None
    cache = model(**inputs).past_key_values
    model.vqguard.safety_map = kept
    longer = torch.cat([inputs["input_ids"], torch.tensor([[9]])], 1)
    with pytest.raises(BypassError, match="never judged"):
        model.generate(input_ids=longer, past_key_values=cache, max_new_tokens=2)


def test_a_copy_does_not_take_its_originals_cache(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs()
    cache = model(**inputs).past_key_values
    with pytest.raises(BypassError, match="did not put there"):
        copy.deepcopy(model)(input_ids=torch.tensor([[9]]), past_key_values=cache)


def test_decoding_loops_and_assistants(
    make_llava: Make, make_guarded: Make, make_inputs: Make
) -> None:
    model, inputs = make_guarded(), make_inputs()
    for custom in ("someone/loop", lambda *args, **kwargs: None):
        with pytest.raises(BypassError, match="custom_generate"):
            model.generate(**inputs, custom_generate=custom)
    with pytest.raises(BypassError, match="assistant_model"):
        model.generate(**inputs, assistant_model=make_llava())


def test_assisted_generation_with_prompt_lookup(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs()
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=2)
    assert torch.equal(found, expected)


def test_an_error_leaves_no_state_behind(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs()
    with pytest.raises(ValueError, match="nonsense"):
        model.generate(**inputs, nonsense=1)
    with pytest.raises(BypassError):
        model(**without_pixels(inputs), mm_encoder_outputs={"image": continuous(inputs)})
