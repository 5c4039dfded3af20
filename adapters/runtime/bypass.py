"""Arguments that would carry visual vectors past the guard are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from vqguard.adapters.runtime.cache_verdicts import NAMES as CACHES
from vqguard.adapters.seams import METHODS, pixel_names
from vqguard.errors import BypassError

if TYPE_CHECKING:
    from vqguard.adapters.runtime.guard_link import GuardLink

VECTORS = (
    "inputs_embeds",
    "decoder_inputs_embeds",
    "mm_encoder_outputs",
    "encoder_outputs",
    "encoder_hidden_states",
    "image_embeds",
    "image_hidden_states",
    "image_encoder_embeddings",
    "perceiver_embeddings",
    "cross_attention_states",
    "deepstack_visual_embeds",
    "deepstack_features",
    "per_layer_inputs",
    "query_embeds",
    "self_conditioning_logits",
    "vision_outputs",
    "image_outputs",
    "video_outputs",
)
"""Arguments of any family that hold vectors for the language model, under any of its entries."""

HARMLESS = (
    "attention_mask",
    "decoder_attention_mask",
    "encoder_attention_mask",
    "qformer_attention_mask",
    "cross_attention_mask",
    "position_ids",
    "labels",
)
"""Arguments that may be float and that no family adds to its embeddings."""


def refuse_arguments(
    link: GuardLink, model: nn.Module, call: Mapping[str, Any], forward: Callable[..., Any]
) -> None:
    """Raise `BypassError` for caller-made visual vectors, and for image tokens that a user typed.

    Named arguments of `forward` are known; among the others any float tensor of two or more
    dimensions and any cache is refused, because the model passes what it does not know on to its
    parts, and transformers renames arguments after the guard has looked.
    """
    pixels = link.seams[0].pixels[0]
    for name in VECTORS:
        if _holds_something(call.get(name)):
            raise BypassError(
                f"{name} would carry visual vectors past the guard, and without the encoder's "
                f"global token no verdict is possible: pass input_ids and {pixels} instead, or "
                "unguard_model(model) if you do not want a guard"
            )
    known = {*inspect.signature(forward).parameters, *HARMLESS, *CACHES}
    for seam in link.seams:
        known |= {*seam.pixels, *link.adapter.seam_arguments(model, seam, call)}
    for name, value in call.items():
        if name not in known and _float_vectors(value):
            raise BypassError(
                f"{name} is not an argument of {type(model).__name__}.forward, and what it holds "
                f"could reach the language model around the guard: leave it out; images go in "
                f"{pixels}"
            )
    typed = link.adapter.user_typed_images(model)
    ids = link.adapter.prompt_ids(call)
    if typed is not None and ids is not None:
        _refuse_typed(typed, ids, pixels)


def name_inputs(link: GuardLink, model: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    """`generate` takes its main input without a name: pixels among them get theirs.

    Raises:
        BypassError: for floats where the main input is no pixels.
    """
    given = call.get("inputs")
    if not isinstance(given, Tensor) or not given.is_floating_point():
        return call
    parts = (model, getattr(model, "encoder", None))
    main = [getattr(part, "main_input_name", None) for part in parts]
    pixels = {name for seam in link.seams for name in seam.pixels}
    name = next((argument for argument in main if argument in pixels), None)
    if name is None or call.get(name) is not None:
        raise BypassError(
            "inputs holds floats, which generate would take for embeddings: pass token ids, and "
            f"pixels as {' or '.join(sorted(pixels))}"
        )
    named = {key: value for key, value in call.items() if key != "inputs"}
    return {**named, name: given}


def _refuse_typed(typed: Tensor, ids: Tensor, pixels: str) -> None:
    visual = torch.isin(ids, typed.to(ids.device))
    if bool(visual.any()):
        raise BypassError(
            f"input_ids hold image tokens (first: {int(ids[visual][0])}): they show a picture that "
            f"no guard has seen; pass the picture in {pixels}, with placeholders in the prompt"
        )


def refuse_generation(call: Mapping[str, Any], *, pixels: bool) -> None:
    """Raise `BypassError` for decoding loops and assistants that the guard does not cover.

    `pixels`: whether the call shows pictures.
    """
    if call.get("custom_generate") is not None:
        raise BypassError(
            "custom_generate replaces the decoding loop that carries out refusals; use the "
            "built-in strategies"
        )
    if call.get("trust_remote_code"):
        raise BypassError(
            "trust_remote_code=True lets generate fetch a decoding loop and run it in place of the "
            "one that carries out refusals; leave it out, and use the built-in strategies"
        )
    config = call.get("generation_config")
    if "paged" in (call.get("cache_implementation"), getattr(config, "cache_implementation", "")):
        refuse_continuous_batching("cache_implementation='paged'")
    if pixels and call.get("generation_mode") not in (None, "text"):
        raise BypassError(
            f"generation_mode={call['generation_mode']!r} answers with image tokens, which cannot "
            "carry a refusal: leave the pictures out, or ask for text"
        )
    assistant = call.get("assistant_model")
    if assistant is not None and sees(assistant):
        raise BypassError(
            "assistant_model takes images, and generate hands it pixels or another model's "
            "features, which no guard of its own has judged: use a text model, or "
            "prompt_lookup_num_tokens"
        )


def refuse_continuous_batching(what: str) -> NoReturn:
    """Raise `BypassError`: requests of several users share a cache that holds no verdicts."""
    raise BypassError(
        f"{what} decodes in a loop and a cache of its own, where rows cannot be refused, and takes "
        "no pictures: call generate, or unguard_model(model) for text alone"
    )


def sees(model: Any) -> bool:
    """Whether a model takes pictures, by what it declares or by what it has."""
    declared = getattr(model, "input_modalities", ())
    if any(kind in declared for kind in ("image", "video")):
        return True
    config = getattr(model, "config", None)
    parts = (model, getattr(model, "encoder", None), getattr(model, "model", None))
    return (
        getattr(config, "vision_config", None) is not None
        or any(hasattr(type(part), method) for part in parts for method in METHODS)
        or any(_names_pixels(part) for part in parts)
    )


def _names_pixels(part: Any) -> bool:
    forward = getattr(type(part), "forward", None)
    return forward is not None and bool(pixel_names(forward))


def _holds_something(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(item is not None for item in value.values())
    return value is not None


def _float_vectors(value: Any) -> bool:
    if hasattr(value, "get_seq_length"):
        return True
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dim() >= 2
    if isinstance(value, Mapping):
        return any(_float_vectors(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return any(_float_vectors(item) for item in value)
    return False
