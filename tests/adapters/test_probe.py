"""The probe passes the real model and catches leaks put there on purpose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaModel

from vqguard.adapters import one_codeword_probe
from vqguard.errors import InputError

Make = Callable[..., Any]
_Model: Any = LlavaModel
_Outer: Any = LlavaForConditionalGeneration


class LeaksInForward(_Model):  # type: ignore[misc]
    """Adds the image's mean to every text embedding, after the features were quantised."""

    def forward(self, input_ids: Any = None, pixel_values: Any = None, **kwargs: Any) -> Any:
        if pixel_values is not None:
            self.shift = pixel_values.mean()
        handle = self.language_model.register_forward_pre_hook(
            lambda _, args, kw: (args, {**kw, "inputs_embeds": kw["inputs_embeds"] + self.shift}),
            with_kwargs=True,
        )
        try:
            return super().forward(input_ids=input_ids, pixel_values=pixel_values, **kwargs)
        finally:
            handle.remove()


class LeaksInGenerate(_Outer):  # type: ignore[misc]
    """Lets the pixels choose a logit, in generate only."""

    def generate(self, *args: Any, pixel_values: Any = None, **kwargs: Any) -> Any:
        self.shift = pixel_values.abs().sum() * 10
        try:
            return super().generate(*args, pixel_values=pixel_values, **kwargs)
        finally:
            del self.shift

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs["input_ids"][:, -1] = int(self.shift) % 50
        return inputs


@pytest.mark.parametrize("site", [None, "projected", "encoder"])
def test_llava_passes(
    make_llava: Make, make_guarded: Make, make_inputs: Make, site: str | None
) -> None:
    model, inputs = make_llava(), make_inputs((1, 2))
    if site is not None:
        make_guarded(model=model, site=site)
    before = model(**inputs).logits
    kept = getattr(model, "vqguard", None)
    result = one_codeword_probe(model, inputs)
    assert (result.forward_delta, result.generate_same) == (0.0, True)
    assert result.control_delta > 0
    assert result.passed
    assert getattr(model, "vqguard", None) is kept
    assert torch.equal(model(**inputs).logits, before)


def test_leak_in_forward_is_caught(make_llava: Make, make_inputs: Make) -> None:
    model = make_llava()
    model.model.__class__ = LeaksInForward
    result = one_codeword_probe(model, make_inputs())
    assert result.forward_delta > 0
    assert not result.passed
    assert type(model.model) is LeaksInForward


def test_leak_in_generate_is_caught(make_llava: Make, make_inputs: Make) -> None:
    model = make_llava()
    model.__class__ = LeaksInGenerate
    result = one_codeword_probe(model, make_inputs())
    assert result.forward_delta == 0
    assert not result.generate_same
    assert not result.passed


def test_inputs_that_show_nothing_prove_nothing(make_llava: Make, make_inputs: Make) -> None:
    model = make_llava()
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.zero_()
    result = one_codeword_probe(model, make_inputs())
    assert result.control_delta == 0
    assert not result.passed
    with pytest.raises(InputError, match="pixel_values"):
        one_codeword_probe(model, make_inputs((0,)))
