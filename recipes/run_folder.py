"""A run's directory in the making: whose it is, what is done, and how long it took."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vqguard.adapters.storage.manifest import MANIFEST
from vqguard.errors import ConfigError
from vqguard.files import RESUME_OR_ANOTHER, replace_text, require_empty
from vqguard.recipes.processes import is_first
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.run import MODEL, RECIPE, TIMES, read_times

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class RunFolder:
    """Each part of a run leaves its mark here when it is whole.

    Args:
        path: the run's directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        times = path / TIMES
        self.seconds: dict[str, float] = read_times(times) if times.exists() else {}

    def refuse_other_runs(self, recipe: RetrofitRecipe, *, resume: bool) -> None:
        """See that the directory is free, or holds this recipe's run and is to be resumed.

        Raises:
            ConfigError: it is not.
        """
        started = self.path / RECIPE
        if not (resume and self.path.is_dir()):
            require_empty(self.path, RESUME_OR_ANOTHER)
        elif started.exists() and RetrofitRecipe.from_yaml(started) != recipe:
            raise ConfigError(
                f"{self.path} was started with another recipe ({started}). Resume it with the same "
                "options, or name another --output."
            )

    def open(self, recipe: RetrofitRecipe) -> None:
        """Make the directory, with the recipe in it."""
        path = self.path / RECIPE
        self.path.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            recipe.to_yaml(path)

    def stage(self, name: str) -> Path:
        """Where a stage's checkpoints and figures go."""
        return self.path / name

    def result(self, stage: str) -> Path:
        """Where a stage's guarded model goes."""
        return self.path / stage / MODEL

    def timed(self, part: str, work: Callable[[], Result]) -> Result:
        """Do a part of the run and, in the first process, write down the seconds that it took."""
        if not is_first():
            return work()
        log.info("%s", part)
        start = time.perf_counter()
        result = work()
        # A resumed part adds to the seconds of its first attempt's finished parts only.
        self.seconds[part] = time.perf_counter() - start
        replace_text(self.path / TIMES, json.dumps(self.seconds, indent=1))
        return result


def is_guarded(folder: Path) -> bool:
    """Whether a guarded model was written there to its end."""
    return (folder / MANIFEST).exists()
