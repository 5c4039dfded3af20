"""Verdicts of both judges: of a guard's regional one, and of the paper's global one beside it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vqguard.errors import ArtefactError
from vqguard.files import replace_text
from vqguard.guard import VQGuard
from vqguard.recipes.image_batches import batches, image_features, pixel_count, screen_images
from vqguard.safety_map import SafetyMap, Verdict
from vqguard.text_files import read_json

GLOBAL_MAP = "global-map.json"
"""In a run's directory: the safety map of the global judge, where the guard's own is regional."""


def save_global_map(run: Path, safety_map: SafetyMap) -> None:
    """Write the global judge's map beside the model whose guard judges regions."""
    replace_text(run / GLOBAL_MAP, json.dumps(safety_map.to_dict(), indent=1) + "\n")


def read_global_map(run: Path, guard: VQGuard) -> SafetyMap | None:
    """The global judge's map of a run; None where there is none.

    Raises:
        ArtefactError: a broken file, or a map that was made for other codewords.
    """
    path = run / GLOBAL_MAP
    if not path.is_file():
        return None
    safety_map = SafetyMap.from_dict(read_json(path, ArtefactError))
    if safety_map.codebook_checksum != guard.checksum("semantic"):
        raise ArtefactError(
            f"{path} was made for another semantic codebook than the model's; remove it, or"
            " calibrate again"
        )
    return safety_map


@torch.no_grad()
def screen_with_both(
    model: Any, processor: Any, images: Iterable[Image.Image], global_map: SafetyMap | None
) -> dict[str, list[Verdict]]:
    """One verdict an image, by judge: the guard's own, and the global one's where it has a map.

    Raises:
        InputError: a picture that can be read in more than one way (`check_plain`).
    """
    guard: VQGuard = model.vqguard
    own = guard.config.judge
    model.eval()
    verdicts: dict[str, list[Verdict]] = {own: []}
    for batch in batches(images, pixel_count):
        features = image_features(model, processor, batch)
        if guard.smooths:  # its copies need the pixels
            verdicts[own] += screen_images(model, processor, batch)
        else:
            judged = guard.judge(
                features.semantic, features.semantic_mask, features.tokens, features.layouts
            )
            verdicts[own] += guard.located(judged, features.layouts, features.unit_parts)
        if global_map is not None:
            codes = guard.encode_semantic(features.semantic, features.semantic_mask)
            others = global_map.judge(codes, features.semantic_mask)
            verdicts.setdefault("global", []).extend(others)
    return verdicts
