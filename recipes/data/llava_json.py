"""Reads LLaVA's JSON: a list of `{id, image, conversations: [{from, value}]}`, or JSONL.

Every entry is checked before training starts, so a bad one is found in the first second and not in
the third hour. Entries without an `image` are text-only samples, as in LLaVA's instruction mix;
`image` may be a list, with as many `<image>` in the human turns, in order. The same goes for
`video` and `<video>`, or `<image>` where there are videos alone.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqguard.errors import DataError, InputError
from vqguard.recipes.data.image_roots import Size, image_root
from vqguard.recipes.data.media.ahead import in_blocks, worth_it
from vqguard.recipes.data.media.named import MEDIA_KEYS, Looking, Media, names_of
from vqguard.recipes.data.records.checked import Checked, CheckSample
from vqguard.recipes.data.records.data_set import LlavaData
from vqguard.recipes.data.records.json_entries import JsonEntries
from vqguard.recipes.data.records.turns import is_text, read_turns
from vqguard.recipes.data.records.unread import count_unread, refuse_media
from vqguard.recipes.data.samples import Sample, misfit
from vqguard.videos import FRAMES, ClipSize

_KEYS = ("id", *MEDIA_KEYS, "conversations", "messages")

MakeSample = Callable[..., Sample]
"""Makes a sample of an entry, with `sample_of`'s arguments."""


def read_llava(
    data: Path,
    images: Path | None,
    *,
    seed: int = 0,
    skip_bad: bool = False,
    check: CheckSample | None = None,
    known: Checked | None = None,
    made_up: str = "",
    follow_links: bool = False,
    frames: int = FRAMES,
) -> LlavaData:
    """Check a LLaVA-format file; its entries are read again, one by one, when they are asked for.

    Images are checked by their headers; with `skip_bad` each is decoded once, so that a
    truncated one is left out here and cannot stop the training.

    Args:
        data: the JSON file.
        images: folder, zip or tar that the entries' image paths start from; default the file's own
            folder.
        seed: order in which samples are used.
        skip_bad: leave bad entries out and list them, instead of refusing the file.
        check: what each sample must pass besides.
        known: what an earlier pass found out.
        made_up: what the ids of entries without one begin with.
        follow_links: as of `image_roots.FolderRoot`.
        frames: how many of a video are shown.

    Raises:
        DataError: a file or an entry that does not fit, with its place and the remedy.
    """
    root = image_root(images if images is not None else data.parent, follow_links=follow_links)
    records = LlavaEntries(data, Media(root, frames), made_up)
    return LlavaData.collect(data, records, seed=seed, skip_bad=skip_bad, check=check, known=known)


def read_entries(data: Path) -> list[Any]:
    """The entries of a small file in LLaVA's JSON, or of JSONL, unchecked.

    Raises:
        DataError: it is no list of entries, or an empty one.
    """
    entries = [entry.value for entry in JsonEntries(data)]
    if not any(entries):
        raise DataError(f"{data}: expected a non-empty JSON list of entries.")
    return entries


class LlavaEntries:
    """The entries of a LLaVA-format file, as `data_set.Records`.

    Args:
        data: the file.
        media: the pictures and videos that the entries name.
        made_up: what the ids of entries without one begin with.
        make: reads an entry of another form; called as `sample_of`.
    """

    def __init__(
        self, data: Path, media: Media, made_up: str, make: MakeSample | None = None
    ) -> None:
        self.data = data
        self.unread: Counter[str] = Counter()
        self._media = media
        self._made_up = made_up
        self._make = make or sample_of
        self._entries = JsonEntries(data)
        self.places: NDArray[np.int64] = np.empty((0, 2), dtype=np.int64)

    def __len__(self) -> int:
        return 0  # nobody knows before they were read

    def checked(self, decode: bool) -> Iterator[Callable[[], Sample]]:
        look = Looking(self._media, decode=decode, ahead=worth_it(self._entries.size))
        places = array("q")
        empty = True
        with closing(look):
            for block, following in in_blocks(enumerate(self._entries)):
                if not places:
                    look.expect(entry.value for _, entry in block)
                look.expect(entry.value for _, entry in following)
                for number, entry in block:
                    places.extend((entry.start, entry.end))
                    empty = empty and not entry.value
                    yield partial(self._sample, entry.value, number, look)
        if empty:
            raise DataError(f"{self.data}: expected a non-empty JSON list of entries.")
        self.places = np.frombuffer(places, dtype=np.int64).reshape(-1, 2)

    def sample(self, number: int) -> Sample:
        start, end = map(int, self.places[number])
        return self._sample(self._entries.at(start, end), number)

    def _sample(self, entry: Any, number: int, look: Looking | None = None) -> Sample:
        where = f"{self.data}, entry {number}"
        unread = None if look is None else self.unread
        name = f"{self._made_up}{number}"
        return self._make(entry, self._media, where, name, look=look, unread=unread)


def sample_of(
    entry: Any,
    media: Media,
    where: str,
    name: str,
    *,
    look: Looking | None,
    unread: Counter[str] | None = None,
) -> Sample:
    """One entry of LLaVA's JSON, checked.

    Args:
        entry: as it was read.
        media: where its pictures and videos are.
        where: how messages call it.
        name: its id, where it has none.
        look: gives the size of a picture or a video, or raises what is wrong with it; None: that
            was seen to.
        unread: counts its keys that are not read; one that holds a medium is refused.

    Raises:
        InputError: beginning with `where`.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, got {type(entry).__name__}.")
    name = str(entry.get("id", name))
    if isinstance(entry.get("annotations"), list):
        raise DataError(
            f"{where}: holds 'annotations', as COCO's files do, whose captions stand apart from "
            "their images. Write an entry for each image: {id, image, conversations}."
        )
    if not is_text(name):
        raise DataError(f"{where}: its id {name!r} holds half a character. Write it in UTF-8.")
    where = f"{where} (id {name})"
    if entry.get("conversations") is not None and entry.get("messages") is not None:
        raise DataError(f"{where}: has 'conversations' and 'messages'. Keep one of them.")
    pictures, videos = (names_of(entry, kind, where) for kind in ("image", "video"))
    said = entry.get("messages", entry.get("conversations"))
    turns = read_turns(said, where, unread, len(pictures), len(videos))
    refuse_media(entry, _KEYS, where)
    if unread is not None:
        count_unread(unread, entry, _KEYS)
    problem = misfit(turns, len(pictures), len(videos))
    if problem:
        raise DataError(f"{where}: {problem}")
    sizes: list[Size] = []
    clips: list[ClipSize] = []
    if look is not None:
        try:
            sizes = [look.picture(picture) for picture in pictures]
            clips = [look.clip(video) for video in videos]
        except InputError as error:
            raise type(error)(f"{where}: {str(error).rstrip('.')}.") from error
    if unread is not None and any(clip.sound for clip in clips):
        unread["sound of videos"] += sum(clip.sound for clip in clips)
    return Sample(
        name,
        tuple(map(media.picture, pictures)),
        turns,
        sizes=tuple(sizes),
        videos=tuple(map(media.clip, videos)),
        clip_sizes=tuple(clips),
    )
