"""Codes stand for pixels in training, bit for bit, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from vqguard.adapters import build_guard, encoder_features, guard_model, visual_features
from vqguard.adapters.codes import Form, VisualCodes
from vqguard.adapters.features import Site
from vqguard.adapters.proof.random_models import build_tiny
from vqguard.adapters.proof.random_models.build import mapped_types
from vqguard.adapters.proof.random_models.inputs import make_inputs as example_inputs
from vqguard.adapters.registry import adapter_types, declared_family, get_adapter
from vqguard.adapters.runtime.code_training import (
    require_same_logits,
    training_codes,
    units_of_rows,
    visual_codes,
)
from vqguard.errors import BypassError, ConfigError, InputError, SeamError
from vqguard.guard import recording
from vqguard.recipes.training.step import vision_at_rest

Make = Callable[..., Any]
PIXELS = ("pixel_values", "image_patches")
KNOWN: list[tuple[str, Site]] = [
    ("llava", "projected"),
    ("llava", "encoder"),
    ("llava_next", "projected"),  # constants between the codewords
    ("qwen3_vl", "projected"),  # deep-stack features
    ("qwen3_vl", "encoder"),
    ("instructblip", "projected"),  # a Q-Former, inside `forward`
    ("instructblip", "encoder"),
    ("mllama", "projected"),  # cross-attention
    ("idefics3", "projected"),
    ("molmo2", "projected"),  # pooled, and added to placeholders
]
WITHOUT = {
    ("granite4_vision", "projected"): "held in a list",
    ("granite_docling", "projected"): "needs more than codes",
    ("ovis2", "projected"): "needs more than codes",
    ("qwen2_5_vl", "encoder"): "sees something else",
}
"""Families that do not train from codes, by what is said."""


def guarded(kind: str, site: Site) -> Any:
    model = build_tiny(kind)
    guard = build_guard(model, site=site, patch_codes=32, semantic_codes=8)
    return guard_model(model, guard, refusal_ids=(5, 6))


def trained(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a step in training mode, and the gradients of the language model."""
    model.train()
    vision_at_rest(model, get_adapter(model))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    parameters = dict(get_adapter(model).stage2_trainable(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in parameters)
    model.zero_grad()
    loss = model(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    return loss.detach(), grads


@pytest.mark.parametrize(("kind", "site"), KNOWN)
def test_training_from_codes_is_training_from_pixels(kind: str, site: Site) -> None:
    model = guarded(kind, site)
    inputs = example_inputs(model, (1, 2))
    codes = visual_codes(model, **inputs)
    loss, grads = trained(model, inputs)
    rest = {name: value for name, value in inputs.items() if name not in PIXELS}
    tower = get_adapter(model).tower(model)
    kept = {id(p) for module in get_adapter(model).projectors(model) for p in module.parameters()}
    with torch.no_grad():  # the encoder's weights count for nothing
        for parameter in tower.parameters():
            if id(parameter) not in kept:
                parameter.fill_(float("nan"))
    with training_codes(model, codes):
        again, same = trained(model, rest)
    assert torch.equal(loss, again)
    assert grads.keys() == same.keys()
    assert all(torch.equal(grads[name], same[name]) for name in grads)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in mapped_types() if kind in adapter_types()])
def test_every_family_trains_from_codes_or_says_why_not(kind: str) -> None:
    family = declared_family(kind)
    if family.blind or family.refused:
        pytest.skip("not guarded")
    for site in get_adapter(build_tiny(kind)).sites:
        model = guarded(kind, site)
        if not any(seam.modality == "image" for seam in get_adapter(model).seams(model)):
            continue
        inputs = example_inputs(model, (1, 2))
        why = WITHOUT.get((kind, site), "codes" if site == "encoder" else None)
        said = None
        try:
            codes = visual_codes(model, **inputs)
            require_same_logits(model, codes, inputs, None)
        except SeamError as error:
            said = str(error)
        assert (said is None) if why is None else (why in (said or "codes")), f"{site}: {said}"
        assert said is not None or (kind, site) not in WITHOUT


def test_a_batch_of_codes_is_that_of_its_samples() -> None:
    for kind in ("llava_next", "qwen3_vl", "idefics3"):
        model = guarded(kind, "projected")
        inputs = example_inputs(model, (1, 2))
        codes = visual_codes(model, **inputs)
        rows = units_of_rows(model, codes, inputs)
        assert [len(row) for row in rows] == [1, 2]
        shapes = [
            {name: (len(row), *shape[1:]) for name, shape in codes.pixels.items()} for row in rows
        ]
        parts = codes.by_sample(rows, shapes)
        again = VisualCodes.joined(parts)
        assert again.form == codes.form
        assert again.deep_form == codes.deep_form
        for one, other in zip(again.tokens, codes.tokens, strict=True):
            assert torch.equal(one, other)
        # and in another order it is the other batch
        swapped = VisualCodes.joined(parts[::-1])
        assert [len(u) for u in swapped.tokens] == [len(codes.tokens[i]) for i in (1, 2, 0)]


def test_codes_are_those_of_the_verdict(make_guarded: Make, make_inputs: Make) -> None:
    model = make_guarded()
    inputs = make_inputs((1, 1))
    codes = visual_codes(model, **inputs)
    guard = model.vqguard
    features = visual_features(model, **inputs)
    assert torch.equal(torch.stack(codes.semantic), guard.encode_semantic(features.semantic))
    with recording(guard) as of_pixels, torch.no_grad():
        model(**inputs)
    guard.freeze()
    kept = guard.from_codes(codes.tokens, torch.stack(codes.semantic))
    for name in ("semantic_tokens", "semantic_codes", "flagged"):
        assert torch.equal(getattr(kept, name), getattr(of_pixels[0], name)), name
    assert torch.equal(torch.stack(list(kept.tokens)), torch.stack(list(of_pixels[0].tokens)))


def test_features_have_the_codes_of_their_pixels(make_guarded: Make, make_inputs: Make) -> None:
    for site in ("projected", "encoder"):
        model, inputs = make_guarded(site=site), make_inputs((1, 2))
        with torch.no_grad():
            features = visual_features(model, site="encoder", **inputs)
        kept, seen = visual_codes(model, features), visual_codes(model, **inputs)
        for one, other in zip(kept.tokens, seen.tokens, strict=True):
            assert torch.equal(one, other)
        rest = {name: value for name, value in inputs.items() if name not in PIXELS}
        require_same_logits(model, kept, rest, features)
        with encoder_features(model, features), training_codes(model, kept):
            model.vqguard.freeze()
            model.train()
            model(**rest)


# -- no way in at inference


def without_pixels(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in PIXELS}


@pytest.mark.parametrize("flag", [(), (0, 1, 2, 3, 4, 5)])
def test_codes_are_no_way_in_at_inference(
    make_guarded: Make, make_inputs: Make, flag: tuple[int, ...]
) -> None:
    model, inputs = make_guarded(flag=flag), make_inputs((1, 1))
    codes, rest = visual_codes(model, **inputs), without_pixels(inputs)
    for training in (True, False):
        model.train(training)
        with training_codes(model, codes):
            with pytest.raises(BypassError, match="generate inside of training_codes"):
                model.generate(**rest, max_new_tokens=2)
            with pytest.raises(BypassError, match="generate inside of training_codes"):
                model.generate(**inputs, max_new_tokens=2)
            with torch.no_grad(), pytest.raises(BypassError, match="and nowhere else"):
                model(**rest)
            with torch.no_grad(), pytest.raises(BypassError, match="and nowhere else"):
                model.get_image_features(inputs["pixel_values"])
            assert len(model.screen(**inputs)) == 2  # of the pixels: codes are not asked
            with pytest.raises(InputError):
                model.screen(**rest)
    model.eval()
    with training_codes(model, codes), pytest.raises(BypassError, match="and nowhere else"):
        model(**rest)
    for name in ("visual_codes", "codes", "vqguard_codes"):
        with pytest.raises((BypassError, TypeError, ValueError)):
            model.generate(**rest, **{name: codes}, max_new_tokens=2)


def test_an_inner_model_takes_no_codes_at_inference(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs((1, 1))
    codes = visual_codes(model, **inputs)
    model.eval()
    model.model.train()  # the inner module's mode says nothing of the whole
    with training_codes(model, codes), pytest.raises(BypassError, match="and nowhere else"):
        model.model(**without_pixels(inputs))


def test_a_cache_that_codes_filled_answers_nothing(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs((1, 1))
    codes, rest = visual_codes(model, **inputs), without_pixels(inputs)
    model.vqguard.freeze()
    model.train()
    with training_codes(model, codes):
        filled = model(**rest, use_cache=True).past_key_values
    model.eval()
    longer = torch.cat([rest["input_ids"], rest["input_ids"][:, -1:]], 1)
    with pytest.raises(BypassError, match="never judged"):
        model.generate(input_ids=longer, past_key_values=filled, max_new_tokens=2)


def test_pixels_beside_codes_are_refused(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs((1, 1))
    codes = visual_codes(model, **inputs)
    model.train()
    with training_codes(model, codes), pytest.raises(BypassError, match="pixel_values beside"):
        model(**inputs)


def test_codes_of_another_guard_are_refused(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs((1, 1))
    codes, rest = visual_codes(model, **inputs), without_pixels(inputs)
    model.train()
    with training_codes(model, codes), pytest.raises(ConfigError, match="freeze the guard"):
        model(**rest)
    model.vqguard.freeze()
    for wrong in (-1, 24):
        tokens = [unit.clone() for unit in codes.tokens]
        tokens[0][3] = wrong
        with (
            training_codes(model, replace(codes, tokens=tokens)),
            pytest.raises(InputError, match=r"codes in \[0, 24\)"),
        ):
            model(**rest)
    with pytest.raises(InputError, match="1 deep-stack levels, the guard has 0"):
        model.vqguard.from_codes(codes.tokens, torch.stack(codes.semantic), [codes.tokens])


def test_an_error_leaves_the_model_as_it_was(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs((1, 1))
    codes = visual_codes(model, **inputs)
    model.vqguard.freeze()
    model.train()
    with pytest.raises(RuntimeError, match="stop"), training_codes(model, codes):
        raise RuntimeError("stop")
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert torch.isfinite(loss)


def test_forms_that_cannot_be_put_together_are_refused() -> None:
    with pytest.raises(SeamError, match="not in tensors"):
        Form.of([(0, torch.zeros(2, 3))])
    with pytest.raises(SeamError, match="several shapes"):
        Form.joined([Form("tensor", ((1, 4, 8),)), Form("tensor", ((1, 6, 8),))])
    with pytest.raises(SeamError, match="cannot be told apart"):
        Form("tensor", ((3, 4, 8),)).parts([[4], [4]])
    flat = Form("tensor", ((10, 8),))
    assert flat.parts([[4], [2, 4]]) == [Form("tensor", ((4, 8),)), Form("tensor", ((6, 8),))]
    assert Form.joined(flat.parts([[4], [2, 4]])) == flat
