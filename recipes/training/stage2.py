"""Stage 2, language-model adaptation: L = L_generative, everything visual is frozen.

Freezing the quantiser keeps the bottleneck stable: the language model adapts to fixed tokens. The
control runs the same class on a model without a guard.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from vqguard.recipes.data.encoding import CAPTION
from vqguard.recipes.processes import is_first
from vqguard.recipes.recipe import Stage2Recipe
from vqguard.recipes.training.lora import add_lora, merge_lora, save_lora
from vqguard.recipes.training.trainer import StageTrainer

LORA = "lora"


class Stage2Trainer(StageTrainer):
    """Trains the language model and its head, or low-rank adapters in it."""

    stage: ClassVar[str] = "stage2"
    recipe: Stage2Recipe

    def trainable(self, model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
        if self.recipe.lora is None:
            return self.adapter.stage2_trainable(model)
        return add_lora(model, self.adapter, self.recipe.lora)

    def after_training(self, model: PreTrainedModel) -> None:
        lora = getattr(self.recipe, "lora", None)
        if lora is not None and lora.keep and is_first():
            save_lora(model, lora, self.folder / LORA)
        super().after_training(model)
        if lora is not None:
            merge_lora(model)

    def losses(
        self, model: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        for name in CAPTION:
            inputs.pop(name, None)
        with self.reading(inputs["labels"]):
            return self.by_tokens(model(**inputs, use_cache=False).loss), {}


class ProjectorTrainer(Stage2Trainer):
    """The control's stage 1: the projector learns from the captions, without a quantiser."""

    stage: ClassVar[str] = "projector"

    def trainable(self, model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
        wanted = {id(p) for p in self.adapter.projector(model).parameters()}
        return [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
