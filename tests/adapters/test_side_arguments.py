"""What a caller says beside the pixels cannot take a picture out of what is judged.

Nor can a second prompt, image tokens in other arguments, or arguments that no proof used.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from vqguard.adapters import build_guard, get_adapter, guard_model, register_adapter
from vqguard.adapters.families import registration
from vqguard.adapters.families.arguments import ARGUMENTS
from vqguard.adapters.families.llava import LlavaAdapter
from vqguard.adapters.proof.guarded_subject import NEW_TOKENS, REFUSAL, flag, guarded
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.proof.random_models.build import mapped_types
from vqguard.adapters.proof.random_models.conformance_table import proven_arguments
from vqguard.adapters.proof.side_arguments import suspects
from vqguard.adapters.registry import adapter_types, declared_family
from vqguard.adapters.runtime.known_arguments import AUDIO, FAMILIES, PIXELS, PROMPT, SIDES
from vqguard.errors import BypassError, SeamError

SEEN = sorted(
    kind for kind in set(adapter_types()) & set(mapped_types()) if not declared_family(kind).blind
)
FEW = ("granite_docling", "lfm2_vl", "llava", "mllama", "pix2struct")


def guarded_model(kind: str) -> Any:
    model = build_tiny(kind)
    return guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in FEW else pytest.mark.slow) for k in SEEN]
)
def test_changed_side_arguments_are_refused_or_judged(kind: str) -> None:
    model = build_tiny(kind)
    for modality in sorted({seam.modality for seam in get_adapter(model).seams(model)}):
        assert suspects(model, make_inputs(model, (1, 2), modality=modality)) == []


MARKS: dict[str, tuple[str, Any]] = {
    "mllama": ("aspect_ratio_ids", 0),
    "mllama tiles": ("aspect_ratio_mask", 0),
    "granite_docling": ("pixel_attention_mask", False),
    "lfm2_vl": ("pixel_attention_mask", 0),
    "gemma4": ("image_position_ids", -1),
    "gemma4_unified": ("image_position_ids", -1),
    "pix2struct": ("attention_mask", 0),
}


@pytest.mark.parametrize("case", MARKS)
@torch.no_grad()
def test_padding_marks_over_a_picture(case: str) -> None:
    kind, (name, padding) = case.split()[0], MARKS[case]
    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 2))
    pixels = get_adapter(model).seams(model)[0].pixels[0]
    if kind == "pix2struct":
        inputs[name] = torch.ones(inputs[pixels].shape[:2], dtype=torch.long)
    changed: Tensor = inputs[name].clone()
    changed[-1, -1] = padding
    with guarded(model, inputs, "projected"):
        model(**inputs)
        for run in (model, model.generate, model.screen):
            with pytest.raises(BypassError, match=rf"{name} marks .* that are not zero"):
                run(**{**inputs, name: changed})
        blank = inputs[pixels].clone()
        blank[-1, -1] = 0
        if kind == "mllama":
            model.screen(**{**inputs, name: changed, pixels: blank})


def test_a_mask_of_other_numbers() -> None:
    model = build_tiny("mllama")
    inputs = make_inputs(model, (1, 2))
    with guarded(model, inputs, "projected"):
        inputs["aspect_ratio_mask"] = -inputs["aspect_ratio_mask"]
        with pytest.raises(BypassError, match="zeros and ones"):
            model.screen(**inputs)


def test_a_mark_that_does_not_fit_the_pixels() -> None:
    model = build_tiny("lfm2_vl")
    inputs = make_inputs(model, (1, 2))
    with guarded(model, inputs, "projected"):
        inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"][:, :-1]
        with pytest.raises(BypassError, match="expected pixel_attention_mask to lie over"):
            model.screen(**inputs)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "mllama", "florence2"])
@torch.no_grad()
def test_a_second_prompt_does_not_move_flags_to_another_row(kind: str) -> None:
    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 1))
    other = inputs["input_ids"].flip(0)
    with guarded(model, inputs, "projected"):
        flag(model, {0})
        for run in (model, model.model):
            with pytest.raises(BypassError, match="inputs is not an argument"):
                run(**inputs, inputs=other)
        with pytest.raises(BypassError, match="inputs and input_ids name the same"):
            model.generate(**inputs, inputs=other)
        alone = {**inputs, "inputs": inputs["input_ids"]}
        del alone["input_ids"]
        answers = model.generate(**alone, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        assert (answers[:, -NEW_TOKENS:] == torch.tensor(REFUSAL)).all(-1).sum() == 1


@pytest.mark.parametrize("kind", ["chameleon", "emu3", "apertus1p5"])
@torch.no_grad()
def test_image_tokens_in_any_argument_that_holds_ids(kind: str) -> None:
    model = guarded_model(kind)
    typed_ids = get_adapter(model).user_typed_images(model)
    assert typed_ids is not None
    token = int(typed_ids[1])
    text = make_inputs(model, (0, 0))
    typed = text["input_ids"].clone()
    typed[:, -1] = token
    with pytest.raises(BypassError, match="inputs is not an argument"):
        model(input_ids=typed, inputs=text["input_ids"], use_cache=True)
    with pytest.raises(BypassError, match="inputs holds image tokens"):
        model.generate(typed, max_new_tokens=1)
    config = type(model.generation_config)(forced_bos_token_id=token)
    ways: dict[str, Any] = {
        "negative_prompt_ids": {"negative_prompt_ids": typed, "guidance_scale": 2.0},
        "decoder_input_ids": {"decoder_input_ids": typed.tolist()},
        "forced_bos_token_id": {"forced_bos_token_id": token},
        "forced_eos_token_id": {"forced_eos_token_id": [2, token]},
        "sequence_bias": {"sequence_bias": [[[3, token], 9.0]]},
        "forced_bos_token_id again": {"generation_config": config},
    }
    for way, call in ways.items():
        with pytest.raises(BypassError, match=f"{way.split()[0]} holds image tokens"):
            model.generate(**text, **call, max_new_tokens=1)
    kept_away = {"suppress_tokens": [token], "sequence_bias": {(token,): -9.0}}
    model.generate(**text, **kept_away, bad_words_ids=[[token]], max_new_tokens=1)


def test_an_encoder_called_by_itself_takes_no_vectors() -> None:
    model = guarded_model("udop")
    inputs = make_inputs(model, (1, 1))
    encoder = model.get_encoder()
    given = {name: inputs[name] for name in ("input_ids", "bbox", "attention_mask")}
    encoder(**given)
    for name in ("image_embeddings", "inputs_embeds", "position_bias"):
        with pytest.raises(BypassError, match=name):
            encoder(**given, **{name: torch.randn(2, 16, 32)})


@pytest.mark.parametrize("kind", ["florence2", "t5gemma2", "udop", "pix2struct", "pp_formulanet"])
def test_what_an_encoder_gave_goes_no_further(kind: str) -> None:
    """Vectors may pass a part that was called by itself; no entry of the model takes its output."""
    model = guarded_model(kind)
    inputs = make_inputs(model, (1, 1))
    states = torch.randn(2, 4, 32)
    names = {"encoder_outputs", "encoder_hidden_states"}
    for name in sorted(names & {*inspect.signature(model.forward).parameters, "encoder_outputs"}):
        for run in (model, model.generate):
            with pytest.raises(BypassError, match=name):
                run(**inputs, **{name: (states,)})


def with_way_in(model: Any, name: str = "clip_frames") -> Any:
    """`model` with a `forward` that has one more way in, as a newer transformers might give it."""
    original = type(model)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        frames = kwargs.pop(name, None)
        output = original.forward(self, *args, **kwargs)
        if frames is not None:
            output.logits = output.logits + frames.mean()
        return output

    names = inspect.signature(original.forward)
    *parts, rest = names.parameters.values()
    way = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    forward.__signature__ = names.replace(parameters=[*parts, way, rest])  # type: ignore[attr-defined]
    model.__class__ = type(original.__name__, (original,), {"forward": forward})
    return model


@pytest.mark.parametrize("known", [True, False], ids=["newer transformers", "on proof"])
def test_an_argument_that_no_proof_used(known: bool) -> None:
    model = with_way_in(build_tiny("llava"))
    inputs = make_inputs(model, (1, 2))
    guard = build_guard(model, patch_codes=8, semantic_codes=2)
    if known:
        guard_model(model, guard)
    else:
        model.config.model_type = "mystery"
        guard_model(model, guard, probe_inputs=inputs)
    model(**inputs)
    for frames in (torch.randn(1, 2, 3, 32, 32), [torch.randn(3, 32, 32).numpy()]):
        for run in (model, model.generate):
            with pytest.raises(BypassError, match=r"clip_frames .* no part of what this guard"):
                run(**inputs, clip_frames=frames)


@pytest.mark.parametrize(
    "name", ["input_features", "pixel_values_videos", "high_res_pixel_values", "visual_bbox"]
)
def test_an_argument_that_another_family_was_proven_with(name: str) -> None:
    model = with_way_in(build_tiny("llava"), name)
    inputs = make_inputs(model, (1, 2))
    guard_model(model, build_guard(model, patch_codes=8, semantic_codes=2))
    model(**inputs)
    for run in (model, model.generate):
        with pytest.raises(BypassError, match=rf"{name} .* no part of what this guard"):
            run(**inputs, **{name: torch.randn(3, 3, 32, 32)})


def test_a_family_of_somebody_elses_takes_no_audio_unasked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registration, "_FAMILIES", dict(registration.family_table()))
    monkeypatch.setattr(registration, "_ADAPTERS", dict(registration.adapter_table()))

    @register_adapter("mystery")
    class Mystery(LlavaAdapter):
        """A family that the package does not know."""

    model = with_way_in(build_tiny("llava"), "input_features")
    inputs = make_inputs(model, (1, 2))
    model.config.model_type = "mystery"
    guard_model(model, build_guard(model, patch_codes=8, semantic_codes=2))
    heard = {**inputs, "input_features": torch.randn(1, 8, 4)}
    with pytest.raises(BypassError, match="input_features"):
        model(**heard)
    Mystery.side_arguments = ("input_features",)
    model(**heard)


@pytest.mark.parametrize("kind", SEEN)
def test_each_family_has_its_own_list(kind: str) -> None:
    """Written from the conformance record; what its random inputs hold is in it."""
    sides = set(ARGUMENTS[kind])
    assert sides <= {*AUDIO, *FAMILIES, *PIXELS, *SIDES}
    if kind in FEW:
        model = build_tiny(kind)
        assert sides == set(proven_arguments(model)) or not newest()
        assert set(make_inputs(model, (1, 2))) <= sides | {*PROMPT}


def newest() -> bool:
    """Whether the installed transformers is the one that the record was made on."""
    record = Path(__file__).parents[2] / "docs" / "conformance.json"
    return bool(json.loads(record.read_text())["transformers"] == transformers.__version__)


def test_a_proof_that_uses_the_argument_finds_the_leak() -> None:
    model = with_way_in(build_tiny("llava"))
    inputs = {**make_inputs(model, (1, 2)), "clip_frames": torch.randn(1, 2, 3, 32, 32)}
    model.config.model_type = "mystery"
    guard = build_guard(model, patch_codes=8, semantic_codes=2)
    with pytest.raises(SeamError, match="leaks around the guard"):
        guard_model(model, guard, probe_inputs=inputs)


def test_a_proof_on_pictures_allows_no_videos() -> None:
    model = build_tiny("qwen2_vl")
    pictures = make_inputs(model, (1, 2))
    videos = make_inputs(model, (1, 1), modality="video")
    model.config.model_type = "mystery"
    guard = build_guard(model, patch_codes=8, semantic_codes=2)
    guard_model(model, guard, probe_inputs=pictures)
    model(**pictures)
    for run in (model, model.generate):
        with pytest.raises(BypassError, match="probe_inputs that hold it too"):
            run(**videos)
