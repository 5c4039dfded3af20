"""A trainer whose checkpoints hold what is trained and say when they are whole.

Weights are whole tensors in safetensors, whatever the engine; the optimiser's states are each
engine's own. A kill or a full disk leaves the checkpoint before.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME

from vqguard.distributed import shared_sum
from vqguard.errors import ConfigError, TrainingError
from vqguard.recipes.processes import is_first, is_loss, wait
from vqguard.recipes.training.engines.engine import Engine
from vqguard.text_files import read_json

TRAINABLE = "trainable.safetensors"
COMPLETE = "complete.json"


class CheckpointedTrainer(Trainer):
    """transformers' trainer, with the checkpoints of a stage."""

    folder: Path
    """Where checkpoints (`checkpoint-N`) go."""
    engine: Engine
    """How the optimiser's states are written, and weights that may be taken apart."""

    def check_engine_of(self, checkpoint: Path) -> None:
        """Refuse what would be gone on from without the optimiser's states.

        Raises:
            ConfigError: the checkpoint was written under another engine, or by another number of
                processes under DeepSpeed.
        """
        name = self.engine.states_file
        if not (checkpoint / name).is_file():
            states = ", ".join(sorted(p.name for p in checkpoint.glob("optimizer*"))) or "none"
            raise ConfigError(
                f"{checkpoint} was written under another engine or another number of processes: "
                f"expected the optimiser's states in {name}, found {states}. Go on with the launch "
                "that the run was begun with."
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self._save(output_dir)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.accelerator.unwrap_model(self.model)
        state = {name: shared_sum(counts) for name, counts in self._counts(model).items()}
        for name, parameter in self._trained(model).items():
            values = self.engine.whole(parameter)
            if self.args.should_save:
                state[name] = values.contiguous()
        if self.args.should_save:
            save_file(state, folder / TRAINABLE)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.engine.save_states(Path(output_dir))
        if self.args.should_save:
            scheduler: Any = self.lr_scheduler
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        self.engine.load_states(Path(checkpoint))
        scheduler: Any = self.lr_scheduler
        scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target: Any = self.accelerator.unwrap_model(self.model if model is None else model)
        stored = load_file(Path(resume_from_checkpoint) / TRAINABLE)
        trained, counts = self._trained(target), self._counts(target)
        if stored.keys() != trained.keys() | counts.keys():
            raise ConfigError(
                f"{resume_from_checkpoint} holds other tensors than this stage trains. It belongs "
                "to another recipe: use its resolved configuration, or another --output."
            )
        with torch.no_grad():
            for name, parameter in trained.items():
                self.engine.write(parameter, stored[name])
            for name, buffer in counts.items():
                # The sum over processes was written: one of them goes on from it.
                buffer.copy_(stored[name] if is_first() else torch.zeros_like(buffer))

    def _trained(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def _counts(self, model: nn.Module) -> dict[str, torch.Tensor]:
        return {n: b for n, b in model.named_buffers() if n.endswith("codebook.counts")}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            wait()  # every process has written its random state
            if is_first():
                mark_complete(folder)
        except Exception as error:
            if is_loss(error):
                raise
            if is_first():
                shutil.rmtree(folder, ignore_errors=True)
            kept = last_checkpoint(self.folder)
            rest = f"{kept} is whole" if kept else "there was no earlier one"
            raise TrainingError(
                f"the checkpoint at step {self.state.global_step} could not be written to {folder} "
                f"({error}); {rest}. Free some space and go on with --resume."
            ) from error


def mark_complete(checkpoint: Path) -> None:
    """Write the mark: every file's size, as the last file of a checkpoint."""
    sizes = {p.name: p.stat().st_size for p in sorted(checkpoint.iterdir()) if p.name != COMPLETE}
    (checkpoint / COMPLETE).write_text(json.dumps(sizes))


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end, or None."""
    checkpoints = sorted(
        (p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()),
        key=step_of,
        reverse=True,
    )
    return next((p for p in checkpoints if _whole(p)), None)


def _whole(checkpoint: Path) -> bool:
    try:
        sizes = read_json(checkpoint / COMPLETE, ConfigError)
        if not isinstance(sizes, dict):
            return False
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
