"""Models whose weights FSDP2 has cut into shards, one for each process (torch's `fully_shard`).

The guard is left whole in every process: mixed precision would round its codebooks, and codes and
verdicts with them; and entries are counted and revived as rows. Its gradients are averaged here.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import (
    OPTIMIZER_NAME,
    DistributedType,
    FullyShardedDataParallelPlugin,
    load_fsdp_optimizer,
    save_fsdp_optimizer,
)
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from vqguard.distributed import rank_and_world
from vqguard.errors import ConfigError
from vqguard.recipes.recipe import StageRecipe
from vqguard.recipes.training.engines.replicated import Replicated


class Sharded(Replicated):
    """FSDP2. The model that was trained is another object than the given one, on the CPU."""

    name: ClassVar[str] = "fsdp"

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._skeleton: nn.Module | None = None

    @staticmethod
    def is_asked_for(trainer: Trainer) -> bool:
        return trainer.is_fsdp_enabled or is_asked_of_processors(trainer.accelerator)

    def prepare(self, recipe: StageRecipe) -> None:
        if recipe.nf4:
            raise ConfigError(
                "FSDP does not share out weights of 4 bits: set nf4 to false, or train by DDP"
            )
        if not self.trainer.is_fsdp_enabled:
            shard_on_processors(self.trainer.accelerator)
            self.trainer.is_fsdp_enabled = True
        prepare_sharding(self._plugin, self.trainer.model)

    def before_training(self, model: nn.Module) -> None:
        self._skeleton = skeleton_of(model)

    def after_backward(self) -> None:
        guard: Any = getattr(self.trainer.model, "vqguard", nn.Module())
        average_gradients(guard.parameters())

    def trained_model(self, model: nn.Module) -> Any:
        if self._skeleton is None:
            return super().trained_model(model)
        fill(self._skeleton, model)
        return self._skeleton

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return whole(tensor)

    def write(self, parameter: torch.Tensor, values: torch.Tensor) -> None:
        write(parameter, values)

    def run_part(
        self, model: nn.Module, function: Callable[..., torch.Tensor], *arguments: Any
    ) -> torch.Tensor:
        # As a method of the model's, before which FSDP gathers weights as before `forward`.
        name = function.__name__
        if name not in vars(model):
            setattr(model, name, functools.partial(function, model))
            register_fsdp_forward_method(model, name)
        result: torch.Tensor = getattr(model, name)(*arguments)
        return result

    @property
    def states_file(self) -> str:
        return f"{OPTIMIZER_NAME}.bin"

    def save_states(self, folder: Path) -> None:
        # The trainer would write the whole model a second time.
        trainer = self.trainer
        save_fsdp_optimizer(
            self._plugin, trainer.accelerator, trainer.optimizer, trainer.model, str(folder)
        )

    def load_states(self, folder: Path) -> None:
        trainer = self.trainer
        load_fsdp_optimizer(
            self._plugin, trainer.accelerator, trainer.optimizer, trainer.model, str(folder)
        )

    @property
    def _plugin(self) -> Any:
        return self.trainer.accelerator.state.fsdp_plugin


def prepare_sharding(plugin: Any, model: nn.Module) -> None:
    """Check accelerate's FSDP settings and leave the guard, if any, out of the sharding.

    Raises:
        ConfigError: for settings under which a guarded model cannot be trained.
    """
    problems = []
    if plugin.fsdp_version != 2:
        problems.append(f"fsdp_version: expected 2, got {plugin.fsdp_version}")
    if "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        problems.append(f"fsdp_state_dict_type: expected FULL_STATE_DICT, {plugin.state_dict_type}")
    if plugin.activation_checkpointing:
        problems.append(
            "fsdp_activation_checkpointing: expected false; set gradient_checkpointing in the "
            "recipe's stage"
        )
    if not hasattr(Trainer, "_mixed_mesh_grad_norm"):
        problems.append("transformers: its Trainer clips no gradients beside shards; 5.24 does")
    if problems:
        raise ConfigError("FSDP: " + "; ".join(problems))
    plugin.cpu_ram_efficient_loading = False
    guard = getattr(model, "vqguard", None)
    plugin.ignored_modules = [] if guard is None else [guard]
    if plugin.transformer_cls_names_to_wrap is None:
        # A model's own list names layers of parts that it may not have (CLIP's text side), and
        # accelerate stops at the first of them.
        there = {type(module).__name__ for module in model.modules()}
        listed = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = sorted(there & set(listed))


def is_asked_of_processors(accelerator: Any) -> bool:
    """Whether FSDP was asked for where accelerate would quietly use DDP: without a GPU."""
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return wanted and accelerator.state.distributed_type is DistributedType.MULTI_CPU


def shard_on_processors(accelerator: Any) -> None:
    """Turn on FSDP2 there."""
    state = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    state.distributed_type = DistributedType.FSDP


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that every process holds whole; a collective call."""
    world = rank_and_world()[1]
    for parameter in parameters:
        if parameter.grad is not None and world > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of a sharded one; then a collective call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def write(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values` into a tensor that may be sharded; then a collective call."""
    if isinstance(target, DTensor):
        values = values.to(device=target.device, dtype=target.dtype)
        target.copy_(distribute_tensor(values, target.device_mesh, target.placements))
    else:
        target.copy_(values)


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of the model without its weights, to be filled when the model has been trained."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


@torch.no_grad()
def fill(skeleton: nn.Module, model: nn.Module) -> None:
    """Put the whole weights of a sharded model into its skeleton, in every process."""
    trained = dict(model.named_parameters())
    filled: dict[int, nn.Parameter] = {}
    for name, empty in skeleton.named_parameters():
        values = whole(trained[name].detach()).to("cpu", copy=True)
        filled[id(empty)] = nn.Parameter(values, requires_grad=empty.requires_grad)
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = filled[id(parameter)]
    buffers = dict(model.named_buffers())
    for name, buffer in skeleton.named_buffers():
        buffer.copy_(buffers[name])
