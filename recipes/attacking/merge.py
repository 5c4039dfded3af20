"""Several results of `vqguard attack` as one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.errors import InputError
from vqguard.files import require_empty
from vqguard.names import printable
from vqguard.recipes.attacking.attempts import IMAGES
from vqguard.recipes.attacking.journal import Attempt, Journal
from vqguard.recipes.attacking.run_suite import SuiteResult, write_result


def merge_results(results: Sequence[Path], output: Path, *, command: str) -> SuiteResult:
    """Read the attempts of all results, and write them, their pictures and the report anew.

    Attempts that are in several of them count once.

    Raises:
        InputError: a folder without attempts.
        DataError: a damaged one.
        ConfigError: `output` is not empty, or is being written by another process.
    """
    with only_writer(output):
        require_empty(output, "Name another --output.")
        return _merge_results(results, output, command)


def _merge_results(results: Sequence[Path], output: Path, command: str) -> SuiteResult:
    merged: dict[tuple[str, int], Attempt] = {}
    for number, folder in enumerate(results):
        attempts = Journal(folder).read()
        if not attempts:
            raise InputError(f"{folder}: no attempts here; expected a folder of `vqguard attack`")
        for attempt in attempts:
            key = attempt.cell, attempt.request
            if key not in merged:
                merged[key] = _with_picture(attempt, folder, output, number)
    Journal(output).append(merged.values())
    title = printable(" + ".join(folder.resolve().name for folder in results))
    return write_result(output, list(merged.values()), command=command, title=title)


def _with_picture(attempt: Attempt, folder: Path, output: Path, number: int) -> Attempt:
    """The attempt with its picture copied under a name that says which result it is of."""
    if attempt.image is None:
        return attempt
    source = folder / attempt.image
    if not source.resolve().is_relative_to((folder / IMAGES).resolve()):
        raise InputError(f"{folder}: {attempt.image!r} is outside {IMAGES}/")
    name = f"{IMAGES}/{number}-{source.name}"
    (output / IMAGES).mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, output / name)
    return replace(attempt, image=name)
