"""Stage 2, language-model adaptation: L = L_generative, everything visual is frozen.

Freezing the quantiser keeps the bottleneck stable: the language model adapts to fixed tokens. The
control runs the same class on a model without a guard.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from vqguard.recipes.trainer import StageTrainer


class Stage2Trainer(StageTrainer):
    """Trains the language model and its head."""

    stage: ClassVar[str] = "stage2"

    def trainable(self, model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
        return self.adapter.stage2_trainable(model)

    def losses(
        self, model: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        inputs.pop("caption_ids")
        inputs.pop("caption_mask")
        loss = model(**inputs, use_cache=False).loss
        return loss, {}


class ProjectorTrainer(Stage2Trainer):
    """The control's stage 1: the projector learns from the captions, without a quantiser."""

    stage: ClassVar[str] = "projector"

    def trainable(self, model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
        wanted = {id(p) for p in self.adapter.projector(model).parameters()}
        return [(name, p) for name, p in model.named_parameters() if id(p) in wanted]
