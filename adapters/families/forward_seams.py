"""Families whose visual features come from a module inside `forward`.

They are read by cross-attention, put in front of the text, or projected after `get_image_features`.

Read from transformers' `models/mllama`, `idefics`, `blip`, `git`, `llama4`, `fuyu`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.adapters.families.decoder_owner import DecoderOwnerAdapter
from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.features import Shown, Site
from vqguard.adapters.random_inputs.pixels import Pixels, by_sample, noise
from vqguard.adapters.random_inputs.prompts import Layout, words
from vqguard.adapters.seams import Joins, Seam, equal_parts


def tiled_by_sample(model: Any, images: Sequence[int], generator: torch.Generator) -> Pixels:
    """(B, most images, 2, 3, 32, 32) with aspect ratios; 0 marks a picture that is not there."""
    flat = noise(generator, sum(images), 2, 3, 32, 32)
    most = max(images)
    pixels = torch.zeros(len(images), most, 2, 3, 32, 32)
    ids = torch.zeros(len(images), most, dtype=torch.long)
    mask = torch.zeros(len(images), most, 2, dtype=torch.long)
    mask[..., 0] = 1
    for row, part in enumerate(torch.split(flat, list(images))):
        pixels[row, : len(part)] = part
        ids[row, : len(part)] = 2
        mask[row, : len(part)] = 1
    return {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}


def _seen(layout: Layout) -> Tensor:
    """(B, T, most images): every word sees every picture of its row."""
    rows, length = words(layout)["input_ids"].shape
    seen = torch.zeros(rows, length, max([*layout.images, 1]), dtype=torch.long)
    for row, number in enumerate(layout.images):
        seen[row, :, :number] = 1
    return seen


def tiles_seen(layout: Layout) -> dict[str, Any]:
    """Words, and the tiles that each sees, by Mllama's name."""
    return {**words(layout), "cross_attention_mask": _seen(layout)[..., None].repeat(1, 1, 1, 2)}


def pictures_seen(layout: Layout) -> dict[str, Any]:
    """Words, and the pictures that each sees, by Idefics' name."""
    return {**words(layout), "image_attention_mask": _seen(layout)}


def raw_patches(model: Any, images: int, generator: torch.Generator) -> Pixels:
    """(n, 8, 192) patches without an encoder."""
    return {"pixel_values": noise(generator, images, 8, 192)}


def with_image_outputs(model: Any) -> None:
    """Give the language model's output a field for which transformers 5.24 asks in vain."""

    def add(module: Any, args: Any, output: Any) -> Any:
        if hasattr(output, "logits") and not hasattr(output, "image_outputs"):
            object.__setattr__(output, "image_outputs", None)
        return output

    model.language_model.register_forward_hook(add)


class InnerAdapter(Adapter):
    """One seam, declared: a module, the arguments its visual path takes, and that path."""

    seam_path = ""
    seam_field: str = ""
    joins: Joins = "cross-attend"
    inputs: tuple[str, ...] = ("pixel_values", "interpolate_pos_encoding")
    top_path = ""

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return (Seam(self.seam_path, "forward", field=self.seam_field, joins=self.joins),)

    def owner_path(self, model: nn.Module) -> str:
        return self.top_path

    def seam_arguments(
        self, model: nn.Module, seam: Seam, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {k: v for k, v in inputs.items() if k in self.inputs and v is not None}

    def run(self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]) -> Any:
        return model.get_submodule(self.seam_path)(**arguments)


class TowerStatesAdapter(InnerAdapter):
    """The text reads the tower's own states: its last norm stands for the projector."""

    seam_field = "last_hidden_state"

    def width(self, model: nn.Module, site: Site) -> int:
        self.require_site(site)
        return int(cast(Any, model).config.vision_config.hidden_size)

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        tower = cast(Any, self.tower(model))
        return [tower.embeddings, tower.encoder]


class FirstTokenAdapter(InnerAdapter):
    """The tower's CLS token is the first of the unit's tokens."""

    global_token_note = "CLS"

    def global_token(self, shown: Shown) -> Tensor | list[Tensor]:
        return [
            torch.stack([part[0] for part in equal_parts(unit, count)])
            for unit, count in zip(shown.units, self.frames_of(shown), strict=True)
        ]


def _shown_places(there: list[bool], most: int) -> list[int]:
    """The place of each picture; for padding its row's first. `most`: pictures in a row."""
    return [place if real else place - place % most for place, real in enumerate(there)]


@register_adapter(
    Family(
        "mllama",
        checkpoints={"llama-3.2-vision": "meta-llama/Llama-3.2-11B-Vision-Instruct"},
        random_model=RandomModel(
            config={
                "vision_config.num_global_layers": 1,
                "vision_config.attention_heads": 4,
                "vision_config.max_num_tiles": 2,
                "vision_config.supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
                "vision_config.intermediate_layers_indices": [0],
                "vision_config.vision_output_dim": 64,
                "text_config.cross_attention_layers": [1],
                "text_config.dropout": 0.0,
            },
            pixels_by_row=tiled_by_sample,
            prompt=tiles_seen,
        ),
    )
)
class MllamaAdapter(FirstTokenAdapter):
    """Tiles of all pictures of a row, read by cross-attention.

    No tile shows the whole picture: the CLS of each is judged, the worst counts. A padding picture,
    which shows nothing, is judged as the row's first.
    """

    global_token_note = "CLS of each tile"

    seam_path = "model.multi_modal_projector"
    top_path = "model"
    vision_path = "vision_model"
    inputs = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")

    def run(self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]) -> Any:
        states = self.tower(model)(**arguments).last_hidden_state
        return self.projector(model)(states)

    def split(self, seam: Seam, features: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        return list(rearrange(features, "b images tiles n d -> (b images) (tiles n) d"))

    def global_token(self, shown: Shown) -> list[Tensor]:
        most, tiles = shown.arguments["pixel_values"].shape[1:3]
        real = shown.arguments["aspect_ratio_mask"].flatten(0, 1).bool().cpu().clone()
        real[:, 0] = True
        there = shown.arguments["aspect_ratio_ids"].flatten().bool().tolist()
        judged = []
        for place in _shown_places(there, most):
            heads = torch.stack([part[0] for part in equal_parts(shown.units[place], tiles)])
            judged.append(heads[real[place].to(heads.device)])
        return judged


@register_adapter(
    Family(
        "idefics",
        random_model=RandomModel(
            config={
                "vision_config.image_size": 32,
                "vision_config.patch_size": 8,
                "additional_vocab_size": 0,
                "cross_layer_interval": 1,
                "alpha_initializer": "ones",
            },
            pixels_by_row=by_sample,
            prompt=pictures_seen,
        ),
    )
)
class IdeficsAdapter(DecoderOwnerAdapter, FirstTokenAdapter):
    """Pictures of a row, read by gated cross-attention, after a resampler in the larger models.

    Empty pictures, which fill up a row, are judged as the row's first.
    """

    top_path = "model"
    vision_path = "vision_model"
    projector_paths = ("gated_cross_attn_layers",)

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        if cast(Any, model).config.use_resampler:
            return (Seam("model.perceiver_resampler", "forward", field="", joins="cross-attend"),)
        return (
            Seam("model.vision_model", "forward", field="last_hidden_state", joins="cross-attend"),
        )

    def run(self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]) -> Any:
        pixels = rearrange(arguments["pixel_values"], "b images c h w -> (b images) c h w")
        pixels = pixels.to(cast(Any, model).dtype)
        output = self.tower(model)(**{**arguments, "pixel_values": pixels})
        if seam.field:
            return output
        return model.get_submodule(seam.path)(output.last_hidden_state)

    def width(self, model: nn.Module, site: Site) -> int:
        self.require_site(site)
        return int(cast(Any, model).config.vision_config.embed_dim)

    def global_token(self, shown: Shown) -> Tensor:
        pixels = shown.arguments["pixel_values"]
        there = (pixels != 0).flatten(2).any(-1).flatten().tolist()
        places = _shown_places(there, pixels.shape[1])
        return torch.stack([shown.units[place][:1] for place in places])

    def language_entries(self, model: nn.Module) -> list[nn.Module]:
        return [cast(Any, self.owner(model)).gated_cross_attn_layers[0]]


@register_adapter(Family("blip", random_model=RandomModel(prompt=words, one_a_row=True)))
class BlipAdapter(TowerStatesAdapter, FirstTokenAdapter):
    """The tower's states, CLS among them, read by cross-attention."""

    seam_path = "vision_model"
    vision_path = "vision_model"
    language_path = "text_decoder"
    projector_paths = ("vision_model.post_layernorm",)

    def answer_prompt(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
        """Its `generate` puts its own first token in the prompt's place and drops the last."""
        text = cast(Any, model).config.text_config
        ids = self.prompt_ids(arguments)
        pixels = arguments.get("pixel_values")
        if ids is None:
            if pixels is None:
                return None
            return torch.tensor([[cast(Any, model).decoder_input_ids]] * len(pixels))
        ids = ids.clone()
        ids[:, 0] = text.bos_token_id
        return ids[:, :-1]

    def generation_config(self, model: nn.Module) -> Any:
        return cast(Any, self.language_model(model)).generation_config

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        output = cast(Any, language).bert(
            input_ids=input_ids, attention_mask=mask, is_decoder=True, return_dict=True
        )
        return cast(Tensor, output.last_hidden_state)


@register_adapter(Family("git", random_model=RandomModel(prompt=words, one_a_row=True)))
class GitAdapter(FirstTokenAdapter):
    """Projected states in front of the text; frames of a video side by side."""

    seam_path = "git.visual_projection"
    top_path = "git"
    joins = "prepend"
    vision_path = "image_encoder"
    projector_paths = ("visual_projection",)
    language_path = ""
    global_token_note = "CLS of each frame"

    def frames_of(self, shown: Shown) -> list[int]:
        pixels = shown.arguments["pixel_values"]
        return [pixels.shape[1] if pixels.dim() == 5 else 1] * len(shown.units)

    def run(self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]) -> Any:
        owner = cast(Any, self.owner(model))
        passed = dict(arguments)
        pixels = passed.pop("pixel_values")
        if pixels.dim() == 4:
            return owner.visual_projection(owner.image_encoder(pixels, **passed).last_hidden_state)
        frames = [
            owner.image_encoder(frame, **passed).last_hidden_state + owner.img_temporal_embedding[i]
            for i, frame in enumerate(pixels.unbind(1))
        ]
        return owner.visual_projection(torch.cat(frames, dim=1))

    def language_modules(self, model: nn.Module) -> list[nn.Module]:
        owner = cast(Any, self.owner(model))
        return [owner.embeddings, owner.encoder, cast(Any, model).output]

    def answer_prompt(self, model: nn.Module, arguments: Mapping[str, Any]) -> Tensor | None:
        ids = self.prompt_ids(arguments)
        return ids if ids is not None else self.started(model, arguments, "bos_token_id")

    def language_entries(self, model: nn.Module) -> list[nn.Module]:
        return [cast(Any, self.owner(model)).encoder]

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        output = language(input_ids=input_ids, attention_mask=mask)
        return cast(Tensor, output.last_hidden_state)


@register_adapter(
    Family(
        "llama4",
        random_model=RandomModel(
            config={
                "vision_config.vision_output_dim": 32,
                "vision_config.projector_input_dim": 32,
                "vision_config.projector_output_dim": 32,
                "vision_config.intermediate_size": 128,
                "vision_config.patch_size": 8,
                "text_config.intermediate_size_mlp": 64,
                "text_config.no_rope_layers": [1, 0],
                "text_config.moe_layers": [1],
                "text_config.attention_chunk_size": 64,
            },
            prepare=with_image_outputs,
        ),
    )
)
class Llama4Adapter(InnerAdapter):
    """Tower states are projected after `get_image_features`, all tiles in one row."""

    seam_path = "multi_modal_projector"
    joins = "replace"
    vision_path = "vision_model"
    inputs = ("pixel_values",)

    def run(self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]) -> Any:
        states = self.tower(model)(**arguments).last_hidden_state
        return self.projector(model)(states.flatten(0, -2))

    def split(self, seam: Seam, features: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        pixels = arguments.get("pixel_values")
        return list(torch.chunk(features, 1 if pixels is None else len(pixels)))

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        return super().text_states(cast(Any, language).model, input_ids, mask)


@register_adapter(
    Family("fuyu", proven_from="5.22", random_model=RandomModel(pixels={"image": raw_patches}))
)
class FuyuAdapter(Adapter):
    """Patches projected straight into the text; there is no tower."""

    vision_path = "vision_embed_tokens"
    projector_paths = ("vision_embed_tokens",)

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        names = ("pixel_values", "image_patches")
        return (Seam("model", pixels=names, field="last_hidden_state"),)

    def seam_arguments(
        self, model: nn.Module, seam: Seam, inputs: Mapping[str, Any]
    ) -> dict[str, Any]:
        # `forward` knows the processor's name, the seam's method does not.
        named = {"pixel_values": seam.shown(inputs)}
        return super().seam_arguments(model, seam, {**inputs, **named})
