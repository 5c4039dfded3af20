"""LLaVA's successors: tiles, newline tokens, videos.

Read from transformers' `models/llava_next`, `llava_next_video`, `llava_onevision`, `video_llava`
and `vipllava`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from vqguard.adapters.families.family import Family, RandomModel
from vqguard.adapters.families.llava import ClsAdapter
from vqguard.adapters.families.registration import register_adapter
from vqguard.adapters.features import Shown, Site
from vqguard.adapters.random_inputs.pixels import tiles
from vqguard.adapters.seams import Seam, equal_parts, find_seams, submodule
from vqguard.judging.verdict import Part
from vqguard.regional.layout import Layout, grid_of, holds

PINPOINTS = [[32, 64], [64, 32], [64, 64]]
"""Of a tiny random model: pictures of two tiles, and of four."""


def _tiling() -> Any:
    """Where the family says how a picture is cut into tiles."""
    # A model's module: heavy, and only this family's pictures need it.
    from transformers.models.llava_next import modeling_llava_next

    return modeling_llava_next


class TiledAdapter(ClsAdapter):
    """An image is a small version of the whole and tiles of it; newline tokens end its rows.

    Global tokens: the CLS token of the small version and of each tile, of each frame of a video;
    the worst counts (docs/decisions, 0024 and 0095). Towers without one: the mean of each tile's
    tokens as they leave the projector, before they are laid out by row and cropped.
    """

    static_parameters: ClassVar[tuple[str, ...]] = ("image_newline",)
    global_token_note = "CLS of the whole picture and of each tile, of each frame; else mean"

    def tiles(self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]) -> list[int]:
        """How many pictures the tower is shown for each unit."""
        pixels = seam.shown(arguments)
        if seam.modality == "video":
            return [pixels.shape[1]] * len(pixels)
        sizes = arguments.get("image_sizes")
        if sizes is None:
            return [1] * len(pixels)
        config = cast(Any, model).config
        return [
            _tiling().image_size_to_num_patches(
                image_size=size,
                grid_pinpoints=config.image_grid_pinpoints,
                patch_size=config.vision_config.image_size,
            )
            for size in sizes
        ]

    def global_token(self, shown: Shown) -> Tensor | list[Tensor]:
        if self.has_global_token(shown.model) or shown.seam.modality == "video":
            return super().global_token(shown)
        if shown.site == "encoder":
            counts = self.tiles(shown.model, shown.seam, shown.arguments)
            return [
                torch.stack([tile.mean(0) for tile in equal_parts(unit, count)])
                for unit, count in zip(shown.units, counts, strict=True)
            ]
        return self.by_unit(shown, self.projected_tiles(shown).mean(1, keepdim=True))

    def layouts(self, shown: Shown) -> Sequence[Layout | None]:
        pixels = shown.seam.shown(shown.arguments)
        if shown.seam.modality == "video" or not isinstance(pixels, Tensor) or pixels.dim() != 5:
            return super().layouts(shown)
        sizes = shown.arguments.get("image_sizes")
        counts = self.tiles(shown.model, shown.seam, shown.arguments)
        found: list[Layout | None] = []
        for picture, (unit, count) in enumerate(zip(shown.units, counts, strict=True)):
            layout: Layout | None
            if shown.site == "encoder":
                tile = grid_of(len(unit) // count, *pixels.shape[-2:])
                layout = None if tile is None else (tile,) * count
            else:
                layout = None if sizes is None else self._packed(shown, sizes[picture], count)
            found.append(layout if layout is not None and holds(layout, len(unit)) else None)
        return found

    def part(self, seam: Seam, site: Site, layout: Layout | None) -> Part:
        """Packed tiles make one grid of the whole picture, as the small version is one."""
        packed = site == "projected" and seam.modality != "video" and layout is not None
        return "picture" if packed else super().part(seam, site, layout)

    def _packed(self, shown: Shown, size: Any, count: int) -> Layout:
        """The small version, and all tiles as one grid without its padding (`unpad_image`)."""
        config = cast(Any, shown.model).config
        vision = config.vision_config
        side = int(vision.image_size) // int(vision.patch_size)
        whole = (side, side)
        if count == 1:
            return (whole,)
        down, across = _tiling().get_anyres_image_grid_shape(
            size, config.image_grid_pinpoints, int(vision.image_size)
        )
        rows, columns = int(down) * side, int(across) * side
        height, width = (int(length) for length in size)
        if width / height > columns / rows:
            kept = int(round(height * (columns / width), 7))
            rows -= 2 * ((rows - kept) // 2)
        else:
            kept = int(round(width * (rows / height), 7))
            columns -= 2 * ((columns - kept) // 2)
        return (whole, (rows, columns))

    def projected_tiles(self, shown: Shown) -> Tensor:
        """(tiles, N, d): what the projector makes of each tile."""
        patches = self.selected(shown.model, shown.output, shown.arguments)
        return cast(Tensor, self.projector(shown.model)(self.cropped(shown, patches)))

    def cropped(self, shown: Shown, states: Tensor) -> Tensor:
        """States of the tower (tiles, N, d_v) without the row that the family leaves out."""
        strategy = shown.arguments.get("vision_feature_select_strategy")
        if strategy is None:
            strategy = cast(Any, shown.model).config.vision_feature_select_strategy
        return states[:, 1:] if strategy == "default" else states

    def by_unit(self, shown: Shown, rows: Tensor) -> list[Tensor]:
        counts = self.tiles(shown.model, shown.seam, shown.arguments)
        return list(torch.split(rows[:, 0], counts))

    def encoder_units(
        self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any], features: Tensor
    ) -> list[Tensor]:
        parts = torch.split(features, self.tiles(model, seam, arguments))
        return [part.flatten(0, 1) for part in parts]


_TILED = RandomModel(config={"image_grid_pinpoints": PINPOINTS}, pixels={"image": tiles})


@register_adapter(
    Family(
        "llava_next",
        checkpoints={
            "llava-next": "llava-hf/llava-v1.6-mistral-7b-hf",
            "llava-next-7b": "llava-hf/llava-v1.6-mistral-7b-hf",
            "llava-next-13b": "llava-hf/llava-v1.6-vicuna-13b-hf",
            "llava-next-8b": "llava-hf/llama3-llava-next-8b-hf",
        },
        random_model=_TILED,
    )
)
class LlavaNextAdapter(TiledAdapter):
    """`LlavaNextForConditionalGeneration`."""


@register_adapter(
    Family(
        "llava_next_video",
        checkpoints={"llava-next-video": "llava-hf/LLaVA-NeXT-Video-7B-hf"},
        proven_from="5.20",
        random_model=_TILED,
    )
)
class LlavaNextVideoAdapter(TiledAdapter):
    """Videos are pooled after the tower: before it, at site "encoder", frames are whole."""


@register_adapter(
    Family(
        "llava_onevision",
        checkpoints={"llava-onevision": "llava-hf/llava-onevision-qwen2-7b-ov-hf"},
        proven_from="5.20",
        random_model=RandomModel(
            config={"image_grid_pinpoints": PINPOINTS, "vision_config.vision_use_head": False},
            pixels={"image": tiles},
        ),
    )
)
class LlavaOnevisionAdapter(TiledAdapter):
    """A SigLIP tower without CLS token: means are judged. Videos are pooled after the projector."""

    pointwise = ("image",)

    def tiles(self, model: nn.Module, seam: Seam, arguments: Mapping[str, Any]) -> list[int]:
        numbers = arguments.get("batch_num_images")
        if seam.modality == "video" or numbers is None:
            return super().tiles(model, seam, arguments)
        # As the family does: images of a row with several are not cut into tiles.
        alone = [count == 1 for count in torch.as_tensor(numbers).tolist() for _ in range(count)]
        counts = super().tiles(model, seam, arguments)
        return [count if tiled else 1 for count, tiled in zip(counts, alone, strict=True)]


@register_adapter(
    Family(
        "vipllava",
        checkpoints={"vip-llava": "llava-hf/vip-llava-7b-hf"},
        proven_from="5.23",
        random_model=RandomModel(config={"vision_feature_layer": [-1, -2]}),
    )
)
class VipLlavaAdapter(ClsAdapter):
    """Several layers of the tower side by side, in `vision_feature_layers`."""

    tokenwise = True


@register_adapter(
    Family(
        "video_llava",
        checkpoints={"video-llava": "LanguageBind/Video-LLaVA-7B-hf"},
        proven_from="5.22",
    )
)
class VideoLlavaAdapter(TiledAdapter):
    """One tower for images, one for videos, one projector for both.

    Pictures are not tiled; the frames of a video are one unit.
    """

    vision_path = "image_tower"
    static_parameters = ()
    global_token_note = "CLS, of each frame; else mean"

    def seams(self, model: nn.Module) -> tuple[Seam, ...]:
        return find_seams(model)

    def split(self, seam: Seam, features: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
        pixels = seam.shown(arguments)
        if seam.modality == "image" or pixels is None:
            return super().split(seam, features, arguments)
        return list(features.reshape(len(pixels), -1, features.shape[-1]))

    def watched(self, model: nn.Module, seam: Seam) -> nn.Module:
        name = "image_tower" if seam.modality == "image" else "video_tower"
        return submodule(self.owner(model), name, "vision encoder")

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        owner = self.owner(model)
        return [submodule(owner, name, "vision encoder") for name in ("image_tower", "video_tower")]
