"""Decoding loops and second models that the guard does not cover are refused."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vqguard.adapters import build_guard, guard_model
from vqguard.adapters.proof.guarded_subject import guarded
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.runtime.bypass import sees
from vqguard.errors import BypassError, SeamError


def pair(kind: str) -> tuple[Any, dict[str, Any]]:
    model = build_tiny(kind)
    return model, make_inputs(model, (1,))


def test_an_assistant_sees_the_picture_unquantised_and_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = pair("mllama")
    assistant = build_tiny("mllama", seed=1)
    seen: list[torch.Tensor] = []
    assistant.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    call = {**inputs, "assistant_model": assistant, "max_new_tokens": 3, "do_sample": False}
    with guarded(model, inputs, "projected"):
        with monkeypatch.context() as without:
            without.setattr(
                "vqguard.adapters.runtime.refusing_generate.refuse_generation",
                lambda *_, **__: None,
            )
            # transformers cannot check this family's drafts; by then the assistant has looked.
            with contextlib.suppress(RuntimeError):
                model.generate(**call)
        with torch.no_grad():
            shown = {
                k: inputs[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
            }
            states = assistant.model.vision_model(**shown).last_hidden_state
            raw = assistant.model.multi_modal_projector(states)
        assert torch.equal(seen[0], raw)
        with pytest.raises(BypassError, match="assistant_model takes images"):
            model.generate(**call)


@pytest.mark.parametrize("kind", ["llava", "gemma3", "mllama"])
def test_assistants_that_see_are_refused_whatever_they_declare(kind: str) -> None:
    """A guard of its own would not help: it is handed what the model's encoder gave."""
    model, inputs = pair(kind)
    assistant = build_tiny(kind, seed=1)
    with guarded(model, inputs, "projected"):
        for declared in (("text", "image"), ("text",), "text"):
            assistant.input_modalities = declared
            with pytest.raises(BypassError, match="assistant_model takes images"):
                model.generate(**inputs, assistant_model=assistant)
        match = pytest.raises(BypassError, match="assistant_model takes images")
        with guarded(assistant, inputs, "projected"), match:
            model.generate(**inputs, assistant_model=assistant)


def test_who_sees() -> None:
    config: Any = LlamaConfig
    text = LlamaForCausalLM(
        config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    assert not sees(text)
    for kind in ("llava", "pix2struct", "kosmos-2.5", "vision-encoder-decoder"):
        assert sees(build_tiny(kind))


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl"])
def test_continuous_batching_is_refused(kind: str) -> None:
    model, inputs = pair(kind)
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    with pytest.raises(BypassError, match="continuous batching"):
        model.generate_batch([[0, 5, 6]])
    with pytest.raises(BypassError, match="continuous batching"):
        model.init_continuous_batching()
    with pytest.raises(BypassError, match="paged"):
        model.generate(**inputs, cache_implementation="paged")


@pytest.mark.parametrize("kind", ["llava", "blip-2"])
def test_loops_from_elsewhere_are_refused(kind: str) -> None:
    model, inputs = pair(kind)
    patched = build_tiny(kind)
    patched.generate = functools.partial(patched.generate)
    with pytest.raises(SeamError, match="replaced on the instance"):
        guard_model(patched, build_guard(patched, patch_codes=4, semantic_codes=2))
    guard_model(model, build_guard(model, patch_codes=4, semantic_codes=2))
    with pytest.raises(BypassError, match="trust_remote_code"):
        model.generate(**inputs, penalty_alpha=0.6, top_k=4, trust_remote_code=True)
    with pytest.raises(BypassError, match="custom_generate"):
        model.generate(**inputs, custom_generate="owner/contrastive-search")


def test_pictures_do_not_ask_for_pictures() -> None:
    model, inputs = pair("janus")
    with guarded(model, inputs, "projected"), pytest.raises(BypassError, match="image tokens"):
        model.generate(**inputs, generation_mode="image")


def test_videos_that_are_not_judged_are_refused_in_generate() -> None:
    """PerceptionLM encodes its videos by the method of its images, without a name to judge by."""
    model, inputs = pair("perception_lm")
    ids = inputs["input_ids"]
    videos = {
        **inputs,
        "input_ids": torch.where(
            ids == model.config.image_token_id, model.config.video_token_id, ids
        ),
    }
    videos["pixel_values_videos"] = videos.pop("pixel_values")
    with torch.no_grad():
        other = {**videos, "pixel_values_videos": videos["pixel_values_videos"] + 1}
        assert not torch.equal(model(**videos).logits, model(**other).logits)
    with guarded(model, inputs, "projected"), pytest.raises(BypassError, match="not judged"):
        model.generate(**videos, max_new_tokens=2)
