"""BLIP-2 and InstructBLIP: a Q-Former between tower and language model.

The seam is the projection after the Q-Former, where `forward` and BLIP-2's own `generate`, which
computes everything again, both come through. Site "encoder" is what the Q-Former reads.

Read from transformers' `models/blip_2`, `instructblip` and `instructblipvideo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.features import Shown, Tap
from vqguard.adapters.random_inputs.pixels import Pixels, noise, square
from vqguard.adapters.seams import Modality, Seam, equal_parts, original_method
from vqguard.adapters.text import evenly


def with_question(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """One picture a row, with the text that the Q-Former reads."""
    ids = torch.arange(3, 9).repeat(images, 1)
    return {**square(model, images, generator), "qformer_input_ids": ids}


def four_frames(model: Any, videos: int, generator: torch.Generator) -> Pixels:
    """(n, 4, 3, 32, 32) with the text that the Q-Former reads."""
    ids = torch.arange(3, 9).repeat(videos, 1)
    return {
        "pixel_values": noise(generator, videos, 4, 3, 32, 32),
        "qformer_input_ids": ids,
    }


_LANGUAGE = {
    "text_config.word_embed_proj_dim": 32,
    "use_decoder_only_language_model": True,
}


@register_adapter(
    Family(
        "blip-2",
        checkpoints={"blip-2": "Salesforce/blip2-opt-2.7b"},
        random_model=RandomModel(
            config={"image_token_index": 100, **_LANGUAGE},
            one_a_row=True,
        ),
    ),
    Family(
        "instructblip",
        checkpoints={
            "instructblip": "Salesforce/instructblip-vicuna-7b",
            "instructblip-13b": "Salesforce/instructblip-vicuna-13b",
        },
        random_model=RandomModel(
            config={"image_token_index": 100, **_LANGUAGE},
            pixels={"image": with_question},
            one_a_row=True,
        ),
    ),
)
class QFormerAdapter(Adapter):
    """A Q-Former's queries, projected.

    Global token: the tower's CLS at site "encoder"; after the Q-Former, which has no such token,
    the mean of its queries.
    """

    sites = ("projected", "encoder")
    projector_paths = ("language_projection", "qformer")
    vision_path = "vision_model"
    global_token_note = "CLS before the Q-Former, mean of the queries after it"
    modality: Modality = "image"

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return (Seam("language_projection", "forward", self.modality, field=""),)

    def owner_path(self, model: nn.Module) -> str:
        return ""

    def taps(self, model: nn.Module) -> tuple[Tap, ...]:
        return (Tap("qformer", "encoder_hidden_states"),)

    def seam_arguments(
        self, model: nn.Module, seam: Seam, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        names = ("pixel_values", "interpolate_pos_encoding", "qformer_input_ids")
        chosen = (*names, "qformer_attention_mask")
        return {k: v for k, v in inputs.items() if k in chosen and v is not None}

    def run(self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]) -> Any:
        features = original_method(model, f"get_{self.modality}_features")
        states: Tensor = features(**{**arguments, "return_dict": True}).pooler_output
        queries = int(cast(Any, model).config.num_query_tokens)
        return states.reshape(-1, queries, states.shape[-1])

    def global_token(self, shown: Shown) -> Tensor | list[Tensor]:
        if shown.site == "projected":
            return super().global_token(shown)
        frames = self.frames(shown.arguments)
        parts = [torch.stack(equal_parts(unit, frames)) for unit in shown.units]
        return torch.stack(parts)[:, :, 0]

    def frames_of(self, shown: Shown) -> list[int]:
        return [self.frames(shown.arguments)] * len(shown.units)

    def frames(self, arguments: Mapping[str, Any]) -> int:
        """How many pictures the tower is shown for each unit."""
        return 1

    def split(self, seam: Seam, features: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        frames = self.frames(arguments)
        return list(rearrange(features, "(units frames) n d -> units (frames n) d", frames=frames))

    def encoder_units(
        self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any], features: Tensor
    ) -> list[Tensor]:
        return self.split(seam, features, arguments)

    def rows(
        self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any], counts: list[int]
    ) -> list[int]:
        if self.prompt_ids(arguments) is None:
            return evenly(len(counts), len(arguments["pixel_values"]), seam.modality)
        return super().rows(model, seam, arguments, counts)

    def answer_prompt(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
        """Its `generate` is the language model's; without a prompt it makes one of placeholders."""
        language = cast(Any, self.language_model(model))
        ids = self.prompt_ids(arguments)
        if language.config.is_encoder_decoder:
            return self.started(model, arguments, "decoder_start_token_id")
        if ids is not None:
            return ids
        config = cast(Any, model).config
        pixels = arguments["pixel_values"]
        name = "image_token_index" if self.modality == "image" else "video_token_index"
        frames = 1 if self.modality == "image" else 4
        row = [getattr(config, name)] * (config.num_query_tokens * frames)
        row.append(config.text_config.bos_token_id)
        return torch.tensor([row] * len(pixels), device=pixels.device)

    def text_only(self, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        return None

    def generation_config(self, model: nn.Module) -> Any:
        return cast(Any, self.language_model(model)).generation_config

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        model = cast(Any, language)
        reader = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        output = reader(input_ids=input_ids, attention_mask=mask)
        return cast(Tensor, output.last_hidden_state)


@register_adapter(
    Family(
        "instructblipvideo",
        random_model=RandomModel(
            config={"video_token_index": 101, **_LANGUAGE},
            pixels={"video": four_frames},
            one_a_row=True,
        ),
    )
)
class QFormerVideoAdapter(QFormerAdapter):
    """The queries of all frames are one video. Each frame is judged, the worst counts."""

    modality = "video"
    global_token_note = "each frame: CLS before the Q-Former, mean of its queries after it"

    def frames(self, arguments: Mapping[str, Any]) -> int:
        pixels = arguments.get("pixel_values")
        return 1 if pixels is None else int(pixels.shape[1])
