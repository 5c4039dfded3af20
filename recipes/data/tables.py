"""Reads Hugging Face datasets on disk: folders that `datasets` saved, and parquet files.

The tables stay on the disk, as memory maps; a text and a picture's bytes are read when they are
asked for. Pictures are decoded by this package and not by
`datasets`, so its limits hold. Nothing is executed: `datasets` 4 has no scripts, and only columns
of plain values, lists and pictures are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from PIL import Image

from vqguard.errors import DataError, InputError
from vqguard.images import check_header, decode_image
from vqguard.names import nearest
from vqguard.recipes.data.image_roots import MAX_BYTES, ImageRoot, Size, image_root
from vqguard.recipes.data.records.checked import NOWHERE, Checked, CheckSample
from vqguard.recipes.data.records.data_set import LlavaData
from vqguard.recipes.data.records.turns import read_turns
from vqguard.recipes.data.records.unread import is_media_key
from vqguard.recipes.data.samples import IMAGE_MARK, Sample, misfit
from vqguard.recipes.data.splits import (
    choose_split,
    datasets_library,
    files_of_split,
    parquet_files,
)
from vqguard.recipes.data.unpacking import PARQUET, SAVED, open_within_limits
from vqguard.recipes.data.webdataset import PROMPT
from vqguard.recipes.recipe import ColumnRecipe
from vqguard.text_files import read_json

_SAVED, _SAVED_SPLITS = "dataset_info.json", "dataset_dict.json"
_IMAGES, _TURNS = ("image", "images"), ("conversations", "messages", "texts")


def is_table(data: Path) -> bool:
    """Whether this is a Hugging Face dataset on disk.

    A folder of shards is none, if each parquet file has a shard's name: img2dataset keeps what it
    knows of a shard beside it.

    Raises:
        DataError: a folder with tars and other parquet files.
    """
    if not data.is_dir():
        return data.suffix.lower() == ".parquet"
    if any((data / name).is_file() for name in (_SAVED, _SAVED_SPLITS)):
        return True
    tables = parquet_files(data)
    shards = {file.stem for file in data.iterdir() if file.suffix.lower() == ".tar"}
    others = [file for file in tables if file.stem not in shards]
    if shards and others:
        raise DataError(
            f"{data}: holds shards (.tar) and {others[0].name}, so which of them the data are "
            "cannot be told. Move one kind away, or give the one file with --data."
        )
    return bool(tables) and not shards


def read_table(
    data: Path,
    images: Path | None,
    columns: ColumnRecipe,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    check: CheckSample | None = None,
    known: Checked | None = None,
    made_up: str = "",
    follow_links: bool = False,
) -> LlavaData:
    """Read and check every row of a Hugging Face dataset.

    Parquet is not made for reading single rows: `datasets` copies it once into its cache
    (`HF_DATASETS_CACHE`), where it takes about as much room again.

    Args:
        data: a folder or a `.parquet` file.
        images: root of pictures that are named by path; default the data's own folder.
        columns: what to read; see `ColumnRecipe`.
        seed: order in which samples are used.
        skip_bad: leave bad rows out and list them, instead of refusing the data; each picture
            is decoded once then.
        check: what each sample must pass besides.
        known: what an earlier pass found out.
        made_up: what the ids of rows without one begin with.
        follow_links: as of `image_roots.FolderRoot`.

    Raises:
        ConfigError: `datasets` is not installed.
        DataError: a folder, a column or a row that does not fit, by name.
    """
    table = _load(data, columns.split)
    rows = _Rows(data, table, columns, images, seed)
    rows.made_up, rows.follow_links = made_up, follow_links
    return LlavaData.collect(data, rows, seed=seed, skip_bad=skip_bad, check=check, known=known)


class _Rows:
    """The rows of a table, as `data_set.Records`. Pickles as the paths of its memory maps."""

    places = NOWHERE
    made_up = ""
    follow_links = False

    def __init__(
        self, data: Path, table: Any, wanted: ColumnRecipe, images: Path | None, seed: int
    ) -> None:
        self.data = data
        self._seed = seed
        names = list(table.column_names)
        self._images = _column(data, names, wanted.images, _IMAGES, "images")
        self._caption = _column(data, names, wanted.caption, (), "caption")
        known = () if self._caption else _TURNS
        self._turns = _column(data, names, wanted.turns, known, "turns")
        self._id = _column(data, names, wanted.id, ("id",), "id")
        if not self._turns and not self._caption:
            raise DataError(
                f"{data}: expected a column {' or '.join(_TURNS)}, found {', '.join(names)}. Name "
                "it with --set columns.turns=NAME, or a caption with --set columns.caption=NAME."
            )
        used = [self._images, self._caption, self._turns, self._id]
        chosen = list(dict.fromkeys(name for name in used if name))
        left = [name for name in names if name not in chosen]
        # who names the pictures' column has chosen it among those there are
        self._media = [] if wanted.images else [n for n in left if _is_media(n, table.features[n])]
        self.unread = Counter({f"column {name!r}": len(table) for name in left})
        self._table = table.select_columns([*chosen, *self._media])
        for name in chosen:
            _refuse_odd(data, name, self._table.features[name])
        self._root: ImageRoot | None = None
        self._where = images

    def __len__(self) -> int:
        return len(self._table)

    def checked(self, decode: bool) -> Iterator[Callable[[], Sample]]:
        return (partial(self._sample, row, decode) for row in range(len(self)))

    def sample(self, number: int) -> Sample:
        return self._sample(number, None)

    def _sample(self, row: int, decode: bool | None) -> Sample:
        """A row; with `decode` None its pictures are not looked at, and nothing is counted.

        Raises:
            InputError: naming it.
        """
        name = f"{self.made_up}{row}"
        if self._id is not None:
            name = str(self._cell(self._id, row).as_py())
        where = f"{self.data}, row {row}" + (f" (id {name})" if self._id else "")
        for column in self._media:
            if _holds_something(self._cell(column, row)):
                raise DataError(
                    f"{where}: column {column!r} holds a medium that is not read. Videos and sound "
                    "are not trained on; choose the pictures' column with --set "
                    "columns.images=NAME, and the others are left out."
                )
        cells = self._pictures(row)
        unread = Counter[str]() if decode is None else self.unread
        wordings = self._wordings(row, len(cells), where, unread)
        problem = misfit(wordings[0], len(cells))
        if problem:
            raise DataError(f"{where}: {problem}")
        sizes: tuple[Size, ...] = ()
        if decode is not None:
            labels = [f"{where}, image {place + 1}" for place in range(len(cells))]
            look = self._decoded_size if decode else self._size
            sizes = tuple(look(cell, label) for cell, label in zip(cells, labels, strict=True))
        openers = tuple(_Picture(self, row, place) for place in range(len(cells)))
        return Sample(name, openers, wordings[0], tuple(wordings[1:]), sizes)

    def _wordings(
        self, row: int, images: int, where: str, unread: Counter[str]
    ) -> list[tuple[tuple[str, str], ...]]:
        """A row's conversation; of a list of captions one for each, in a seeded order."""
        cell = self._cell(cast(str, self._caption or self._turns), row).as_py()
        if not self._caption:
            return [read_turns(_turns_of(cell), where, unread, images)]
        captions = cell if isinstance(cell, list) else [cell]
        if not captions or not all(isinstance(caption, str) for caption in captions):
            raise DataError(
                f"{where}: expected a text or a list of texts in column {self._caption!r}, got "
                f"{str(cell)[:60]!r}."
            )
        order = np.random.default_rng([self._seed, row]).permutation(len(captions))
        asked = "\n".join([*[IMAGE_MARK] * images, PROMPT])
        return [
            read_turns(
                [{"from": "human", "value": asked}, {"from": "gpt", "value": captions[number]}],
                where,
            )
            for number in order
        ]

    def open(self, row: int, place: int) -> Image.Image:
        """A picture of a row."""
        return self._decode(
            self._pictures(row)[place], f"{self.data}, row {row}, image {place + 1}"
        )

    def _size(self, cell: Any, where: str) -> Size:
        with self._stream(cell, where) as stream:
            return check_header(stream, where)

    def _decoded_size(self, cell: Any, where: str) -> Size:
        return self._decode(cell, where).size

    def _decode(self, cell: Any, where: str) -> Image.Image:
        with self._stream(cell, where) as stream:
            return decode_image(stream, where)

    def _cell(self, column: str, row: int) -> Any:
        """An Arrow scalar, which copies nothing until it is asked to."""
        return self._table.data.column(column)[row]

    def _pictures(self, row: int) -> list[Any]:
        """The pictures of a row as Arrow scalars; none where the cell is null or an empty list."""
        if self._images is None:
            return []
        cell = self._cell(self._images, row)
        if not cell.is_valid:
            return []
        cells = list(cell.values) if hasattr(cell, "values") and _is_list(cell.type) else [cell]
        return [picture for picture in cells if picture.is_valid]

    def _stream(self, cell: Any, where: str) -> BinaryIO:
        """The file of a picture: {bytes, path}, bytes, or a path."""
        pa = _arrow()
        if pa.types.is_struct(cell.type):
            parts = {name: cell[name] for name in ("bytes", "path")}
            cell = parts["bytes"] if parts["bytes"].is_valid else parts["path"]
            if not cell.is_valid:
                raise DataError(f"{where}: has neither bytes nor a path.")
        if pa.types.is_string(cell.type) or pa.types.is_large_string(cell.type):
            return self._file(cell.as_py(), where)
        buffer = cell.as_buffer()
        if buffer.size > MAX_BYTES:
            raise DataError(f"{where}: is {buffer.size:,} bytes, at most {MAX_BYTES:,} are taken.")
        return cast(BinaryIO, pa.BufferReader(buffer))

    def _file(self, path: str, where: str) -> BinaryIO:
        if self._root is None:
            home = self.data if self.data.is_dir() else self.data.parent
            self._root = image_root(
                self._where if self._where is not None else home, follow_links=self.follow_links
            )
        try:
            return self._root.stream(path)
        except InputError as error:
            raise type(error)(f"{where}: {str(error).rstrip('.')}.") from error


@dataclass(frozen=True)
class _Picture:
    """Opens a picture of a row; equal to whatever opens the same one."""

    rows: _Rows
    row: int
    place: int

    def __call__(self) -> Image.Image:
        return self.rows.open(self.row, self.place)


def _arrow() -> Any:
    import pyarrow  # comes with `datasets`, which is an extra

    return pyarrow


def _load(data: Path, split: str | None) -> Any:
    """The table, memory-mapped."""
    datasets = datasets_library()
    try:
        if (data / _SAVED_SPLITS).is_file():
            listed = read_json(data / _SAVED_SPLITS, DataError)
            data = data / choose_split(data, [str(name) for name in listed["splits"]], split)
            split = None
        cache = str(datasets.config.HF_DATASETS_CACHE)
        if (data / _SAVED).is_file():
            if split is not None:
                raise DataError(f"{data}: has no splits, so {split!r} cannot be chosen.")
            open_within_limits(SAVED, [data], cache)
            return datasets.load_from_disk(str(data), keep_in_memory=False).with_format(None)
        if data.is_file() and split is not None:
            raise DataError(f"{data}: is one file, so the split {split!r} cannot be chosen.")
        files = files_of_split(data, split) if data.is_dir() else [data]
        open_within_limits(PARQUET, files, cache)
        return datasets.Dataset.from_parquet(
            [str(file) for file in files], keep_in_memory=False, cache_dir=cache
        )
    except DataError as error:
        if str(data) in str(error):
            raise
        raise DataError(f"{data}: cannot be read as a Hugging Face dataset ({error}).") from error
    except Exception as error:  # arrow, json, os and datasets' own: no common base class
        raise DataError(f"{data}: cannot be read as a Hugging Face dataset ({error}).") from error


def _column(
    data: Path, names: Sequence[str], wanted: str | None, usual: Sequence[str], what: str
) -> str | None:
    if wanted is None:
        return next((name for name in usual if name in names), None)
    if wanted not in names:
        raise DataError(
            f"{data}: has no column {wanted!r} (columns.{what}).{nearest(wanted, names)} It has "
            f"{', '.join(names)}."
        )
    return wanted


def _refuse_odd(data: Path, column: str, feature: Any) -> None:
    """Refuse what is not made of values, lists and pictures."""
    odd = [type(leaf).__name__ for leaf in _leaves(feature) if type(leaf).__name__ not in _PLAIN]
    if odd:
        raise DataError(
            f"{data}: column {column!r} holds {odd[0]}; expected values, lists and images."
        )


def _is_media(column: str, feature: Any) -> bool:
    kinds = {type(leaf).__name__ for leaf in _leaves(feature)}
    return is_media_key(column) or bool(kinds & {"Image", "Video", "Audio"})


def _holds_something(cell: Any) -> bool:
    """Whether a scalar is neither null nor an empty list."""
    return cell.is_valid and not (_is_list(cell.type) and len(cell.values) == 0)


_PLAIN = {"Value", "Image", "ClassLabel"}


def _leaves(feature: Any) -> Iterator[Any]:
    if isinstance(feature, dict):
        for part in feature.values():
            yield from _leaves(part)
    elif isinstance(feature, list):
        for part in feature:
            yield from _leaves(part)
    elif type(feature).__name__ in ("List", "LargeList", "Sequence"):
        yield from _leaves(feature.feature)
    else:
        yield feature


def _is_list(kind: Any) -> bool:
    types = _arrow().types
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    return any(test(kind) for test in tests)


def _turns_of(cell: Any) -> Any:
    """A cell's conversation as a list of turns; what is none is left for the reader."""
    if not isinstance(cell, dict):
        return cell
    # datasets' older form: one list a field
    fields = {name: values for name, values in cell.items() if isinstance(values, list)}
    return [dict(zip(fields, row)) for row in zip(*fields.values())]  # noqa: B905
