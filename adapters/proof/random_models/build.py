"""Tiny random models of every family, from the installed transformers' classes."""

from __future__ import annotations

from typing import Any

import torch

from vqguard.adapters.proof.random_models.configs import LEFT_OUT, changes
from vqguard.adapters.proof.random_models.sizes import EOS, PAD, override, shrink
from vqguard.errors import InputError


def mapping() -> dict[str, str]:
    """Model type -> class name, of transformers' image-text-to-text mapping."""
    from transformers.models.auto import modeling_auto

    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return {kind: name if isinstance(name, str) else name[0] for kind, name in names.items()}


def tiny_types() -> list[str]:
    """The model types that can be built, sorted; those that see no pixels are left out."""
    return sorted(kind for kind in mapping() if kind not in LEFT_OUT)


def build_tiny(kind: str, seed: int = 0, **fields: Any) -> Any:
    """A random model of a type, in eval mode, well under a second to make.

    `fields`: values at dotted paths of its config, with `__` for the dots. Raises `InputError`
    for a type that transformers does not map, or that sees no pixels.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if kind not in mapping() or kind in LEFT_OUT:
        reason = LEFT_OUT.get(kind, "transformers does not map it to an image-text-to-text model")
        raise InputError(f"no tiny model of type {kind!r}: {reason}")
    config_class = CONFIG_MAPPING[kind]
    small = override(shrink(config_class().to_dict()), changes().get(kind, {}))
    small = override(small, {name.replace("__", "."): value for name, value in fields.items()})
    small.pop("model_type", None)
    pair = kind == "vision-encoder-decoder"
    config = _pair(config_class) if pair else config_class(**small)
    torch.manual_seed(seed)
    model = getattr(transformers, mapping()[kind])(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Default weights are so small that logits hardly depend on the image.
            parameter.mul_(2)
            if not bool(torch.isfinite(parameter).all()):
                parameter.zero_()
            if ("gate" in name or parameter.dim() >= 2) and not bool(parameter.any()):
                # Some families start closed, where nothing could leak.
                parameter.normal_(std=0.5)
    if kind == "llama4":
        # transformers 5.24 asks the language model's output for a field that it does not have.
        model.language_model.register_forward_hook(_with_image_outputs)
    for generation in (model, getattr(model, "language_model", None)):
        settings = getattr(generation, "generation_config", None)
        if settings is not None:
            settings.pad_token_id = PAD
            settings.eos_token_id = EOS
            settings.bos_token_id = settings.bos_token_id if settings.bos_token_id in (0, 1) else 0
    return model


def _with_image_outputs(module: Any, args: Any, output: Any) -> Any:
    if hasattr(output, "logits") and not hasattr(output, "image_outputs"):
        object.__setattr__(output, "image_outputs", None)
    return output


def _pair(config_class: Any) -> Any:
    from transformers import GPT2Config, ViTConfig

    encoder = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    sizes: Any = GPT2Config
    decoder = sizes(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=128,
        n_positions=64,
        add_cross_attention=True,
        is_decoder=True,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    config = config_class.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id = 0, 1
    return config
