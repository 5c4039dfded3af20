"""Which arguments of a call may hold anything, and which options of the encoder a call may set.

A name that is not here carries nothing past the guard: whatever holds data under it is refused.
Read from the `forward` of all families in transformers 5.24, and from what their processors make.
Which of them a family was proven with stands in `families/arguments.py`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin

from vqguard.adapters.families.arguments import ARGUMENTS
from vqguard.adapters.runtime.cache_verdicts import NAMES as CACHES
from vqguard.adapters.seams import names_pixels, original_method, submodule
from vqguard.errors import BypassError

if TYPE_CHECKING:
    from vqguard.adapters.runtime.guard_link import GuardLink

PROMPT = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cache_position",
    "labels",
    "logits_to_keep",
    "token_type_ids",
    "mm_token_type_ids",
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_position_ids",
    "encoder_attention_mask",
    "num_items_in_batch",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
    "max_length_q",
    "max_length_k",
)
"""What any model may be given beside its pictures: none of it is added to the embeddings."""

AUDIO = (
    "audio_feature_lengths",
    "chunk_sample_lengths",
    "feature_attention_mask",
    "input_features",
    "input_features_mask",
    "input_values",
    "input_values_mask",
)
"""Audio, which passes an encoder of its own in the families that have it."""

FAMILIES = (
    "bbox",
    "bool_masked_pos",
    "cross_attention_mask",
    "image_attention_mask",
    "image_embeds_position_mask",
    "moe_mm_token_type_ids",
    "padding_mask",
    "qformer_attention_mask",
    "qformer_input_ids",
    "rope_deltas",
    "router_labels",
    "second_per_grid_ts",
    "video_second_per_grid",
)
"""What single families have beside it."""

PIXELS = (
    "flattened_patches",
    "high_res_pixel_values",
    "image_patches",
    "pixel_values",
    "pixel_values_images",
    "pixel_values_local",
    "pixel_values_videos",
)
"""Pixels of the project's families. Others that seams take are known only where an adapter
declared them: those found by looking may be a newer transformers' own."""

SIDES = (
    "aspect_ratio_ids",
    "aspect_ratio_mask",
    "batch_num_images",
    "height",
    "image_grid_hw",
    "image_grid_thw",
    "image_grids",
    "image_merge_sizes",
    "image_num_crops",
    "image_position_ids",
    "image_sizes",
    "image_sizes_videos",
    "image_token_pooling",
    "num_frames_per_video",
    "num_local_patches",
    "patches_grid",
    "pixel_attention_mask",
    "pixel_mask",
    "spatial_shapes",
    "target_sizes",
    "target_sizes_videos",
    "tile_fine_mask",
    "video_compression_mask",
    "video_grid_thw",
    "video_grids",
    "video_merge_sizes",
    "video_position_ids",
    "video_token_pooling",
    "visual_bbox",
    "width",
)
"""Where the pixels lie: what processors return beside them."""

FREE = ("use_cache", "return_dict", "use_audio_in_video")
"""Options that choose what is returned or how text is laid out; so do all `output_...`."""


def known_names(link: GuardLink, model: nn.Module) -> set[str]:
    """Names under which a call may hold data: those of the proof, where the type was proven here.

    Otherwise those that its family was proven with, and what its adapter adds in `side_arguments`.
    A family of somebody else's may use what says where pixels lie, and no audio unless it says so.
    """
    names = {*PROMPT, *CACHES}
    if link.proven is not None:
        return names | link.proven
    adapter = link.adapter
    kind = _kind(model)
    sides = ARGUMENTS.get(kind, (*FAMILIES, *SIDES))
    return {*names, *sides, *adapter.image_options, *adapter.side_arguments, *_pixels(link, kind)}


def _kind(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", ""))


def _pixels(link: GuardLink, kind: str) -> list[str]:
    taken = dict.fromkeys(name for seam in link.seams for name in seam.pixels)
    if link.proven is not None:
        return [name for name in taken if name in link.proven]
    declared = {*link.adapter.side_arguments, *ARGUMENTS.get(kind, PIXELS)}
    return [name for name in taken if name in declared or not names_pixels(name)]


@cache
def generation_settings() -> frozenset[str]:
    """What the `generate` of any model takes beside the model's own inputs."""
    own = inspect.signature(GenerationMixin.generate).parameters
    fields = vars(GenerationConfig())
    others = ("tokenizer", "assistant_tokenizer", "stop_strings", "renormalize_logits")
    return frozenset({*own, *fields, *others} - {"self", "kwargs"})


def refuse_unknown(
    link: GuardLink,
    model: nn.Module,
    call: Mapping[str, Any],
    forward: Callable[..., Any],
    *,
    generating: bool,
) -> None:
    """Raise `BypassError` for data under a name that the guard was not proven with."""
    known = known_names(link, model)
    if generating:
        known |= generation_settings()
    options = option_names(link, model, forward)
    pixels = _pixels(link, _kind(model))
    for name, value in call.items():
        if name in known or (name in options and is_plain(value)) or not holds_data(value):
            continue
        if name not in inspect.signature(forward).parameters:
            raise BypassError(
                f"{name} is not an argument of {type(model).__name__}.forward, and what it holds "
                f"could reach the language model around the guard: leave it out; images go in "
                f"{link.seams[0].pixels[0]}"
            )
        remedy = "leave it out, or have an adapter name it in side_arguments and prove that"
        if link.proven is not None:
            remedy = "leave it out, or guard the model with probe_inputs that hold it too"
        raise BypassError(
            f"{name} of {type(model).__name__}.forward is not judged: it was no part of what this "
            f"guard was proven with (pixels in {', '.join(pixels)}); what it holds could "
            f"reach the language model around the guard; {remedy}"
        )


def refuse_options(
    link: GuardLink, model: nn.Module, call: Mapping[str, Any], forward: Callable[..., Any]
) -> None:
    """Raise `BypassError` for encoder options that are not those the guard was calibrated with.

    Another layer or another crop gives other features: their codes mean nothing to the map.
    """
    options = option_names(link, model, forward)
    for name, value in call.items():
        if value is None or name not in options or not is_plain(value):
            continue
        expected = usual_option(model, name, options[name])
        if _comparable(value) != _comparable(expected):
            raise BypassError(
                f"expected {name}={expected!r}, with which the guard was calibrated, got {value!r}:"
                " a verdict on other features would mean nothing; leave it out, or set it in the "
                "model's config and calibrate again"
            )


def option_names(link: GuardLink, model: nn.Module, forward: Callable[..., Any]) -> dict[str, Any]:
    """The encoder's options by name, with what a call has that does not set them."""
    settings = {*known_names(link, model), *generation_settings(), *FREE}
    methods: list[Any] = [forward]
    for seam in link.seams:
        methods.append(original_method(submodule(model, seam.path, "seam"), seam.method))
        methods.append(original_method(link.adapter.watched(model, seam), "forward"))
    options = {
        name: None
        for name in vars(getattr(model, "config", None) or object)
        if name.startswith("vision_") and name != "vision_config"
    }
    for method in methods:
        for name, parameter in inspect.signature(method).parameters.items():
            if parameter.default is not parameter.empty and options.get(name) is None:
                options[name] = parameter.default
    return {
        name: value
        for name, value in options.items()
        if name not in settings and not name.startswith("output_")
    }


def usual_option(model: nn.Module, name: str, default: Any) -> Any:
    """What an option is set to where a call does not say."""
    config = getattr(model, "config", None)
    for part in (config, *(getattr(config, f"{what}_config", None) for what in _PARTS)):
        value = getattr(part, name, None)
        if value is not None:
            return value
    return default


_PARTS = ("vision", "adapter")


def _comparable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_comparable(item) for item in value]
    return value


def is_plain(value: Any) -> bool:
    """Whether a value is a setting: a number, a word, or a list of them."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, (bool, int, float, str)) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def holds_data(value: Any) -> bool:
    """Whether a value could hold a picture, or what a model makes of one."""
    if isinstance(value, Mapping):
        return any(holds_data(item) for item in value.values())
    if isinstance(value, (list, tuple, set)):
        return any(holds_data(item) or isinstance(item, (int, float)) for item in value)
    # Pictures of PIL and arrays of other libraries offer themselves by these attributes.
    offers = ("__array_interface__", "__array__", "__dlpack__", "get_seq_length")
    return isinstance(value, (Tensor, np.ndarray, bytes)) or any(
        hasattr(value, name) for name in offers
    )


def integers(value: Any) -> Iterable[int]:
    """All whole numbers in a tensor, an array, a number or a nested list of these."""
    if isinstance(value, (Tensor, np.ndarray)):
        value = value.tolist() if not (isinstance(value, Tensor) and value.is_meta) else []
    if isinstance(value, (list, tuple, set)):
        for item in value:
            yield from integers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value
