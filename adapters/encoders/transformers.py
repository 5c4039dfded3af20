"""transformers' vision models as encoders: their last hidden state, their pooled output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel

from vqguard.adapters.encoders.timm import TimmEncoder
from vqguard.adapters.encoders.token_layout import flatten_map, prefix_count
from vqguard.adapters.hub_ids import hint, hub_id, not_a_folder
from vqguard.adapters.sizes.built import opening
from vqguard.adapters.sizes.pictures import open_processor
from vqguard.encoder import EncoderFeatures, TokenEncoder, mean_token
from vqguard.errors import ArtefactError, SeamError


class TransformersEncoder(TokenEncoder):
    """A vision model of transformers, called with `pixel_values`.

    Visual tokens are `last_hidden_state` without what stands before the grid. The global token is
    `pooler_output`; without one (`pooled=False`, or a model that has none) the first class token;
    without that the mean.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any = None,
        pooled: bool = True,
        projection: nn.Module | None = None,
    ) -> None:
        """`processor`: the model's image processor, if images are to be given instead of pixels.

        `projection`: takes `pooler_output` into the space that images and texts share.
        """
        super().__init__()
        self.projection = projection
        self.shares_text = pooled and projection is not None
        self.model = model
        self.pooled = pooled
        self.preprocess = None if processor is None else _Processed(processor)
        config: Any = getattr(model, "config", None)
        size = _pair(getattr(config, "image_size", None)) or (224, 224)
        self.input_shape = (int(getattr(config, "num_channels", 3) or 3), *size)
        patch = _pair(getattr(config, "patch_size", None))
        self._patch = patch[0] if patch and patch[0] == patch[1] else None

    def forward(self, pixels: Tensor) -> EncoderFeatures:
        """Pixels (B, C, H, W) -> features.

        Raises:
            SeamError: for a layout that cannot be told.
        """
        output: Any = self.model(pixel_values=pixels, return_dict=True)
        hidden, pooled = output.last_hidden_state, getattr(output, "pooler_output", None)
        if hidden.dim() == 4:
            width = hidden.shape[1] if pooled is None else pooled.flatten(1).shape[1]
            tokens = flatten_map(hidden, width, channels_last=False)
            prefix = tokens[:, :0]
        elif hidden.dim() == 3:
            size = (pixels.shape[-2], pixels.shape[-1])
            count = prefix_count(hidden.shape[1], size, self._patch)
            tokens, prefix = hidden[:, count:], hidden[:, :count]
        else:
            raise SeamError(
                f"{type(self.model).__name__} returns a last hidden state {tuple(hidden.shape)}, "
                "not tokens or a feature map; give a callable that returns tokens"
            )
        if self.pooled and pooled is not None:
            semantic = pooled.flatten(1)
            if self.projection is not None:
                semantic = self.projection(semantic)
            return EncoderFeatures(tokens, semantic[:, None], prefix)
        if self.projection is not None:
            raise SeamError(f"{type(self.model).__name__} has no pooled output to be projected")
        semantic = prefix[:, :1] if prefix.shape[1] else mean_token(tokens)
        return EncoderFeatures(tokens, semantic, prefix)


def make_transformers(name: str, pretrained: bool) -> TokenEncoder:
    """The vision model of a local folder or `hub:owner/name`, with its image processor.

    Weights must be safetensors and code from the hub is refused. A part whose weights are not in
    the checkpoint would stay random: a pooling layer is then left alone and the class token judged,
    anything else is refused with `ArtefactError`.
    """
    if not pretrained:
        raise ArtefactError(
            "a transformers name always brings its weights; for random ones make the model from "
            "its config and pass the model"
        )
    wanted = hub_id(name)
    if wanted is None and not Path(name).is_dir():
        raise ArtefactError(
            f"a transformers vision model cannot be loaded: no folder at {name!r}{hint(name)}"
        )
    name = not_a_folder(wanted) if wanted is not None else name
    try:
        with opening(name):
            model, report = AutoModel.from_pretrained(
                name, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        processor = open_processor(name, AutoImageProcessor)
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{name!r} cannot be loaded as a transformers vision model: {error}"
        ) from error
    absent = sorted(report["missing_keys"])
    vision = vision_part(model)
    inside = next(
        (f"{path}." for path, part in model.named_modules() if part is vision and path), ""
    )
    absent = [key.removeprefix(inside) for key in absent if key.startswith(inside)]
    others = [key for key in absent if not key.startswith("pooler.")]
    if others:
        raise ArtefactError(
            f"{name!r} has no weights for {', '.join(others[:4])}; they would stay random, and the "
            "guard would judge noise. Use a complete checkpoint"
        )
    return as_transformers(vision, processor, pooled=not absent)


def as_transformers(model: nn.Module, processor: Any = None, pooled: bool = True) -> TokenEncoder:
    """A model object: a vision model, or one with a `vision_model` (CLIP, SigLIP). Not copied."""
    vision = vision_part(model)
    inner = getattr(vision, "timm_model", None)
    if isinstance(inner, nn.Module):
        return TimmEncoder(inner)
    return TransformersEncoder(vision, processor, pooled)


def is_transformers(model: object) -> bool:
    """Whether this is a model of transformers."""
    return isinstance(model, PreTrainedModel)


def vision_part(model: nn.Module) -> nn.Module:
    """`model` itself if it takes pixels alone, or its `vision_model`; else `SeamError`."""
    if isinstance(getattr(model, "vision_model", None), nn.Module) and hasattr(
        model, "get_text_features"
    ):
        return model.vision_model  # type: ignore[return-value]
    if getattr(model, "main_input_name", None) != "pixel_values":
        raise SeamError(
            f"{type(model).__name__} is no vision model (it takes "
            f"{getattr(model, 'main_input_name', 'unknown inputs')}); guard a whole multimodal "
            "model with guard_model"
        )
    return model


class _Processed:
    """One image -> pixels (C, H, W), by a transformers image processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Tensor:
        pixels: Tensor = torch.as_tensor(
            self.processor(images=image, return_tensors="pt")["pixel_values"]
        )
        return pixels[0]


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None
