"""Families whose visual features are the input or the output of an encoder.

Read from transformers' `models/pix2struct`, `udop`, `florence2`, `t5gemma2`, `pp_formulanet`
and `vision_encoder_decoder`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.forward_seams import (
    FirstTokenAdapter,
    InnerAdapter,
    TowerStatesAdapter,
)
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.features import Shown, Site
from vqguard.adapters.random_inputs.pixels import Pixels, large, noise
from vqguard.adapters.random_inputs.prompts import Layout, placeholders, words
from vqguard.adapters.seams import Seam, means


def flattened(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 16, 2 + 192): row and column of each patch in front of it."""
    grid = torch.meshgrid(torch.arange(1, 5), torch.arange(1, 5), indexing="ij")
    places = torch.stack(grid, -1).reshape(1, 16, 2).repeat(images, 1, 1).float()
    patch = getattr(model.config.vision_config, "patch_size", 8)
    patches = noise(generator, images, 16, 3 * patch * patch)
    return {"flattened_patches": torch.cat([places, patches], -1)}


def with_places(pixels: Tensor, drawn: Tensor) -> Tensor:
    """`drawn` patches, with each patch's row and column, its first two numbers, of `pixels`."""
    return torch.cat([pixels[..., :2], drawn[..., 2:]], dim=-1)


def decoded(layout: Layout) -> dict[str, Any]:
    """Nothing but the decoder's start."""
    return {"decoder_input_ids": torch.tensor([[0, 5, 6]] * len(layout.images))}


def both(layout: Layout) -> dict[str, Any]:
    """Placeholders for the encoder, and the decoder's start."""
    return {**placeholders(layout), **decoded(layout)}


def boxed(layout: Layout) -> dict[str, Any]:
    """Words with their boxes, and the decoder's start."""
    inputs = words(replace(layout, right=True))
    boxes = torch.rand(*inputs["input_ids"].shape, 4, generator=torch.Generator().manual_seed(1))
    return {**inputs, "bbox": boxes, **decoded(layout)}


def pair(config_class: Any) -> Any:
    """The config of a ViT with a GPT-2."""
    from transformers import GPT2Config, ViTConfig  # only a random model needs them

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


@register_adapter(
    Family(
        "pix2struct",
        random_model=RandomModel(
            config={
                "vision_config.patch_embed_hidden_size": 192,
                "vision_config.d_ff": 64,
                "vision_config.seq_len": 64,
                "text_config.d_ff": 64,
                "text_config.num_layers": 2,
                "text_config.num_heads": 4,
                "text_config.decoder_start_token_id": 0,
                "text_config.dropout_rate": 0.0,
            },
            pixels={"image": flattened},
            prompt=decoded,
            one_a_row=True,
        ),
    )
)
class Pix2StructAdapter(TowerStatesAdapter):
    """The encoder's states, read by the decoder; padding is left out of the mean that is judged."""

    seam_path = "encoder"
    joins = "encode"
    inputs = ("flattened_patches", "attention_mask")
    vision_path = "encoder"
    projector_paths = ("encoder.layernorm",)
    language_path = "decoder"

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return tuple(replace(seam, pixels=("flattened_patches",)) for seam in super().seams(model))

    def redraw(self, name: str, pixels: Any, generator: torch.Generator) -> Any:
        return with_places(pixels, super().redraw(name, pixels, generator))

    def global_token(self, shown: Shown) -> Tensor:
        mask = shown.arguments.get("attention_mask")
        if mask is None:
            return means(list(shown.units))
        return means([unit[row.bool()] for unit, row in zip(shown.units, mask, strict=True)])

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        output = language(
            input_ids=input_ids, attention_mask=mask, output_hidden_states=True, return_dict=True
        )
        return cast(Tensor, output.hidden_states[-1])


@register_adapter(
    Family(
        "vision-encoder-decoder",
        proven_from="5.20",
        random_model=RandomModel(make_config=pair, prompt=decoded, one_a_row=True),
    )
)
class PairAdapter(FirstTokenAdapter):
    """Any vision encoder with any decoder: the encoder's states, CLS first where it has one."""

    seam_path = "encoder"
    seam_field = "last_hidden_state"
    joins = "encode"
    vision_path = "encoder"
    projector_paths = ("encoder.layernorm",)
    language_path = "decoder"

    def width(self, model: nn.Module, site: Site) -> int:
        self.require_site(site)
        return int(cast(Any, model).config.encoder.hidden_size)

    def projectors(self, model: nn.Module) -> list[nn.Module]:
        # Encoders differ: the last norm of whichever it is, but not the pooler, which nobody reads.
        parts = [part for name, part in self.tower(model).named_children() if name != "pooler"]
        top = cast(Any, model)
        return [top.enc_to_dec_proj] if hasattr(top, "enc_to_dec_proj") else parts[-1:]

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        last = self.projectors(model)[-1]
        return [part for part in self.tower(model).children() if part is not last]

    def global_token(self, shown: Shown) -> Tensor | list[Tensor]:
        names = (name for name, _ in self.tower(shown.model).named_parameters())
        if any("cls_token" in name for name in names):
            return super().global_token(shown)
        return means(list(shown.units))

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        output = cast(Any, language).base_model(input_ids=input_ids, attention_mask=mask)
        return cast(Tensor, output.last_hidden_state)


@register_adapter(
    Family(
        "pp_formulanet",
        proven_from="5.12",
        random_model=RandomModel(
            config={
                "text_config.d_model": 32,
                "vision_config.image_size": 64,
                "vision_config.window_size": 2,
                "vision_config.global_attn_indexes": [1],
                "vision_config.decoder_hidden_size": 32,
                "vision_config.mlp_dim": 64,
                "vision_config.output_channels": 16,
                "vision_config.post_conv_mid_channels": 16,
                "vision_config.post_conv_out_channels": 16,
                "vision_config.post_conv_in_channels": 16,
            },
            pixels={"image": large(64)},
            prompt=decoded,
            one_a_row=True,
        ),
    )
)
class FormulaNetAdapter(InnerAdapter):
    """The pooled output of the encoder, read by the decoder."""

    seam_path = "model.encoder"
    seam_field = "pooler_output"
    joins = "encode"
    inputs = ("pixel_values",)
    top_path = "model"
    vision_path = "encoder"
    projector_paths = ("encoder",)
    language_path = "decoder"


@register_adapter(
    Family(
        "udop",
        random_model=RandomModel(
            config={
                "d_kv": 8,
                "d_ff": 64,
                "num_layers": 2,
                "num_decoder_layers": 2,
                "num_heads": 4,
                "image_size": 32,
                "patch_size": 8,
                "dropout_rate": 0.0,
                "max_2d_position_embeddings": 64,
            },
            prompt=boxed,
            one_a_row=True,
        ),
    )
)
class UdopAdapter(InnerAdapter):
    """Patches added to the words they lie under; the others follow the text."""

    seam_path = "encoder.embed_patches"
    additive = True
    joins = "encode"
    inputs = ("pixel_values",)
    vision_path = "encoder.embed_patches"
    projector_paths = ("encoder.embed_patches",)
    language_path = "decoder"

    def language_modules(self, model: nn.Module) -> list[nn.Module]:
        top = cast(Any, model)
        return [top.shared, top.encoder.block, top.decoder, top.lm_head]

    def language_model(self, model: nn.Module) -> nn.Module:
        return cast(nn.Module, cast(Any, model).encoder)

    def language_entries(self, model: nn.Module) -> list[nn.Module]:
        return [cast(Any, model).encoder.block[0]]

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        boxes = torch.zeros(*input_ids.shape, 4, device=input_ids.device)
        output = language(input_ids=input_ids, attention_mask=mask, bbox=boxes)
        return cast(Tensor, output.last_hidden_state)


@register_adapter(
    Family(
        "florence2",
        checkpoints={"florence-2": "florence-community/Florence-2-base"},
        random_model=RandomModel(
            config={
                "vision_config.depths": [1, 1],
                "vision_config.patch_size": [7, 3],
                "vision_config.patch_stride": [4, 2],
                "vision_config.patch_padding": [3, 1],
                "vision_config.patch_prenorm": [False, True],
                "vision_config.embed_dim": [16, 32],
                "vision_config.num_heads": [2, 4],
                "vision_config.num_groups": [2, 4],
                "vision_config.window_size": 4,
                "vision_config.projection_dim": 32,
                "text_config.dropout": 0.0,
            },
            prompt=both,
        ),
    ),
    Family(
        "t5gemma2",
        random_model=RandomModel(
            config={
                "encoder.mm_tokens_per_image": 4,
                "encoder.text_config.layer_types": ["sliding_attention", "full_attention"],
                "decoder.layer_types": ["sliding_attention", "full_attention"],
                "image_token_index": 100,
                "dropout_rate": 0.0,
            },
            prompt=both,
        ),
    ),
)
class EncodedAdapter(DefaultAdapter):
    """Features in the place of placeholders, in the input of a text encoder."""

    def language_entries(self, model: nn.Module) -> list[nn.Module]:
        language = self.language_model(model)
        return [cast(Any, language).encoder if hasattr(language, "encoder") else language]

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        reader = cast(Any, language)
        encoder = reader.get_encoder() if hasattr(reader, "encoder") else reader
        output = encoder(input_ids=input_ids, attention_mask=mask)
        return cast(Tensor, output.last_hidden_state)
