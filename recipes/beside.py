"""A second process for work that needs nothing of this one's, each with half the threads.

Threads that share one small step wait for each other, and where a machine is busy with other work
too they spin while they wait. Two steps at a time are done sooner. Which way is taken depends on
the machine alone, not on how busy it is, so that a run gives the same figures again
(docs/decisions, 0064).
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from vqguard.errors import TrainingError, VQGuardError
from vqguard.recipes.processes import launched, python_command

_PROGRAM = "import sys; from vqguard.recipes.beside import main; main(sys.argv[1])"
_LOGGED = ("vqguard.recipes", "vqguard.search")


def threads_beside() -> int | None:
    """Threads for each of two processes; None where one process does all.

    That is on a GPU, under a launcher, and with a single thread.
    """
    threads = torch.get_num_threads()
    if torch.cuda.is_available() or launched() > 1 or threads < 2:
        return None
    return threads // 2


@contextmanager
def half_the_threads() -> Iterator[None]:
    """Inside, this process has as many threads as `threads_beside` says."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads_beside() or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def beside(work: str, request: Mapping[str, Any], named: str) -> Iterator[None]:
    """Inside, another process does `work`, and this one has half the threads.

    Leaving waits for it; leaving by an error ends it, and so does the end of this process, however
    that comes about. What it logs comes on stderr; it shows no progress.

    Args:
        work: "module:function"; the function is called with the request.
        request: JSON values.
        named: what does the work, for the error.

    Raises:
        TrainingError: it failed.
    """
    threads = threads_beside() or 1
    call = {
        "work": work,
        "request": dict(request),
        "threads": threads,
        "levels": {name: logging.getLogger(name).getEffectiveLevel() for name in _LOGGED},
    }
    with (
        subprocess.Popen(
            python_command(_PROGRAM, json.dumps(call)),
            # Held open as long as this process lives: see `_end_with_parent`.
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"},
        ) as process,
        half_the_threads(),
    ):
        try:
            yield
            # `communicate` and `Popen.__exit__` would close stdin first, and so end it.
            if process.wait() != 0:
                raise TrainingError(
                    f"{named} ended with code {process.returncode} in its own process: see what "
                    "it said above. Put it right and go on with --resume."
                )
        finally:
            process.kill()


def main(text: str) -> None:
    """What the other process does: `beside` describes the call, a JSON object."""
    _end_with_parent()
    call = json.loads(text)
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING)
    for name, level in call["levels"].items():
        logging.getLogger(name).setLevel(level)
    torch.set_num_threads(call["threads"])
    module, _, function = call["work"].partition(":")
    try:
        getattr(importlib.import_module(module), function)(call["request"])
    except VQGuardError as error:
        sys.exit(str(error))


def _end_with_parent() -> None:
    """End this process when the one that started it has ended."""
    # Ctrl-C reaches both; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
