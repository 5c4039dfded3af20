"""Whole-model checkpoints of transformers.Trainer, for guarded models.

Trainer restores a checkpoint by matching the names in its files with the model's, and only warns
about what does not match. The guard lies in files of its own, and for many families transformers
writes other names than its modules have: training would go on from weights that nobody trained.
What a plain Trainer would find out only behind its last step is refused before its first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vqguard.adapters.storage.manifest import MANIFEST
from vqguard.adapters.storage.reading import load_parts
from vqguard.errors import ArtefactError, ConfigError


class GuardedCheckpoints:
    """Put before `Trainer` in the bases of a trainer whose model is guarded.

        class GuardedTrainer(GuardedCheckpoints, Trainer): ...

    Resuming (`train(resume_from_checkpoint=...)`) and `load_best_model_at_end` then restore every
    tensor, the guard's among them, and the safety map. Models that PEFT wraps are left to Trainer,
    whose adapter checkpoints work. Under FSDP and DeepSpeed the best checkpoint is not restored,
    and asking for it is refused.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
            trainer.remove_callback(BestModelRefusal)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        trainer: Any = self
        target = trainer.model if model is None else model
        if not restore_guarded(target, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _load_best_model(self) -> None:
        trainer: Any = self
        if not restore_guarded(trainer.model, trainer.state.best_model_checkpoint):
            super()._load_best_model()  # type: ignore[misc]


class BestModelRefusal(TrainerCallback):
    """Refuses `load_best_model_at_end` for a guarded model, which Trainer cannot restore.

    It looks for files that a guarded checkpoint does not have, and goes on with a warning.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Raises ConfigError, saying what to do."""
        if args.load_best_model_at_end and "_vqguard_link" in vars(model):
            raise ConfigError(
                "load_best_model_at_end: Trainer would keep the last weights of a guarded model and"
                " not the best. Put GuardedCheckpoints of vqguard.adapters in front of Trainer "
                "(class GuardedTrainer(GuardedCheckpoints, Trainer)), without FSDP and DeepSpeed; "
                "or set it to false and load the best checkpoint with load_guarded"
            )


def watch_trainers() -> None:
    """From now on every new Trainer has a `BestModelRefusal`."""
    library: Any = transformers  # its module `trainer` is imported when it is first asked for
    if BestModelRefusal not in library.trainer.DEFAULT_CALLBACKS:
        library.trainer.DEFAULT_CALLBACKS.append(BestModelRefusal)


def restore_guarded(model: nn.Module, checkpoint: str | Path) -> bool:
    """Copy a guarded model's checkpoint into `model`, in place; False for a model without a guard.

    Raises:
        ArtefactError: for a checkpoint without a guard.
        ConfigError: when its guard has another configuration than the model's, as `load_guarded`
            for damaged files.
    """
    if "_vqguard_link" not in model.__dict__:
        return False
    folder = Path(checkpoint)
    if not (folder / MANIFEST).is_file():
        raise ArtefactError(
            f"{folder} holds no guard ({MANIFEST} is missing): resume from a checkpoint that was "
            "written while the model was guarded"
        )
    # The model that takes this in is guarded: what is read needs no proof of its own.
    saved = load_parts(folder, None, {"dtype": "auto"})
    guard: Any = model.vqguard
    if saved.guard.config != guard.config:
        raise ConfigError(
            f"the guard in {folder} has another configuration than the model's: start from the "
            "guarded model that this training began with"
        )
    state = {f"vqguard.{name}": tensor for name, tensor in saved.guard.state_dict().items()}
    model.load_state_dict({**saved.model.state_dict(), **state})
    guard.safety_map = saved.guard.safety_map
    return True
