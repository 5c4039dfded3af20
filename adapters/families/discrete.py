"""Families that turn pictures into tokens of their own vocabulary.

Their features are embeddings already, and are quantised again with the guard's codebook. What is
special is that a user can type the same tokens: those are refused.

Read from transformers' `models/chameleon`, `emu3` and `apertus1p5`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.families.decoder_owner import DecoderOwnerAdapter
from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.registration import register_adapter


class DiscreteAdapter(DefaultAdapter):
    """The picture's tokenizer stays as it is: stage 1 trains the codebooks alone."""

    vision_path = "vqmodel"
    projector_paths = ("vqmodel",)
    trains_projector = False
    refused_note = "image tokens in the prompt"

    def stage1_trainable(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        return self._parameters_of(model, self._levels(model))

    def user_typed_images(self, model: nn.Module) -> Tensor | None:
        mapping = cast(Any, self.owner(model)).vocabulary_mapping
        return torch.tensor(sorted(mapping.bpe2img))


@register_adapter(
    Family(
        "emu3",
        proven_from="5.20",
        random_model=RandomModel(
            config={
                "vocabulary_map": {
                    "<image>": 100,
                    "<|extra_200|>": 98,
                    "<|visual token 000000|>": 60,
                    "<|visual token 000001|>": 61,
                    "<|visual token 000002|>": 62,
                    "<|visual token 000003|>": 63,
                    "<|visual token 000004|>": 64,
                    "<|visual token 000005|>": 65,
                    "<|visual token 000006|>": 66,
                    "<|visual token 000007|>": 67,
                },
                "image_token_id": 100,
                "vq_config.codebook_size": 8,
                "vq_config.embed_dim": 4,
                "vq_config.base_channels": 32,
                "vq_config.channel_multiplier": [1, 1],
                "vq_config.num_res_blocks": 1,
                "vq_config.temporal_downsample_factor": 1,
                "vq_config.hidden_size": 32,
                "vq_config.num_attention_heads": 1,
                "vq_config.attn_resolutions": [16],
            }
        ),
    )
)
class Emu3Adapter(DiscreteAdapter):
    """`text_model` reads, `vqmodel` sees."""


@register_adapter(
    Family(
        "chameleon",
        random_model=RandomModel(
            config={
                "vocabulary_map": {
                    "<image>": 100,
                    "IMGIMGAZ": 60,
                    "IMGIMGBZ": 61,
                    "IMGIMGCZ": 62,
                    "IMGIMGDZ": 63,
                    "IMGIMGEZ": 64,
                    "IMGIMGFZ": 65,
                    "IMGIMGGZ": 66,
                    "IMGIMGHZ": 67,
                },
                "image_token_id": 100,
                "vq_config.num_embeddings": 8,
                "vq_config.embed_dim": 8,
                "vq_config.latent_channels": 8,
                "vq_config.base_channels": 32,
                "vq_config.channel_multiplier": [1, 2],
                "vq_config.num_res_blocks": 1,
                "vq_config.resolution": 32,
            }
        ),
    )
)
class ChameleonAdapter(DecoderOwnerAdapter, DiscreteAdapter):
    """The owner is the language model itself."""

    def language_entries(self, model: nn.Module) -> list[nn.Module]:
        return [cast(Any, self.owner(model)).layers[0]]


@register_adapter(
    Family(
        "apertus1p5",
        proven_from="5.24",
        random_model=RandomModel(
            config={
                "image_token_id": 100,
                "image_token_offset": 50,
                "audio_token_offset": 58,
                "vision_config.codebook_size": 8,
                "vision_config.embed_dim": 8,
                "vision_config.latent_channels": 8,
                "vision_config.base_channels": 32,
                "vision_config.channel_multiplier": [1, 1],
                "vision_config.num_res_blocks": 1,
                "vision_config.attn_resolutions": [16],
                "vision_config.resolution": 32,
                "vision_config.spatial_scale_factor": 2,
                "audio_config.codebook_dim": 32,
                "audio_config.codebook_size": 8,
                "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            }
        ),
    )
)
class ApertusAdapter(DiscreteAdapter):
    """Image tokens are a range of the vocabulary."""

    vision_path = "vision_tokenizer"
    projector_paths = ("vision_tokenizer",)

    def user_typed_images(self, model: nn.Module) -> Tensor | None:
        config = cast(Any, model).config
        start = int(config.image_token_offset)
        return torch.arange(start, start + int(config.vision_config.codebook_size))
