"""Which files of a folder are which split, by the Hugging Face hub's own conventions.

`datasets` decides, as it does for a repository on the hub. It gets the files' names alone, in a
folder of empty files: a `[` in the path is then no pattern, and no file of another kind decides.
What its patterns would leave out, or put into two splits, is refused here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from vqguard.errors import ConfigError, DataError

log = logging.getLogger(__name__)

TRAIN = "train"
_DEPTHS = ("*.parquet", "*/*.parquet", "*/*/*.parquet", "*/*/*/*.parquet")
_NAMES_A_SPLIT = re.compile(r"(?<![a-z])(train|test|val|dev|eval)", re.IGNORECASE)
"""What begins as the hub's keywords do (training, testing, validation, evaluation, ...)."""
_CHOOSE = "Choose with --set columns.split=NAME."


def datasets_library() -> Any:
    """The module `datasets`.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import datasets  # an extra
    except ImportError as error:
        raise ConfigError(
            "a Hugging Face dataset is read by the library `datasets`: install it with "
            "pip install 'vqguard[datasets]'."
        ) from error
    return datasets


def parquet_files(folder: Path) -> list[Path]:
    """A folder's parquet files, down to the third folder in it; hidden ones are left out."""
    files = (file for depth in _DEPTHS for file in folder.glob(depth))
    return sorted(file for file in files if not _hidden(file.relative_to(folder)))


def shards_of_split(folder: Path, wanted: str | None) -> list[Path]:
    """The tars of a folder, or those of one split where their names tell several apart.

    Raises:
        DataError, ConfigError: as `files_of_split`.
    """
    shards = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".tar")
    if wanted is None and not any(_NAMES_A_SPLIT.search(shard.name) for shard in shards):
        return shards
    return files_of_split(folder, wanted, shards) if shards else []


def files_of_split(
    folder: Path, wanted: str | None, files: Sequence[Path] | None = None
) -> list[Path]:
    """The files of a split; the log says which.

    Args:
        folder: a repository of the hub, or a part of one.
        wanted: a split's name; None: the only one, or `train`.
        files: what is in it; None: its parquet files.

    Raises:
        DataError: no such split, or files of which it cannot be told what they belong to.
        ConfigError: `datasets`, which knows the conventions, is not installed.
    """
    splits = _splits(folder, parquet_files(folder) if files is None else files)
    chosen = choose_split(folder, list(splits), wanted)
    _refuse_several_sets(folder, splits[chosen], chosen)
    return [folder / file for file in splits[chosen]]


def choose_split(data: Path, names: Sequence[str], wanted: str | None) -> str:
    """The split to read, by name; the log says which.

    Raises:
        DataError: there is none of this name, or several and none is `train`.
    """
    chosen = wanted or (names[0] if len(names) == 1 else TRAIN)
    if chosen not in names:
        raise DataError(
            f"{data}: expected one of the splits {', '.join(names)}, got {chosen!r}. {_CHOOSE}"
        )
    left = [name for name in names if name != chosen]
    also = f"; not read: {', '.join(left)}" if left else ""
    log.info("%s: reads the split %s%s", data, chosen, also)
    return chosen


def _splits(folder: Path, listed: Sequence[Path]) -> dict[str, list[PurePosixPath]]:
    """Split -> its files, relative to the folder."""
    resolver = datasets_library().data_files
    files = [PurePosixPath(file.relative_to(folder)) for file in listed]
    # numbered files name any split in a repository's `data`; the folder may be that one
    inner = "data" if all(len(file.parts) == 1 for file in files) else "."
    with TemporaryDirectory() as name:
        base = Path(name).resolve()
        for file in files:
            copy = base / inner / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.touch()
        try:
            found = resolver.DataFilesDict.from_patterns(
                resolver.get_data_patterns(str(base)), str(base)
            )
        except ValueError as error:
            raise DataError(f"{folder}: {error}. Rename the files.") from error
        root = base / inner
        # several patterns may find a file
        splits = {
            str(split): sorted({PurePosixPath(Path(file).relative_to(root)) for file in of_split})
            for split, of_split in found.items()
        }
    for file in files:
        homes = [split for split, of_split in splits.items() if file in of_split]
        if len(homes) != 1:
            what = f"may be any of the splits {', '.join(homes)}" if homes else "names no split"
            raise DataError(
                f"{folder}: {file} {what}, beside files of {', '.join(splits)}, so what it is for "
                "cannot be told. Name it as the Hugging Face hub does (train.parquet, "
                "data/train-00000-of-00001.parquet, train/0000.parquet), move it away, or give the "
                "one file with --data."
            )
    return splits


def _refuse_several_sets(folder: Path, files: Sequence[PurePosixPath], split: str) -> None:
    """Refuse folders that are data sets of their own, as the hub's configurations are."""
    sets = sorted({_set_of(file, split) for file in files})
    if len(sets) > 1:
        raise DataError(
            f"{folder}: holds several data sets: {', '.join(map(str, sets[:8]))}"
            f"{' …' if len(sets) > 8 else ''}. Give one with --data {folder / sets[0]}, or list "
            "them in a mixture."
        )


def _set_of(file: PurePosixPath, split: str) -> PurePosixPath:
    """The folder in which the split's own folder or file stands."""
    outer = PurePosixPath()
    for part in file.parent.parts:
        if split in part:
            break
        outer /= part
    return outer


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)
