"""Phase one of the base model: the vision tower learns what stands where.

Real towers learn by contrast with captions on hundreds of millions of pictures. Here the layout of
each scene is known, so every patch is told its cell's glyph and the background's colour, and the
CLS token the set of glyphs, their number and the colour. The heads are thrown away afterwards.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from vqguard.recipes.tiny.glyphs import GLYPHS
from vqguard.recipes.tiny.loop import Metrics
from vqguard.recipes.tiny.model import TinySizes, normalise
from vqguard.recipes.tiny.scenes import (
    CELL_SIZE,
    COLOUR_NAMES,
    GRID,
    Scene,
    draw_batch,
    sample_scene,
)

NOTHING = len(GLYPHS)  # the class of a patch without a glyph
MOST_OBJECTS = 5


class SupervisedTower(nn.Module):
    """The tower with its training heads."""

    def __init__(self, tower: nn.Module, sizes: TinySizes) -> None:
        super().__init__()
        width = sizes.vision_width
        self.tower = tower
        self.patch_glyph = nn.Linear(width, len(GLYPHS) + 1)
        self.patch_colour = nn.Linear(width, len(COLOUR_NAMES))
        self.cls_glyphs = nn.Linear(width, len(GLYPHS))
        self.cls_count = nn.Linear(width, MOST_OBJECTS + 1)
        self.cls_colour = nn.Linear(width, len(COLOUR_NAMES))
        self.sizes = sizes

    def loss(self, scenes: list[Scene]) -> tuple[torch.Tensor, Metrics]:
        """Summed loss of a batch of scenes, and accuracies in 0..1."""
        features = tower_features(self.tower, normalise(draw_batch(scenes)))
        cls, patches = features[:, 0], features[:, 1:]
        glyphs = torch.from_numpy(np.stack([patch_labels(s, self.sizes) for s in scenes]))
        present = torch.zeros(len(scenes), len(GLYPHS))
        for row, scene in enumerate(scenes):
            present[row, [p.glyph for p in scene.placements]] = 1.0
        counts = torch.tensor([len(s.placements) for s in scenes])
        colours = torch.tensor([COLOUR_NAMES.index(s.colour) for s in scenes])

        patch_logits = self.patch_glyph(patches).flatten(0, 1)
        set_logits = self.cls_glyphs(cls)
        colour_of_patches = self.patch_colour(patches).flatten(0, 1)
        loss = (
            F.cross_entropy(patch_logits, glyphs.flatten())
            + 0.2 * F.cross_entropy(colour_of_patches, colours.repeat_interleave(patches.shape[1]))
            # Few of the labels are set: the sum over glyphs keeps their gradient from vanishing.
            + F.binary_cross_entropy_with_logits(set_logits, present, reduction="sum") / len(scenes)
            + 0.2 * F.cross_entropy(self.cls_count(cls), counts)
            + 0.2 * F.cross_entropy(self.cls_colour(cls), colours)
        )
        with torch.no_grad():
            shown = glyphs.flatten() != NOTHING
            right = patch_logits.argmax(-1) == glyphs.flatten()
            top = set_logits.topk(1).indices
            metrics = {
                "patch": right[shown].float().mean().item(),
                "cls": present.gather(1, top).mean().item(),
            }
        return loss, metrics


def tower_features(tower: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """What LLaVA selects from the tower: hidden states (B, 1 + N, d_v), CLS first."""
    output = tower(pixel_values, output_hidden_states=True, return_dict=True)
    return cast(torch.Tensor, output.hidden_states[-1])


def train_scenes(seed: int, first: int, count: int) -> list[Scene]:
    """Training scenes `first .. first + count`: one object in two of five, else up to three."""
    return [
        sample_scene("train", seed, i, objects=(1, 1) if i % 5 < 2 else (1, 3))
        for i in range(first, first + count)
    ]


@torch.no_grad()
def cache_features(
    model: LlavaForConditionalGeneration, scenes: list[Scene], batch: int = 128
) -> torch.Tensor:
    """The frozen tower's features of many scenes, float16 (n, 1 + N, d_v)."""
    rows = []
    for start in range(0, len(scenes), batch):
        pixels = normalise(draw_batch(scenes[start : start + batch]))
        rows.append(tower_features(model.model.vision_tower, pixels).to(torch.float16))
    return torch.cat(rows)


def patch_labels(scene: Scene, sizes: TinySizes) -> NDArray[np.int64]:
    """The glyph of each patch's cell, `NOTHING` where there is none: int64 (N,)."""
    side = CELL_SIZE // sizes.patch_size
    labels = np.full((GRID * side, GRID * side), NOTHING, dtype=np.int64)
    for p in scene.placements:
        row, column = (p.cell // GRID) * side, (p.cell % GRID) * side
        labels[row : row + side, column : column + side] = p.glyph
    return labels.reshape(-1)
