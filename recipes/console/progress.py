"""How far a long job is: a bar where somebody watches, a line a minute where a file does."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY = 60.0
"""Seconds between two lines of a log."""
Item = TypeVar("Item")


class Progress:
    """A bar on a terminal; else a line of the log each minute. `TQDM_DISABLE` turns both off.

    Args:
        total: steps in all; None where that is not known.
        name: of the job.
        done: steps that were taken before.
    """

    def __init__(self, total: int | None, name: str, *, done: int = 0) -> None:
        self.total = total
        self.name = name
        self.done = done
        self._first = done
        self._began = self._told = time.monotonic()
        self._figures: Mapping[str, str] = {}
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=name, initial=done, leave=False, mininterval=1)
        self._silent = bool(os.environ.get("TQDM_DISABLE"))

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, steps: int = 1, figures: Mapping[str, str] | None = None) -> None:
        """So many steps more, and what is to be said of them."""
        self.done += steps
        self._figures = figures or self._figures
        if self._bar is not None:
            self._bar.set_postfix(self._figures, refresh=False)
            self._bar.update(steps)
        elif time.monotonic() - self._told >= EVERY:
            self._tell()

    def close(self) -> None:
        """The job is over."""
        if self._bar is not None:
            self._bar.close()
        elif self._told > self._began:  # what was told of before is told of to its end
            self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        if self._silent:
            return
        text = f"{self.done:,}"
        if self.total:
            text += f" of {self.total:,} ({self.done / self.total:.0%})"
            rate = (self.done - self._first) / (self._told - self._began)
            if rate and self.done < self.total:
                text += f", {tqdm.format_interval((self.total - self.done) / rate)} left"
        figures = "".join(f", {name} {value}" for name, value in self._figures.items())
        log.info("%s: %s%s", self.name, text, figures)


def watched(items: Iterable[Item], total: int | None, name: str) -> Iterator[Item]:
    """The items, with the progress of whoever takes them."""
    with Progress(total, name) as progress:
        for item in items:
            yield item
            progress.update()
