"""Arguments that would carry visual vectors past the guard are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vqguard.errors import BypassError

if TYPE_CHECKING:
    from vqguard.adapters.link import GuardLink

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
    dimensions is refused, because the model passes what it does not know on to its parts.
    """
    pixels = link.seams[0].pixels[0]
    for name in VECTORS:
        if _holds_something(call.get(name)):
            raise BypassError(
                f"{name} would carry visual vectors past the guard, and without the encoder's "
                f"global token no verdict is possible: pass input_ids and {pixels} instead, or "
                "unguard_model(model) if you do not want a guard"
            )
    known = {*inspect.signature(forward).parameters, *HARMLESS}
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

    Raises `BypassError` for floats where the main input is no pixels.
    """
    given = call.get("inputs")
    if not isinstance(given, Tensor) or not given.is_floating_point():
        return call
    parts = (model, getattr(model, "encoder", None))
    main = [getattr(part, "main_input_name", None) for part in parts]
    pixels = {name for seam in link.seams for name in seam.pixels}
    name = next((one for one in main if one in pixels), None)
    if name is None or call.get(name) is not None:
        raise BypassError(
            "inputs holds floats, which generate would take for embeddings: pass token ids, and "
            f"pixels as {' or '.join(sorted(pixels))}"
        )
    named = {key: value for key, value in call.items() if key != "inputs"}
    return {**named, name: given}


def _refuse_typed(typed: Tensor, ids: Tensor, pixels: str) -> None:
    import torch

    found = torch.isin(ids, typed.to(ids.device))
    if bool(found.any()):
        raise BypassError(
            f"input_ids hold image tokens (first: {int(ids[found][0])}): they show a picture that "
            f"no guard has seen; pass the picture in {pixels}, with placeholders in the prompt"
        )


def refuse_generation(call: Mapping[str, Any]) -> None:
    """Raise `BypassError` for decoding loops and assistants that the guard does not cover."""
    if call.get("custom_generate") is not None:
        raise BypassError(
            "custom_generate replaces the decoding loop that carries out refusals; use the "
            "built-in strategies"
        )
    assistant = call.get("assistant_model")
    sees = getattr(assistant, "input_modalities", ("text",))
    visual = any(kind in sees for kind in ("image", "video"))
    if assistant is not None and visual and getattr(assistant, "vqguard", None) is None:
        raise BypassError(
            "assistant_model takes images and has no guard: guard it too, or use a text model"
        )


def _holds_something(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(item is not None for item in value.values())
    return value is not None


def _float_vectors(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.is_floating_point() and value.dim() >= 2
    if isinstance(value, Mapping):
        return any(_float_vectors(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return any(_float_vectors(one) for one in value)
    return False
