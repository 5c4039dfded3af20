"""A run's directory in the making: whose it is, what is done, and how long it took."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vqguard.adapters.storage.manifest import holds_manifest
from vqguard.errors import ArtefactError, ConfigError
from vqguard.files import RESUME_OR_ANOTHER, replace_text, require_empty
from vqguard.recipes.processes import is_first
from vqguard.recipes.run import MODEL, RECIPE, TIMES
from vqguard.strict import StrictConfig
from vqguard.text_files import read_json

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class RunFolder:
    """Each part of a run leaves its mark here when it is whole.

    Args:
        path: the run's directory.
        times: the file with the seconds of its parts; default: the run's.
        recipe_name: the file with its recipe.
    """

    def __init__(self, path: Path, times: Path | None = None, recipe_name: str = RECIPE) -> None:
        self.path = path
        self.recipe_path = path / recipe_name
        self.times = path / TIMES if times is None else times
        self.seconds: dict[str, float] = {}

    def refuse_other_runs(self, recipe: StrictConfig, *, resume: bool) -> None:
        """See that the directory is free, or holds this recipe's run and is to be resumed.

        Raises:
            ConfigError: it is not.
        """
        started = self.recipe_path
        if not (resume and started.exists()):
            # A run that was killed before it wrote its recipe has written nothing else either.
            require_empty(self.path, _another(started) if resume else RESUME_OR_ANOTHER)
        elif type(recipe).from_yaml(started) != recipe:
            raise ConfigError(
                f"{self.path} was started with another recipe ({started}). Resume it with the same "
                "options, or name another --output."
            )

    def open(self, recipe: StrictConfig) -> None:
        """Put the recipe into the directory, and read what an earlier attempt wrote there.

        Raises:
            ArtefactError: the times of an earlier attempt are damaged.
        """
        self.read_times()
        if not self.recipe_path.exists():
            recipe.to_yaml(self.recipe_path)

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
        self._write_times()
        return result

    def read_times(self) -> None:
        """Take what an earlier attempt wrote down.

        Raises:
            ArtefactError: it is damaged.
        """
        self.seconds = _seconds_in(self.times)

    def adopt(self, times: Path) -> None:
        """Take the seconds that another process wrote down, and delete its file; none: nothing."""
        if times.exists():
            self.seconds |= _seconds_in(times)
            self._write_times()
            times.unlink()

    def _write_times(self) -> None:
        self.times.parent.mkdir(parents=True, exist_ok=True)
        replace_text(self.times, json.dumps(self.seconds, indent=1))


def is_guarded(folder: Path) -> bool:
    """Whether a guarded model was written there to its end."""
    return holds_manifest(folder)


def stage_seconds(run: Path) -> dict[str, float]:
    """How long each finished part of a run took, in seconds; nothing where none is.

    Raises:
        ArtefactError: the file is damaged.
    """
    return _seconds_in(run / TIMES)


def _seconds_in(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    try:
        seconds = read_json(path, ConfigError)
        if not isinstance(seconds, dict):
            raise ConfigError(f"expected an object, got {type(seconds).__name__}")
        wrong = [part for part, value in seconds.items() if not _is_time(value)]
        if wrong:
            raise ConfigError(f"expected seconds for {', '.join(map(repr, wrong[:3]))}")
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{path} is damaged ({error}). Restore it; or delete it, then the report lacks the "
            "times of the parts that are done, and nothing else"
        ) from error
    return {part: float(value) for part, value in seconds.items()}


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e12


def _another(recipe: Path) -> str:
    return f"It holds no {recipe.name}, so no run was started there. Name another --output."
