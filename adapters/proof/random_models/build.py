"""Tiny random models of every family, from the installed transformers' classes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from vqguard.adapters.proof.random_models.sizes import override, shrink
from vqguard.adapters.random_inputs.prompts import EOS, PAD
from vqguard.adapters.registry import declared_family
from vqguard.errors import InputError


def mapped_types() -> list[str]:
    """The model types of transformers' image-text-to-text mapping, sorted."""
    return sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def _classes(kind: str) -> tuple[Any, Any] | None:
    """Config and model class of a type of the mapping, or of one registered with Auto classes."""
    if kind not in CONFIG_MAPPING:
        return None
    config_class = CONFIG_MAPPING[kind]
    if config_class not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return None
    model_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[config_class]
    return config_class, model_class[0] if isinstance(model_class, tuple) else model_class


def build_tiny(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A random model of a type, in eval mode, well under a second to make.

    `fields`: values at dotted paths of its config, with `__` for the dots.

    Raises:
        InputError: for a type that transformers does not map, or that sees no pixels.
    """
    family = declared_family(kind)
    classes = _classes(kind)
    if family.blind or classes is None:
        reason = family.blind or "transformers does not map it to an image-text-to-text model"
        raise InputError(f"no tiny model of type {kind!r}: {reason}")
    config_class, model_class = classes
    random_model = family.random_model
    if random_model.make_config is not None:
        config = random_model.make_config(config_class)
    else:
        small = override(shrink(config_class().to_dict()), random_model.config)
        small = override(small, {name.replace("__", "."): value for name, value in fields.items()})
        small.pop("model_type", None)
        config = config_class(**small)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Default weights are so small that logits hardly depend on the image.
            parameter.mul_(2)
            if not bool(torch.isfinite(parameter).all()):
                parameter.zero_()
            if ("gate" in name or parameter.dim() >= 2) and not bool(parameter.any()):
                # Some families start closed, where nothing could leak.
                parameter.normal_(std=0.5)
    if random_model.prepare is not None:
        random_model.prepare(model)
    for generation in (model, getattr(model, "language_model", None)):
        settings = getattr(generation, "generation_config", None)
        if settings is not None:
            settings.pad_token_id = PAD
            settings.eos_token_id = EOS
            settings.bos_token_id = settings.bos_token_id if settings.bos_token_id in (0, 1) else 0
    return model
