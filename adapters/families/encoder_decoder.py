"""Families whose visual features are the input or the output of an encoder, and Kosmos.

Read from transformers' `models/pix2struct`, `udop`, `florence2`, `t5gemma2`, `pp_formulanet`,
`vision_encoder_decoder`, `kosmos2` and `kosmos2_5`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.families.default import DefaultAdapter
from vqguard.adapters.families.forward_seams import FirstTokenAdapter, InnerAdapter
from vqguard.adapters.families.llava_next import TiledAdapter
from vqguard.adapters.features import Shown, Site
from vqguard.adapters.registration import register_adapter
from vqguard.adapters.seams import Seam, means


class PatchesAdapter(InnerAdapter):
    """Flattened patches, the first two numbers of each its row and column (0: padding)."""

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return (
            Seam(
                self.seam_path,
                "forward",
                pixels=("flattened_patches",),
                field=self.seam_field,
                joins=self.joins,
            ),
        )

    def redraw(self, name: str, pixels: Any, generator: torch.Generator) -> Any:
        noise = super().redraw(name, pixels, generator)
        return torch.cat([pixels[..., :2], noise[..., 2:]], dim=-1)


@register_adapter("pix2struct")
class Pix2StructAdapter(PatchesAdapter):
    """The encoder's states, read by the decoder; padding is left out of the mean that is judged."""

    seam_path = "encoder"
    seam_field = "last_hidden_state"
    joins = "encode"
    inputs = ("flattened_patches", "attention_mask")
    vision_path = "encoder"
    projector_paths = ("encoder.layernorm",)
    language_path = "decoder"

    def width(self, model: nn.Module, site: Site) -> int:
        self.require_site(site)
        return int(cast(Any, model).config.vision_config.hidden_size)

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        tower = cast(Any, self.tower(model))
        return [tower.embeddings, tower.encoder]

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


@register_adapter("vision-encoder-decoder")
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
        found = cast(Any, model)
        return [found.enc_to_dec_proj] if hasattr(found, "enc_to_dec_proj") else parts[-1:]

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


@register_adapter("pp_formulanet")
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


@register_adapter("udop")
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


@register_adapter("florence2", "t5gemma2")
class EncodedAdapter(DefaultAdapter):
    """Features in the place of placeholders, in the input of a text encoder."""

    def language_entries(self, model: nn.Module) -> list[nn.Module]:
        found = self.language_model(model)
        return [cast(Any, found).encoder if hasattr(found, "encoder") else found]

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        reader = cast(Any, language)
        encoder = reader.get_encoder() if hasattr(reader, "encoder") else reader
        output = encoder(input_ids=input_ids, attention_mask=mask)
        return cast(Tensor, output.last_hidden_state)


@register_adapter("kosmos-2", "kosmos-2.5")
class KosmosAdapter(DefaultAdapter):
    """Features at the positions of a mask; `generate` is the text model's."""

    vision_path = "vision_model"
    projector_paths = ("image_to_text_projection",)
    language_path = "text_model"

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        found = super().seams(model)[0]
        return (Seam("", pixels=found.pixels, joins="prepend"),)

    def width(self, model: nn.Module, site: Site) -> int:
        self.require_site(site)
        return int(cast(Any, model).config.text_config.embed_dim)

    def redraw(self, name: str, pixels: Any, generator: torch.Generator) -> Any:
        noise = super().redraw(name, pixels, generator)
        if name != "flattened_patches":
            return noise
        return torch.cat([pixels[..., :2], noise[..., 2:]], dim=-1)

    def generation_config(self, model: nn.Module) -> Any:
        return cast(Any, self.language_model(model)).generation_config

    def text_states(self, language: nn.Module, input_ids: Tensor, mask: Tensor) -> Tensor:
        output = cast(Any, language).model(input_ids=input_ids, attention_mask=mask)
        return cast(Tensor, output.last_hidden_state)


@register_adapter("granite_docling")
class GraniteDoclingAdapter(DefaultAdapter):
    """Deep-stack features of a connector, added inside the text model."""

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return tuple(replace(seam, deep="deepstack_features") for seam in super().seams(model))

    def deep_levels(self, model: nn.Module) -> int:
        return len(cast(Any, model).config.vision_config.deepstack_visual_indexes)


@register_adapter("granite4_vision")
class GraniteVisionAdapter(TiledAdapter):
    """All features are deep-stack: one list of images for each layer of the text that they join.

    One codebook serves all layers; a unit is an image with the features of every layer in a row.
    """

    sites = ("projected",)
    global_token_note = "mean"

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return (replace(super().seams(model)[0], field="deepstack_features"),)

    def projectors(self, model: nn.Module) -> list[nn.Module]:
        owner = cast(Any, self.owner(model))
        names = ("layerwise_projectors", "spatial_projectors")
        return [getattr(owner, name) for name in names if getattr(owner, name, None) is not None]

    def split(self, seam: Seam, features: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*(images for _, images in features), strict=True)]

    def join(self, seam: Seam, like: Any, units: list[Tensor]) -> Any:
        parts = [torch.chunk(unit, len(like)) for unit in units]
        return [(layer, [one[i] for one in parts]) for i, (layer, _) in enumerate(like)]

    def global_token(self, shown: Shown) -> Tensor:
        return means(list(shown.units))

    def positions(self, model: nn.Module, counts: list[int]) -> list[int]:
        config = cast(Any, model).config
        layers = len(config.deepstack_layer_map) + len(config.spatial_target_layers)
        return [count // layers for count in counts]
