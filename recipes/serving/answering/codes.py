"""The codes that a guarded model's language model is shown in a picture's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vqguard.adapters import visual_features
from vqguard.recipes.serving.answering.jobs import PictureCodes


@torch.no_grad()
def picture_codes(model: Any, inputs: Mapping[str, Any]) -> tuple[PictureCodes, ...]:
    """Of each picture, as `quantise` gives them; none where the guard judges alone.

    `inputs`: what the image processor returns.
    """
    if not model.vqguard.quantises:
        return ()
    features = visual_features(model, **inputs)
    return tuple(
        PictureCodes(tuple(model.vqguard.patch.encode(tokens).tolist()), layout)
        for tokens, layout in zip(features.tokens, features.unit_layouts, strict=True)
    )
