"""A stage's figures: one JSON line a step, and their progress on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vqguard.bounded import read_bytes
from vqguard.errors import ConfigError, DataError
from vqguard.files import replace_text
from vqguard.recipes.console.progress import Progress
from vqguard.text_files import parse_json

MAX_METRICS = 2**28
"""Bytes of a metrics file: 200 for a step, of a million."""


class StepLog(TrainerCallback):
    """Writes `{"step", "loss", …}` lines and shows losses, perplexities and the time left.

    Args:
        stage: name on the bar.
        path: the JSON-lines file. A resumed run drops the lines after its checkpoint.
        figures: gives the step's figures; it is asked in every process of a run.
        shown: whether this process writes and shows them.
    """

    def __init__(
        self,
        stage: str,
        path: Path,
        figures: Callable[[], dict[str, float]],
        *,
        shown: bool = True,
    ) -> None:
        self.stage = stage
        self.path = path
        self.figures = figures
        self.shown = shown
        self._progress: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.shown:
            return
        kept = [line for line in read_steps(self.path) if line["step"] <= state.global_step]
        replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._progress = Progress(state.max_steps, self.stage, done=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        figures = self.figures()
        if not self.shown:
            return
        with self.path.open("a") as lines:
            lines.write(json.dumps({"step": state.global_step, **figures}) + "\n")
        if self._progress is not None:
            self._progress.update(figures={k: f"{v:.3g}" for k, v in figures.items()})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._progress is not None:
            self._progress.close()


def read_steps(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line cut short by a kill is left out."""
    steps: list[dict[str, float]] = []
    if not path.exists():
        return steps
    for line in read_bytes(path, MAX_METRICS, DataError).decode("utf-8", "replace").splitlines():
        try:
            step = parse_json(line, strict=False)  # a loss may be NaN
        except ConfigError:
            break
        if not isinstance(step, dict):
            break
        steps.append(step)
    return steps
