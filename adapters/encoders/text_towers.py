"""Text towers of CLIP, SigLIP and OpenCLIP: prompts as evidence about semantic codewords.

Only where the judged token lives in the space that images and texts share: `shared_encoder` gives
the image side of such a model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqguard.adapters.encoders.open_clip import as_open_clip, is_open_clip
from vqguard.adapters.encoders.transformers import TransformersEncoder, is_transformers
from vqguard.encoder import GuardedEncoder, TokenEncoder
from vqguard.errors import ConfigError, SeamError
from vqguard.judging.evidence import NEUTRAL
from vqguard.judging.prompts import text_evidence
from vqguard.judging.settings import TextEvidence
from vqguard.scopes.modes import evaluating


class TextTower(NamedTuple):
    """Texts into the space that a model's images share with them."""

    embed: Callable[[Sequence[str]], Tensor]
    """Texts -> (n, d) floating."""
    scale: float
    """The model's factor before the softmax over texts."""


def text_tower(model: nn.Module, tokenizer: Any) -> TextTower:
    """The text tower of a whole model of CLIP, SigLIP or OpenCLIP. Nothing is copied.

    `tokenizer`: the model's own; for OpenCLIP `open_clip.get_tokenizer(name)`.

    Raises:
        SeamError: for a model without one.
    """
    scale = getattr(model, "logit_scale", None)
    ours = (("encode_text", is_open_clip), ("get_text_features", is_transformers))
    for method, is_ours in ours:
        if isinstance(scale, Tensor) and is_ours(model) and hasattr(model, method):
            embed = _Embedding(model, tokenizer, method)
            return TextTower(embed, float(scale.detach().exp()))
    raise SeamError(
        f"{type(model).__name__} has no text tower: prompts need a whole model of CLIP, SigLIP or"
        " OpenCLIP (its image tower alone does not do). Give images of the categories instead"
    )


def shared_encoder(model: nn.Module, processor: Any = None) -> TokenEncoder:
    """The image side of CLIP, SigLIP or OpenCLIP, judged by the embedding that texts share.

    `processor`: transformers' image processor, if images are to be given instead of pixels.

    Raises:
        SeamError: for a model whose images share no space with texts.
    """
    if is_open_clip(model) and hasattr(model, "encode_text"):
        return as_open_clip(model)
    vision: Any = getattr(model, "vision_model", None)
    if not is_transformers(model) or vision is None or not hasattr(model, "get_text_features"):
        raise SeamError(
            f"{type(model).__name__} has no space that images and texts share: expected a whole"
            " model of CLIP, SigLIP or OpenCLIP"
        )
    projection = getattr(model, "visual_projection", nn.Identity())
    return TransformersEncoder(vision, processor, projection=projection)


def prompt_evidence(
    guarded: GuardedEncoder,
    tower: TextTower,
    prompts: Mapping[str, Sequence[str]],
    *,
    categories: Sequence[str] | None = None,
    strength: float = 5.0,
) -> TextEvidence:
    """What prompts say of the cells of a guarded encoder: `JudgeSettings(text=...)` takes it.

    Args:
        prompts: by category, `neutral` among them. An image of a category may be counted too; the
            prompts are then `strength` images more in each cell.
        categories: toxic categories of the map, in its order; those of the prompts by default.

    Raises:
        ConfigError: where the judged token is not in the space that images and texts share.
        InputError: for prompts that do not fit, as `text_evidence`.
    """
    encoder = guarded.encoder
    own = guarded.split is None and guarded.global_token is None
    if not (own and isinstance(encoder, TokenEncoder) and encoder.shares_text):
        raise ConfigError(
            "prompts say something only of tokens in the space that images and texts share, and"
            " what this encoder is judged by is not: guard shared_encoder(model) without"
            " global_token and split"
        )
    if guarded.guard.regional is not None:
        raise ConfigError(
            "prompts say something of the global judge's codewords, and this guard judges regions,"
            " whose space no text shares: use judge: global, or give images of the categories"
        )
    toxic = sorted(set(prompts) - {NEUTRAL}) if categories is None else categories
    return text_evidence(
        guarded.guard.semantic.codebook.weight,
        {name: tower.embed(list(texts)) for name, texts in prompts.items()},
        prompts,
        categories=toxic,
        scale=tower.scale,
        strength=strength,
    )


class _Embedding:
    """Texts -> (n, d), by a method of the model, in eval mode and without gradient."""

    def __init__(self, model: Any, tokenizer: Any, method: str) -> None:
        self.model, self.tokenizer, self.method = model, tokenizer, method

    def __call__(self, texts: Sequence[str]) -> Tensor:
        model = self.model
        device = next(model.parameters()).device
        with evaluating(model.modules()), torch.no_grad():
            if self.method == "encode_text":
                found = model.encode_text(self.tokenizer(list(texts)).to(device))
            else:
                # SigLIP was trained on texts of full length
                ids = self.tokenizer(
                    list(texts), padding="max_length", truncation=True, return_tensors="pt"
                )
                found = model.get_text_features(**ids.to(device))
        vectors: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return vectors
