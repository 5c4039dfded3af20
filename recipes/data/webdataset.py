"""Reads WebDataset shards: tars in which the files of a sample share a name up to its first dot.

A sample is an image (`records.unread.PICTURES`) beside a `.json` with LLaVA's `conversations`, or
beside a `.txt` with a caption. Both may be there, as img2dataset writes them: where the JSON holds
no conversation, the text is the caption. Only names and places are kept in memory; texts and
images are read from the tars when they are asked for, so a set may be larger than memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from vqguard.errors import DataError
from vqguard.recipes.data.image_roots import Size, TarRoot, read_at_most
from vqguard.recipes.data.llava_json import sample_of
from vqguard.recipes.data.records.checked import NOWHERE, Checked, CheckSample
from vqguard.recipes.data.records.data_set import LlavaData
from vqguard.recipes.data.records.decoding import decode_text
from vqguard.recipes.data.records.unread import (
    OTHER_MEDIA,
    PICTURES,
    count_unread,
    ending_of,
    refuse_media,
)
from vqguard.recipes.data.samples import IMAGE_MARK, Sample
from vqguard.text_files import parse_json

PROMPT = "Describe the image."
"""The question of a sample that has only a caption."""
MAX_TEXT = 16 * 2**20
"""Largest `.json` or `.txt` of a sample, in bytes."""
_TEXTS = frozenset({"json", "txt"})


def read_shards(
    data: Path,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    check: CheckSample | None = None,
    known: Checked | None = None,
    made_up: str = "",
) -> LlavaData:
    """Check every sample of a tar, or of a folder's tars in the order of their names.

    Args:
        data: a `.tar`, or a folder with some.
        seed: order in which samples are used.
        skip_bad: leave bad samples out and list them, instead of refusing the shards.
        check: what each sample must pass besides.
        known: what an earlier pass found out.
        made_up: what the samples' ids begin with, which are the names of their files.

    Raises:
        DataError: no shards there, or a shard or sample that does not fit, by name.
    """
    shards = [data]
    if data.is_dir():
        shards = sorted(file for file in data.iterdir() if file.suffix.lower() == ".tar")
    if not shards:
        raise DataError(f"{data}: no .tar in this folder. Give the shards' folder with --data.")
    return LlavaData.collect(
        data, _Shards(shards, made_up), seed=seed, skip_bad=skip_bad, check=check, known=known
    )


class _Shards:
    """The samples of tars, as `data_set.Records`."""

    places = NOWHERE

    def __init__(self, shards: list[Path], made_up: str) -> None:
        self.unread: Counter[str] = Counter()
        self._made_up = made_up
        self._found = [
            (root, key, parts)
            for root in map(TarRoot, shards)
            for key, parts in _samples(root, self.unread).items()
        ]

    def __len__(self) -> int:
        return len(self._found)

    def checked(self, decode: bool) -> Iterator[Callable[[], Sample]]:
        return (partial(self._sample, number, decode) for number in range(len(self)))

    def sample(self, number: int) -> Sample:
        return self._sample(number, None)

    def _sample(self, number: int, decode: bool | None) -> Sample:
        """A sample; with `decode` None nothing of it is checked or counted."""
        root, key, parts = self._found[number]
        look = None if decode is None else partial(root.check, decode=decode)
        unread = Counter[str]() if decode is None else self.unread
        return _sample(root, key, parts, unread, look, self._made_up)


def _samples(root: TarRoot, unread: Counter[str]) -> dict[str, dict[str, str]]:
    """Key -> ending -> member name, in the shard's order."""
    samples: dict[str, dict[str, str]] = {}
    for name in root.names:
        pure = PurePosixPath(name)
        stem, _, ending = pure.name.partition(".")
        if stem:
            samples.setdefault(str(pure.with_name(stem)), {})[ending.lower()] = name
        else:
            unread["hidden files"] += 1
    return samples


def _sample(
    root: TarRoot,
    key: str,
    parts: dict[str, str],
    unread: Counter[str],
    look: Callable[[str], Size] | None,
    made_up: str,
) -> Sample:
    where = f"{root.path}, sample {key}"
    images = sorted(PICTURES & parts.keys())
    if len(images) > 1:
        raise DataError(f"{where}: has {' and '.join(images)}; a sample holds one image.")
    _refuse_other_media(parts, where)
    entry = _entry(root, parts, where) if "json" in parts else {}
    read = {*images, "json"}
    # the shard says which image belongs to the sample, whatever path the JSON remembers
    remembered = entry.pop("images", None)
    if isinstance(remembered, list) and len(remembered) > 1:
        raise DataError(f"{where}: its JSON names {len(remembered)} images; a sample holds one.")
    if "conversations" not in entry:
        if "txt" not in parts:
            what = "whose JSON has no 'conversations'" if "json" in parts else "without .json"
            raise DataError(f"{where}: has neither .json nor .txt to learn from: {what}.")
        read.add("txt")
        caption = _text(root, parts["txt"], where).strip()
        turns = [f"{IMAGE_MARK}\n{PROMPT}" if images else PROMPT, caption]
        refuse_media(entry, ("image",), where)
        count_unread(unread, entry, ())
        entry = {
            "conversations": [
                {"from": role, "value": text}
                for role, text in zip(("human", "gpt"), turns, strict=True)
            ],
        }
    unread.update(f".{ending}" for ending in parts if ending not in read)
    entry = {**entry, "id": made_up + key, "image": parts[images[0]] if images else None}
    return sample_of(entry, root, where, key, look=look, unread=unread)


def _entry(root: TarRoot, parts: dict[str, str], where: str) -> dict[str, Any]:
    # img2dataset writes NaN where it knows nothing
    entry = parse_json(_text(root, parts["json"], where), where, strict=False)
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(entry).__name__}.")
    return entry


def _refuse_other_media(parts: dict[str, str], where: str) -> None:
    for ending, name in parts.items():
        last = ending_of(f"x.{ending}")
        dotted = last != ending and last in PICTURES | _TEXTS
        if dotted and not (PICTURES | _TEXTS) & parts.keys():
            raise DataError(
                f"{where}: {name!r} has a dot in its name. Everything behind the first dot is the "
                "ending, as in WebDataset. Name it without."
            )
        if last in OTHER_MEDIA or (last != ending and last in PICTURES):
            raise DataError(
                f"{where}: {name!r} is not read: a sample is one picture "
                f"(.{', .'.join(sorted(PICTURES))}) and its text. Leave it out of the shard if the "
                "text stands without it."
            )


def _text(root: TarRoot, name: str, where: str) -> str:
    with root.stream(name) as stream:
        content = read_at_most(stream, MAX_TEXT)
    if content is None:
        raise DataError(f"{where}: {name} is larger than {MAX_TEXT:,} bytes.")
    try:
        return decode_text(content)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {name} is not UTF-8 ({error}).") from error
