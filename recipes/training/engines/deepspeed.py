"""Models trained by DeepSpeed's ZeRO, stages 1 and 2.

Gradients and the optimiser's states are cut into one part a process, weights are whole in each.

What is stepped is a float32 copy of the trained weights, cut into parts as well, and it is written
over the weights after each step. Whoever sets a weight must therefore set the copy.

DeepSpeed is used as a wrapper of Accelerate's like any other: checkpoints of its own are pickles,
and hold the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import nn
from transformers import Trainer

from vqguard.distributed import rank_and_world
from vqguard.errors import ConfigError
from vqguard.recipes.recipe import StageRecipe
from vqguard.recipes.training.engines.replicated import Replicated


class Partitioned(Replicated):
    """DeepSpeed's ZeRO, stages 1 and 2."""

    name: ClassVar[str] = "deepspeed"

    @staticmethod
    def is_asked_for(trainer: Trainer) -> bool:
        return trainer.is_deepspeed_enabled

    def prepare(self, recipe: StageRecipe) -> None:
        prepare_partitions(self.trainer.accelerator.state.deepspeed_plugin, bf16=recipe.bf16)
        # Else the trainer would leave checkpoints to DeepSpeed.
        self.trainer.is_deepspeed_enabled = False

    def trained_model(self, model: nn.Module) -> Any:
        trained = super().trained_model(model)
        release(trained)
        return trained

    def restart_rows(
        self, parameter: nn.Parameter, rows: torch.Tensor, states: Iterable[str]
    ) -> None:
        set_rows(self.trainer.optimizer, parameter, rows, states)

    @property
    def states_file(self) -> str:
        rank, world = rank_and_world()
        return f"optimizer-{rank}-of-{world}.pt"

    def save_states(self, folder: Path) -> None:
        torch.save(_inner(self.trainer.optimizer).state_dict(), folder / self.states_file)

    def load_states(self, folder: Path) -> None:
        states = torch.load(folder / self.states_file, weights_only=True)
        _inner(self.trainer.optimizer).load_state_dict(states)


def prepare_partitions(plugin: Any, *, bf16: bool) -> None:
    """Check Accelerate's DeepSpeed settings, and have bfloat16 as autocast does it.

    DeepSpeed's own bfloat16 would round every parameter, codebooks included; codes and verdicts
    would be others.

    Raises:
        ConfigError: a setting under which a guarded model cannot be trained.
    """
    if plugin.zero_stage not in (1, 2):
        raise ConfigError(
            f"DeepSpeed's zero_stage: expected 1 or 2, got {plugin.zero_stage}. Stage 3 takes "
            "codebooks apart, and codes are looked up in whole ones: use FSDP. For 0 use DDP."
        )
    settings: dict[str, Any] = plugin.deepspeed_config
    if settings.get("fp16", {}).get("enabled") is True:
        raise ConfigError(
            "DeepSpeed's fp16 would round codebooks: take it out of its settings; the recipe's "
            "bf16 decides"
        )
    settings.pop("bf16", None)
    if bf16:
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


@torch.no_grad()
def set_rows(
    optimizer: Any, parameter: nn.Parameter, rows: torch.Tensor, states: Iterable[str]
) -> None:
    """Take rows of a parameter that were set over into the copy that is stepped.

    These states of the optimiser become zero there.

    Every process does so for its own part. DeepSpeed's functions for it know the states of the
    first group of parameters alone (0.19.8).

    Args:
        optimizer: Accelerate's around DeepSpeed's.
        parameter: (n, d).
        rows: (n,) bool.
        states: as in `exp_avg`.
    """
    part = cast(Any, parameter)._hp_mapping
    if part is None:  # all of it is other processes'
        return
    here, copied = part.lp_fragment_address, part.hp_fragment_address
    chosen = rows.repeat_interleave(parameter.shape[1])[here.start : here.start + here.numel]
    values = parameter.flatten()[here.start : here.start + here.numel]
    there = chosen.to(part.hp_fragment.device)  # the processor, where states are offloaded
    part.hp_fragment[there] = values[chosen].to(part.hp_fragment)
    inner = _inner(optimizer)
    (whole,) = inner.param_groups[part.param_group_index]["params"]
    for name in states:
        inner.state[whole][name].narrow(0, copied.start, copied.numel)[there] = 0


def release(model: nn.Module) -> None:
    """Let go of DeepSpeed's copies and states when a stage has ended."""
    for parameter in model.parameters():
        if hasattr(parameter, "_hp_mapping"):
            parameter.data = parameter.data.clone()  # it was a piece of one long tensor
            vars(parameter).clear()


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser of torch inside of DeepSpeed's, inside of Accelerate's."""
    inner: torch.optim.Optimizer = optimizer.optimizer.optimizer
    return inner
