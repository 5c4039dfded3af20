"""What became of each attempt, a JSON object a line: what a killed suite goes on from.

A line is one request under one attack. Lines are appended when a batch is done and are never
changed; a line that a kill has cut off is dropped, and its attempt is made again.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from vqguard.bounded import read_bytes
from vqguard.errors import DataError
from vqguard.strict import StrictData
from vqguard.text_files import parse_json

ATTEMPTS = "attempts.jsonl"
MAX_JOURNAL = 2**30
"""Bytes of a journal: an attempt has some 3 kB."""
MAX_LINE = 2**20
"""Bytes of an attempt: what is read of JSON takes up to 25 times as many."""


@dataclass(frozen=True)
class Attempt(StrictData):
    """One request under one attack, with everything needed to make it again."""

    suite: str
    subject: str
    attack: str
    gradient: str
    eps_255: float
    steps: int
    restarts: int
    seed: int
    aim: str
    settings: Mapping[str, bool | int | float | str]
    """Of the attack, where they differ from its defaults."""
    split: str
    """Where the requests come from."""
    request: int
    """Its number there."""
    text: str
    """The request."""
    opening: str
    """What the answer shall begin with."""
    threat_model: str
    answer: str
    """What the model said to the adversarial picture."""
    judges: Mapping[str, bool]
    """What each judge says of it; all false where the guard flags the picture."""
    flagged: bool
    """The guard refuses the picture."""
    loss: float | None
    """The target's loss on the picture; None where none was finite."""
    curve: Sequence[float]
    """The batch's mean loss over the steps, thinned to at most 100 numbers."""
    evaluations: int
    """Evaluations until success, -1 without one."""
    masked: bool
    """A picture of the batch never received a gradient other than zero."""
    warnings: Sequence[str]
    image: str | None
    """PNG beside this file; None where the attack makes no picture."""
    image_sha256: str | None
    clean_sha256: str
    """SHA-256 of the clean picture's 8-bit pixels."""
    model_sha256: str
    map_sha256: str | None
    """None without a safety map."""
    seconds: float
    """Of its batch, divided by the pictures in it."""
    versions: Mapping[str, str] = field(default_factory=dict)
    guard: Mapping[str, int] = field(default_factory=dict)
    """`guard_health` of the subject; empty without a guard."""
    surrogates: Sequence[str] = field(default_factory=list)
    """SHA-256 of the models that the picture was made on; none: it was the subject."""
    refusal_data: float = 0.0
    """Share of refusals beside pictures in what its language model was adapted on."""

    @property
    def cell(self) -> str:
        """What it is one attempt of: all attempts of a rate share it."""
        return cell_of(self.to_dict())


def cell_of(facts: Mapping[str, Any]) -> str:
    """The cell of an attempt with these fields."""
    settings = ",".join(f"{key}={value}" for key, value in sorted(facts["settings"].items()))
    parts = [
        facts["subject"],
        facts["attack"],
        facts["gradient"],
        f"{facts['eps_255']:g}",
        f"{facts['steps']}x{facts['restarts']}",
        facts["aim"],
        settings or "-",
        f"seed {facts['seed']}",
        facts["split"],
        facts["model_sha256"][:12],
        *(f"by {sha256[:12]}" for sha256 in facts.get("surrogates", ())),
    ]
    return "/".join(parts)


class Journal:
    """The attempts in a folder; each process of a launched run writes a file of its own.

    Args:
        folder: made when attempts are added, if missing.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.path = folder / (ATTEMPTS if rank == 0 else f"attempts-{rank}.jsonl")

    def append(self, attempts: Iterable[Attempt]) -> None:
        """Write them behind the others, and wait until they are on the disk.

        Raises:
            DataError: a link or another file of somebody's stands in the journal's place.
        """
        lines = "".join(
            json.dumps(attempt.to_dict(), allow_nan=False) + "\n" for attempt in attempts
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        with _opened(self.path) as file:
            _drop_torn_line(file)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[Attempt]:
        """All attempts in the folder, of every process, in the order of their files.

        Raises:
            DataError: a damaged line that is not the last of its file.
        """
        paths = [self.folder / ATTEMPTS, *sorted(self.folder.glob("attempts-*.jsonl"))]
        return [attempt for path in paths if path.exists() for attempt in read_attempts(path)]


def read_attempts(path: Path) -> list[Attempt]:
    """The attempts of one file; what stands behind its last line end was cut off by a kill.

    Raises:
        DataError: naming the file and the line that is not an attempt.
    """
    attempts = []
    *lines, _torn = read_bytes(path, MAX_JOURNAL, DataError).split(b"\n")
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE:
            raise DataError(f"{path}, line {number}: longer than {MAX_LINE:,} bytes; remove it")
        try:
            document: Any = parse_json(line.decode(), f"{path}, line {number}")
            attempts.append(Attempt.from_dict(document))
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not an attempt ({error}); remove the line to make the "
                "attempt again"
            ) from error
    return attempts


def _opened(path: Path) -> BinaryIO:
    """A journal to be read and added to: lines must not go into a file that is not one."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"):  # not all systems have them
        flags |= getattr(os, name, 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        raise DataError(f"cannot write into {path} ({error}); name another folder") from error
    known = os.fstat(handle)
    if not stat.S_ISREG(known.st_mode) or known.st_nlink > 1:
        os.close(handle)
        raise DataError(f"{path} is no file of this folder alone; name another folder")
    return os.fdopen(handle, "rb+")


def _drop_torn_line(file: BinaryIO) -> None:
    """What a kill has left behind the last whole line would spoil the next one."""
    size = file.seek(0, os.SEEK_END)
    if not size:
        return
    file.seek(-1, os.SEEK_END)
    if file.read() == b"\n":
        return
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
