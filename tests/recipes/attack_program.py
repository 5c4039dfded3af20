"""Runs a suite and is killed by SIGKILL before its Nth batch reaches the disk.

`python attack_program.py RUN SUITE OUTPUT N`
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable

from vqguard.cli.main import main
from vqguard.recipes.attacking.journal import Attempt, Journal


def die_before(batch: int) -> None:
    """The batch's first line is written in part: a kill may come at any byte."""
    written = 0
    append = Journal.append

    def counted(self: Journal, attempts: Iterable[Attempt]) -> None:
        nonlocal written
        if written == batch:
            with self.path.open("ab") as file:
                file.write(b'{"suite": "cut o')
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        written += 1
        append(self, attempts)

    Journal.append = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    run, suite, output, batch = sys.argv[1:]
    die_before(int(batch))
    sys.exit(main(["attack", run, "--suite", suite, "--output", output]))
