"""The whole model in every process: one process alone, or DDP, which averages gradients.

What other engines do not do otherwise is done as here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME

from vqguard.recipes.recipe import StageRecipe


class Replicated:
    """The engine of one process, and of several where nothing else is asked for."""

    name: ClassVar[str] = "ddp"

    def __init__(self, trainer: Trainer) -> None:
        # Its `model` and `optimizer` come and change while it trains.
        self.trainer: Any = trainer

    @staticmethod
    def is_asked_for(trainer: Trainer) -> bool:
        return True

    def prepare(self, recipe: StageRecipe) -> None:
        pass

    def before_training(self, model: nn.Module) -> None:
        pass

    def after_backward(self) -> None:
        pass

    def trained_model(self, model: nn.Module) -> Any:
        return self.trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def write(self, parameter: torch.Tensor, values: torch.Tensor) -> None:
        parameter.copy_(values)

    def run_part(
        self, model: nn.Module, function: Callable[..., torch.Tensor], *arguments: Any
    ) -> torch.Tensor:
        return function(model, *arguments)

    def restart_rows(
        self, parameter: nn.Parameter, rows: torch.Tensor, states: Iterable[str]
    ) -> None:
        optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
        for name in states:
            values = optimizer.state.get(parameter, {}).get(name)
            if values is not None:
                values[rows] = 0

    @property
    def states_file(self) -> str:
        return str(OPTIMIZER_NAME)

    def save_states(self, folder: Path) -> None:
        if self.trainer.args.should_save:
            torch.save(self.trainer.optimizer.state_dict(), folder / self.states_file)

    def load_states(self, folder: Path) -> None:
        states = torch.load(folder / self.states_file, map_location="cpu", weights_only=True)
        self.trainer.optimizer.load_state_dict(states)
