"""Reads WebDataset shards: tars in which the files of a sample share a name up to its first dot.

A sample is an image (`records.unread.PICTURES`) or a video (`vqguard.videos.ENDINGS`) beside a
`.json` with LLaVA's `conversations`, or beside a `.txt` with a caption. Both may be there, as
img2dataset writes them: where the JSON holds no conversation, the text is the caption. Only names
and places are kept in memory; texts and images are read from the tars when they are asked for, so a
set may be larger than memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from vqguard.errors import DataError
from vqguard.recipes.data.image_roots import ImageRoot, TarRoot, read_at_most
from vqguard.recipes.data.llava_json import sample_of
from vqguard.recipes.data.media.named import MEDIA_KEYS, Looking, Media
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
from vqguard.recipes.data.samples import IMAGE_MARK, VIDEO_MARK, Sample
from vqguard.recipes.data.splits import shards_of_split
from vqguard.text_files import parse_json
from vqguard.videos import ENDINGS as VIDEOS
from vqguard.videos import FRAMES

PROMPT, VIDEO_PROMPT = "Describe the image.", "Describe the video."
"""The question of a sample that has only a caption."""
MAX_TEXT = 16 * 2**20
"""Largest `.json` or `.txt` of a sample, in bytes."""
_READ = frozenset({*PICTURES, *VIDEOS, "json", "txt"})


def read_shards(
    data: Path,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    check: CheckSample | None = None,
    known: Checked | None = None,
    made_up: str = "",
    frames: int = FRAMES,
    split: str | None = None,
) -> LlavaData:
    """Check every sample of a tar, or of a folder's tars in the order of their names.

    Args:
        data: a `.tar`, or a folder with some.
        seed: order in which samples are used.
        skip_bad: leave bad samples out and list them, instead of refusing the shards.
        check: what each sample must pass besides.
        known: what an earlier pass found out.
        made_up: what the samples' ids begin with, which are the names of their files.
        frames: how many of a video are shown.
        split: which of several that the shards' names tell apart; None: the only one, or `train`.

    Raises:
        DataError: no shards there, no such split, or a shard or sample that does not fit, by name.
    """
    shards = [data]
    if data.is_dir():
        shards = shards_of_split(data, split)
    elif split is not None:
        raise DataError(f"{data}: is one file, so the split {split!r} cannot be chosen.")
    if not shards:
        raise DataError(f"{data}: no .tar in this folder. Give the shards' folder with --data.")
    found = _Shards(shards, made_up, frames)
    if data.is_dir():
        others = [file for file in data.iterdir() if file.suffix.lower() != ".tar"]
        found.unread.update(f"{file.suffix or file.name} beside the shards" for file in others)
    return LlavaData.collect(data, found, seed=seed, skip_bad=skip_bad, check=check, known=known)


class _Shards:
    """The samples of tars, as `data_set.Records`."""

    places = NOWHERE

    def __init__(self, shards: list[Path], made_up: str, frames: int) -> None:
        self.unread: Counter[str] = Counter()
        self._made_up = made_up
        self._found: list[tuple[Media, str, dict[str, str]]] = []
        for root in map(TarRoot, shards):
            media = Media(root, frames)
            samples = _samples(root, self.unread).items()
            self._found += [(media, key, parts) for key, parts in samples]

    def __len__(self) -> int:
        return len(self._found)

    def checked(self, decode: bool) -> Iterator[Callable[[], Sample]]:
        return (partial(self._sample, number, decode) for number in range(len(self)))

    def sample(self, number: int) -> Sample:
        return self._sample(number, None)

    def _sample(self, number: int, decode: bool | None) -> Sample:
        """A sample; with `decode` None nothing of it is checked or counted."""
        media, key, parts = self._found[number]
        look = None if decode is None else Looking(media, decode=decode)
        unread = Counter[str]() if decode is None else self.unread
        entry = _learnt(media.root, key, parts, unread, self._made_up)
        where = f"{media.root.path}, sample {key}"
        return sample_of(entry, media, where, key, look=look, unread=unread)


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


def _learnt(
    root: ImageRoot, key: str, parts: dict[str, str], unread: Counter[str], made_up: str
) -> dict[str, Any]:
    """A sample as an entry of LLaVA's JSON, whose paths are names in the shard."""
    where = f"{root.path}, sample {key}"
    images, videos = sorted(PICTURES & parts.keys()), sorted(VIDEOS & parts.keys())
    media = [*images, *videos]
    if len(media) > 1:
        raise DataError(f"{where}: has {' and '.join(media)}; a sample holds one image or video.")
    _refuse_other_media(parts, where)
    entry = _entry(root, parts, where) if "json" in parts else {}
    read = {*media, "json"}
    named = next((kind for kind in MEDIA_KEYS if entry.get(kind)), None)
    if named is not None and not media:
        raise DataError(
            f"{where}: its JSON names {named!r}, and no picture or video of this name is in the "
            "shard. Leave the key out if the text stands without it."
        )
    # the shard says which image or video belongs to the sample, whatever path the JSON remembers
    shown = "video" if videos else "image"
    remembered = entry.pop(f"{shown}s", None)
    if isinstance(remembered, list) and len(remembered) > 1:
        raise DataError(f"{where}: its JSON names {len(remembered)} {shown}s; a sample holds one.")
    if "conversations" not in entry:
        if "txt" not in parts:
            what = "whose JSON has no 'conversations'" if "json" in parts else "without .json"
            raise DataError(f"{where}: has neither .json nor .txt to learn from: {what}.")
        read.add("txt")
        mark, prompt = (VIDEO_MARK, VIDEO_PROMPT) if videos else (IMAGE_MARK, PROMPT)
        caption = _text(root, parts["txt"], where).strip()
        turns = [f"{mark}\n{prompt}" if media else prompt, caption]
        refuse_media(entry, (shown,), where)
        count_unread(unread, entry, ())
        entry = {
            "conversations": [
                {"from": role, "value": text}
                for role, text in zip(("human", "gpt"), turns, strict=True)
            ],
        }
    unread.update(f".{ending}" for ending in parts if ending not in read)
    return {**entry, "id": made_up + key, shown: parts[media[0]] if media else None}


def _entry(root: ImageRoot, parts: dict[str, str], where: str) -> dict[str, Any]:
    # img2dataset writes NaN where it knows nothing
    entry = parse_json(_text(root, parts["json"], where), where, strict=False)
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected a JSON object, got {type(entry).__name__}.")
    return entry


def _refuse_other_media(parts: dict[str, str], where: str) -> None:
    for ending, name in parts.items():
        last = ending_of(f"x.{ending}")
        dotted = last != ending and last in _READ
        if dotted and not _READ & parts.keys():
            raise DataError(
                f"{where}: {name!r} has a dot in its name. Everything behind the first dot is the "
                "ending, as in WebDataset. Name it without."
            )
        if last in OTHER_MEDIA or (last != ending and last in PICTURES | VIDEOS):
            raise DataError(
                f"{where}: {name!r} is not read: a sample is one picture "
                f"(.{', .'.join(sorted(PICTURES))}) or video (.{', .'.join(sorted(VIDEOS))}) and "
                "its text. Leave it out of the shard if the text stands without it."
            )


def _text(root: ImageRoot, name: str, where: str) -> str:
    with root.stream(name) as stream:
        content = read_at_most(stream, MAX_TEXT)
    if content is None:
        raise DataError(f"{where}: {name} is larger than {MAX_TEXT:,} bytes.")
    try:
        return decode_text(content)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {name} is not UTF-8 ({error}).") from error
