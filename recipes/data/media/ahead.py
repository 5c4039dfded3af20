"""A second process that looks at pictures ahead of the one that checks their records.

What is found is the same with and without it: whatever it does not answer, whoever needs it looks
at.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import IO, TypeVar, cast

from vqguard import errors
from vqguard.errors import InputError
from vqguard.recipes.data.image_roots import FolderRoot, Size
from vqguard.recipes.processes import processors, python_command

BLOCK = 512
"""Records whose pictures are looked at together."""
FROM = 32 * 2**20
"""Bytes of a data file from which on a process more is worth its start."""
_START = (
    "import runpy\nrunpy.run_module('vqguard.recipes.data.media.ahead_program', "
    "run_name='__main__')\n"
)
_Item = TypeVar("_Item")


def worth_it(size: int) -> bool:
    """Whether a data file of so many bytes is checked by two processes: there must be two cores."""
    return size >= FROM and processors() > 1


class LookingAhead:
    """The process. One question is out at a time.

    Args:
        root: where the pictures are.
        decode: look at each to its last byte.
    """

    def __init__(self, root: FolderRoot, *, decode: bool) -> None:
        arguments = (str(root.path), str(root.follow_links), str(decode))
        self._process = subprocess.Popen(
            python_command(_START, *arguments), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._questions = cast(IO[bytes], self._process.stdin)
        self._told = cast(IO[bytes], self._process.stdout)
        self._asked: Sequence[str] = ()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def ask(self, names: Sequence[str]) -> None:
        """Send names; the answers to earlier ones were taken."""
        self._asked = names
        if not names:  # no question, no answer
            return
        try:
            self._questions.write(json.dumps(list(names)).encode() + b"\n")
            self._questions.flush()
        except OSError:  # it has ended: then nothing is answered
            self._asked = ()

    def answers(self) -> Iterator[tuple[str, Size | InputError]]:
        """What was asked for, as far as it was answered."""
        if not self._asked:
            return
        try:
            answers = json.loads(self._told.readline())
        except (OSError, ValueError):
            return
        for name, answer in zip(self._asked, answers, strict=False):
            if isinstance(answer, dict):
                kind = getattr(errors, answer["error"])
                yield name, kind(answer["text"])
            else:
                width, height = answer
                yield name, (width, height)
        self._asked = ()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._told.close()
        with suppress(OSError):  # what was not sent yet
            self._questions.close()


def in_blocks(items: Iterable[_Item]) -> Iterator[tuple[list[_Item], list[_Item]]]:
    """The items in lists of `BLOCK`, each with the next one, which is empty behind the last.

    An error among the items is raised when those before it are done with.
    """
    source = iter(items)
    errors_met: list[Exception] = []

    def read() -> list[_Item]:
        block: list[_Item] = []
        try:
            for item in islice(source, BLOCK):
                block.append(item)  # what came before an error is kept
        except Exception as error:
            errors_met.append(error)
        return block

    block = read()
    while block:
        following = [] if errors_met else read()
        yield block, following
        block = following
    if errors_met:
        raise errors_met[0]
