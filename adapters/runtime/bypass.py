"""Arguments that would carry visual vectors past the guard are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from vqguard.adapters.runtime.known_arguments import (
    integers,
    refuse_options,
    refuse_unknown,
)
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
    "image_embeddings",
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

NO_IDS = (
    "aspect_ratio_ids",
    "bad_words_ids",
    "decoder_position_ids",
    "image_position_ids",
    "position_ids",
    "video_position_ids",
)
"""Arguments whose names end as those of token ids, which hold places; or tokens to keep away."""


def refuse_arguments(
    link: GuardLink,
    model: nn.Module,
    call: Mapping[str, Any],
    forward: Callable[..., Any],
    *,
    generating: bool = False,
) -> None:
    """Raise `BypassError` for what would show a picture that no verdict was computed of.

    Caller-made visual vectors by their names, data under names that the guard was not proven
    with, encoder options other than those it was calibrated with, image tokens that a user typed.
    transformers renames arguments after the guard has looked, and the model passes what it does
    not know on to its parts: only known names pass.
    """
    pixels = link.seams[0].pixels[0]
    for name in VECTORS:
        if _holds_something(call.get(name)):
            raise BypassError(
                f"{name} would carry visual vectors past the guard, and without the encoder's "
                f"global token no verdict is possible: pass input_ids and {pixels} instead, or "
                "unguard_model(model) if you do not want a guard"
            )
    if not generating and call.get("inputs") is not None:
        raise BypassError(
            f"inputs is not an argument of {type(model).__name__}.forward, and rows would be told "
            "by it that the model does not read: pass the prompt as input_ids"
        )
    refuse_unknown(link, model, call, forward, generating=generating)
    refuse_options(link, model, call, forward)
    typed = link.adapter.user_typed_images(model)
    if typed is not None:
        _refuse_typed(set(typed.tolist()), call, pixels)


def name_inputs(link: GuardLink, model: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    """`generate` takes its main input without a name: pixels among them get theirs.

    Raises:
        BypassError: for floats where the main input is no pixels.
    """
    given = call.get("inputs")
    if given is not None and call.get("input_ids") is not None:
        raise BypassError(
            "inputs and input_ids name the same argument of generate, and which rows show which "
            "pictures would be told by one of them alone: pass the prompt as input_ids"
        )
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


def _refuse_typed(typed: set[int], call: Mapping[str, Any], pixels: str) -> None:
    """Raise `BypassError` for image tokens in any argument that can hold ids."""
    config = call.get("generation_config")
    settings = vars(config) if hasattr(config, "__dict__") else {}
    for given in (call, settings):
        for name, value in given.items():
            first = next((token for token in _ids(name, value) if token in typed), None)
            if first is not None:
                raise BypassError(
                    f"{name} holds image tokens (first: {first}): they show a picture that no "
                    f"guard has seen; pass the picture in {pixels}, with placeholders in the prompt"
                )


def _ids(name: str, value: Any) -> Iterable[int]:
    """The token ids that an argument puts into a sequence or makes likely there."""
    if name == "sequence_bias":
        pairs = value.items() if isinstance(value, Mapping) else value or ()
        return integers([list(sequence) for sequence, bias in pairs if bias > 0])
    if name in NO_IDS or name.endswith("token_type_ids"):
        return ()
    return integers(value) if name == "inputs" or name.endswith(("_ids", "_id")) else ()


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
