"""Models whose weights FSDP2 has cut into shards, one for each process (torch's `fully_shard`).

The guard is left whole in every process: mixed precision would round its codebooks, and codes and
verdicts with them; and entries are counted and revived as rows. Its gradients are averaged here.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer

from vqguard.distributed import rank_and_world
from vqguard.errors import ConfigError


def prepare_sharding(plugin: Any, model: nn.Module) -> None:
    """Check accelerate's FSDP settings and leave the guard, if any, out of the sharding.

    Raises ConfigError for settings under which a guarded model cannot be trained.
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


def shard_on_processors(accelerator: Any) -> bool:
    """Turn on FSDP2 where accelerate, asked for it, would quietly use DDP: without a GPU.

    Returns whether it was asked for.
    """
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    state = accelerator.state
    if not wanted or state.distributed_type is not DistributedType.MULTI_CPU:
        return False
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
    state.distributed_type = DistributedType.FSDP
    return True


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
    found = dict(model.named_buffers())
    for name, buffer in skeleton.named_buffers():
        buffer.copy_(found[name])


def register_forward(model: nn.Module, name: str, method: Any) -> None:
    """Make `model.name` a method before which FSDP gathers weights, as before `forward`."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    setattr(model, name, method)
    register_fsdp_forward_method(model, name)
