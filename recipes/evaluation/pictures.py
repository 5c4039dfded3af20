"""Pictures of the report: a scene with its code map, and adversarial images."""

from __future__ import annotations

import colorsys
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image

from vqguard.files import replace_files
from vqguard.recipes.image_batches import image_features

FOLDER = "pictures"
_SIDE = 288


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture, whole or not at all; its folder is made if missing. Raises OSError.

    A link by its name is replaced: what it leads to stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    image.save(content, "PNG")
    replace_files({path: content.getvalue()})


def save_scene(run: Path, image: Image.Image) -> Path:
    """Write one clean scene; returns its path."""
    path = run / FOLDER / "scene.png"
    save_png(image, path)
    return path


@torch.no_grad()
def code_map(run: Path, model: Any, processor: Any, image: Image.Image) -> list[dict[str, str]]:
    """The image beside its patch codes, one colour a code: equal colours are equal codewords."""
    features = image_features(model, processor, [image])
    codes = model.vqguard.patch.encode(features.tokens[0]).cpu().numpy()
    side = int(len(codes) ** 0.5)
    if side * side != len(codes):
        return []
    colours = np.array([_colour(int(code)) for code in codes], dtype=np.uint8)
    grid = Image.fromarray(rearrange(colours, "(h w) c -> h w c", h=side))
    both = Image.new("RGB", (2 * _SIDE + 8, _SIDE), "white")
    both.paste(image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (0, 0))
    both.paste(grid.resize((_SIDE, _SIDE), Image.Resampling.NEAREST), (_SIDE + 8, 0))
    path = run / FOLDER / "code-map.png"
    save_png(both, path)
    distinct = len(set(codes.tolist()))
    caption = (
        f"A scene and its code map: {len(codes)} visual tokens become {distinct} distinct "
        "codewords; equal colours are equal codewords."
    )
    return [{"file": f"{FOLDER}/{path.name}", "caption": caption}]


def adversarial(run: Path, images: Mapping[str, torch.Tensor]) -> list[dict[str, str]]:
    """One adversarial image an attack, as the model saw it: float32 (3, H, W) in [0, 1]."""
    shown = []
    for number, (label, pixels) in enumerate(images.items()):
        array = (rearrange(pixels.numpy(), "c h w -> h w c") * 255).round().astype(np.uint8)
        path = run / FOLDER / f"adversarial-{number:02d}.png"
        side = (_SIDE * 2 // 3,) * 2
        save_png(Image.fromarray(array).resize(side, Image.Resampling.NEAREST), path)
        shown.append({"file": f"{FOLDER}/{path.name}", "caption": label})
    return shown


def _colour(code: int) -> tuple[int, int, int]:
    # Steps of the golden ratio spread any set of codes over the colour circle.
    hue = (code * 0.618034) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.45 + 0.5 * ((code * 7) % 10) / 10, 0.9)
    return int(red * 255), int(green * 255), int(blue * 255)
