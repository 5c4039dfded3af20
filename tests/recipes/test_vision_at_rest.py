"""A frozen vision encoder with batch normalisation: neither stage may move its statistics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vqguard.errors import FrozenTensorMovedError
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.recipe import Stage1Recipe, Stage2Recipe
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training import trainer as trainer_module
from vqguard.recipes.training.stage1 import Stage1Trainer
from vqguard.recipes.training.stage2 import Stage2Trainer


class Normalised(nn.Module):
    """Batch normalisation of pixels, as convolutional encoders have it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.norm = inner, nn.BatchNorm2d(3)

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.inner(self.norm(pixels))

    @property
    def weight(self) -> Any:
        return self.inner.weight


def with_batch_norm(make: Any) -> tuple[Any, Any, nn.BatchNorm2d]:
    model, processor = make()
    embeddings = model.model.vision_tower.embeddings
    embeddings.patch_embedding = Normalised(embeddings.patch_embedding)
    norm = embeddings.patch_embedding.norm.eval()
    return model, processor, norm


def run_both(
    model: Any, processor: Any, folder: Path, one: Stage1Recipe, two: Stage2Recipe
) -> None:
    world = TinyWorld(0)
    first = EncodedSamples(world.captions(8), processor, one.max_length)
    Stage1Trainer(model, one, first, folder / "stage1", seed=0).run(resume=False)
    second = EncodedSamples(world.instructions(8), processor, two.max_length)
    Stage2Trainer(model, two, second, folder / "stage2", seed=0).run(resume=False)


@pytest.mark.parametrize("bf16", [False, True])
def test_statistics_stay(
    small_guarded: Any,
    stage1_recipe: Stage1Recipe,
    stage2_recipe: Stage2Recipe,
    tmp_path: Path,
    bf16: bool,
) -> None:
    model, processor, norm = with_batch_norm(small_guarded)
    before = {name: tensor.clone() for name, tensor in norm.state_dict().items()}
    one = replace(stage1_recipe, samples=8, bf16=bf16)
    two = replace(stage2_recipe, samples=8, bf16=bf16)
    run_both(model, processor, tmp_path, one, two)
    for name, tensor in norm.state_dict().items():
        assert torch.equal(tensor.to(before[name].dtype), before[name]), name


def test_statistics_that_move_stop_the_run(
    small_guarded: Any,
    stage1_recipe: Stage1Recipe,
    stage2_recipe: Stage2Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor, _ = with_batch_norm(small_guarded)
    monkeypatch.setattr(trainer_module, "vision_at_rest", lambda *_: None)
    with pytest.raises(FrozenTensorMovedError, match="running_mean"):
        run_both(model, processor, tmp_path, stage1_recipe, stage2_recipe)
