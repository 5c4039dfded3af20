"""A seeded, resumable training loop for the base model's two phases.

Batches are a function of the step's number, so a resumed run sees what an uninterrupted one sees.
The two stages of a retrofit do not use this: they run on `transformers.Trainer`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from vqguard.config import StrictConfig
from vqguard.errors import TrainingError
from vqguard.files import drafts
from vqguard.recipes.console.progress import Progress

log = logging.getLogger(__name__)

Metrics = dict[str, float]


@dataclass(frozen=True)
class PhaseConfig(StrictConfig):
    """One phase: AdamW under a cosine with a linear warm-up and warm restarts."""

    steps: int
    """Gradient steps in all."""
    batch: int
    """Scenes or conversations a step."""
    learning_rate: float
    """Peak learning rate of each cycle."""
    restarts: tuple[int, ...] = ()
    """Steps at which the cosine starts again (SGDR, Loshchilov and Hutter 2017)."""
    weight_decay: float = 0.01
    """AdamW weight decay."""
    warmup: float = 0.05
    """Share of each cycle with a rising learning rate."""
    clip: float = 1.0
    """Greatest L2 norm of the gradient."""
    checkpoint_every: int = 200
    """Steps between checkpoints."""


def run_phase(
    name: str,
    module: nn.Module,
    loss_of: Callable[[int], tuple[torch.Tensor, Metrics]],
    config: PhaseConfig,
    folder: Path,
    *,
    resume: bool,
) -> None:
    """Train `module` in place.

    Args:
        name: names the phase's files in `folder`: `NAME.pt`, `NAME.jsonl`.
        loss_of: gives the loss (a scalar) and its figures for a step's number.

    Raises:
        TrainingError: a loss is not finite.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    checkpoint, log_path = folder / f"{name}.pt", folder / f"{name}.jsonl"
    start = 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        start = int(state["step"])
        log.info("%s: resumed at step %d of %d", name, start, config.steps)
    elif log_path.exists():
        log_path.unlink()

    module.train()
    with (
        log_path.open("a") as lines,
        Progress(config.steps, name, done=start) as progress,
    ):
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, config)
            loss, metrics = loss_of(step)
            if not math.isfinite(loss.item()):
                raise TrainingError(
                    f"{name}: the loss is {loss.item()} at step {step}. Lower learning_rate "
                    f"(now {config.learning_rate}) and resume from {checkpoint}."
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            figures = {"loss": loss.item(), **metrics}
            lines.write(json.dumps({"step": step, **figures}) + "\n")
            progress.update(figures={k: f"{v:.3f}" for k, v in figures.items()})
            if (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps:
                lines.flush()
                _save(checkpoint, module, optimizer, step + 1)
    module.eval()


def _schedule(step: int, config: PhaseConfig) -> float:
    edges = [0, *sorted(config.restarts), config.steps]
    first = max(edge for edge in edges[:-1] if edge <= step)
    length = min(edge for edge in edges if edge > first) - first
    place, warm = step - first, max(1, int(config.warmup * length))
    if place < warm:
        return (place + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (place - warm) / max(1, length - warm)))


def _save(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    # A full disk or a kill leaves the previous checkpoint whole.
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    with drafts(path) as (draft,), draft.open("wb") as file:
        torch.save(state, file)  # by its path torch refuses names that begin with a dot
