"""What a stage asks of the engine that trains it, and which engine that is.

An engine is how the processes of a run share a step's work (TRL calls it a distributed backend).
The launcher's settings choose it, not the recipe. A new one is a class in a file of its own and a
line in `ENGINES`, from another package `add_engine`; most methods can be those of `Replicated`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from transformers import Trainer

from vqguard.errors import ConfigError
from vqguard.recipes.recipe import StageRecipe
from vqguard.recipes.training.engines.deepspeed import Partitioned
from vqguard.recipes.training.engines.fsdp import Sharded
from vqguard.recipes.training.engines.replicated import Replicated


class Engine(Protocol):
    """One engine, for one stage's trainer. Every process calls every method, and in one order."""

    name: ClassVar[str]

    def __init__(self, trainer: Trainer) -> None: ...

    @staticmethod
    def is_asked_for(trainer: Trainer) -> bool:
        """Whether the launcher's settings ask for it."""

    def prepare(self, recipe: StageRecipe) -> None:
        """Check those settings, and make the trainer ready. Nothing is wrapped yet.

        Raises:
            ConfigError: a setting under which a guarded model cannot be trained.
        """

    def before_training(self, model: nn.Module) -> None:
        """Keep of the given model what will be needed when its weights have been taken apart."""

    def after_backward(self) -> None:
        """See to gradients that the engine's wrapper left alone; before they are clipped."""

    def trained_model(self, model: nn.Module) -> Any:
        """The given model as it was trained, whole, in every process; or another with its weights.

        Without `before_training` if there was nothing left to train.
        """

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of a parameter of the model in training."""

    def write(self, parameter: torch.Tensor, values: torch.Tensor) -> None:
        """Copy whole values into it."""

    def run_part(
        self, model: nn.Module, function: Callable[..., torch.Tensor], *arguments: Any
    ) -> torch.Tensor:
        """`function(model, *arguments)`, which runs parts of the model outside of `forward`."""

    def restart_rows(
        self, parameter: nn.Parameter, rows: torch.Tensor, states: Iterable[str]
    ) -> None:
        """Rows of a parameter (n, d) were set: step on from there.

        Args:
            rows: (n,) bool.
            states: the optimiser's, as in `exp_avg`; they become zero in these rows.
        """

    @property
    def states_file(self) -> str:
        """This process's file of the optimiser's states in a checkpoint."""

    def save_states(self, folder: Path) -> None:
        """Write the optimiser's states into a checkpoint."""

    def load_states(self, folder: Path) -> None:
        """Read them back, under as many processes as wrote them."""


ENGINES: list[type[Engine]] = [Partitioned, Sharded, Replicated]
"""The first one that is asked for trains."""


def add_engine(engine: type[Engine]) -> None:
    """Add an engine of another package; it is asked before those that are there.

    Raises:
        ConfigError: where the name is empty or taken.
    """
    if not engine.name or engine.name in {known.name for known in ENGINES}:
        raise ConfigError(
            f"{engine.__name__}: there is an engine called {engine.name!r} already, or the name is "
            "empty; give the class another `name`"
        )
    ENGINES.insert(0, engine)


def choose_engine(trainer: Trainer) -> Engine:
    """The engine that the launcher's settings ask for."""
    return next(engine for engine in ENGINES if engine.is_asked_for(trainer))(trainer)
