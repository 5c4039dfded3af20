"""Reads LLaVA's JSON: a list of `{id, image, conversations: [{from, value}]}`, or JSONL.

Every entry is checked before training starts, so a bad one is found in the first second and not in
the third hour. Entries without an `image` are text-only samples, as in LLaVA's instruction mix;
`image` may be a list, with as many `<image>` in the human turns, in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqguard.bounded import read_bytes
from vqguard.errors import ConfigError, DataError, InputError
from vqguard.recipes.data.image_roots import ImageRoot, image_root
from vqguard.recipes.data.records.decoding import decode_text
from vqguard.recipes.data.records.turns import is_text, read_turns
from vqguard.recipes.data.records.unread import count_unread, log_unread, refuse_media
from vqguard.recipes.data.samples import Sample, misfit
from vqguard.text_files import parse_json

MAX_ENTRIES = 2 * 2**30
"""Bytes of a data file; its entries are kept in memory. LLaVA's mix of 665 000 has 1 GB."""
_KEYS = ("id", "image", "images", "conversations", "messages")


@dataclass
class LlavaData:
    """Samples of one LLaVA-format file, of shards, or of a dataset on disk.

    `skipped` lists what `skip_bad` left out, each with its reason.
    """

    samples: list[Sample]
    seed: int
    skipped: list[str] = field(default_factory=list)

    @classmethod
    def collect(
        cls,
        data: Path,
        makers: Iterable[Callable[[], Sample]],
        *,
        kind: str,
        seed: int,
        skip_bad: bool,
        unread: Counter[str] | None = None,
    ) -> LlavaData:
        """Make the samples of `data` one by one.

        Args:
            makers: each makes a sample, or raises what is wrong with it.
            kind: what the format calls one, as in "row".
            seed: order in which samples are used.
            skip_bad: leave bad ones out and list them, instead of stopping at the first.
            unread: what the makers count as not read; the log says it.

        Raises:
            DataError: a bad one, or no picture in any.
        """
        result = cls([], seed)
        for make in makers:
            try:
                result.samples.append(make())
            except (InputError, ConfigError) as error:
                if not skip_bad:
                    raise DataError(
                        f"{error} With --skip-bad the run goes on without it."
                    ) from error
                result.skipped.append(str(error))
        log_unread(data, unread or Counter())
        if not any(sample.images for sample in result.samples):
            raise DataError(
                f"{data}: no usable {kind} has an image, so there is nothing to quantise."
            )
        return result

    def captions(self, count: int) -> Sequence[Sample]:
        """Samples with a picture, in a seeded order, at most `count`."""
        return self._shuffled([s for s in self.samples if s.images])[:count]

    def instructions(self, count: int) -> Sequence[Sample]:
        """All samples in a seeded order, at most `count`."""
        return self._shuffled(self.samples)[:count]

    def _shuffled(self, samples: list[Sample]) -> list[Sample]:
        order = np.random.default_rng(self.seed).permutation(len(samples))
        return [samples[int(i)] for i in order]


def read_llava(
    data: Path, images: Path | None, *, seed: int = 0, skip_bad: bool = False
) -> LlavaData:
    """Read and check a LLaVA-format file.

    Images are checked by their headers; with `skip_bad` each is decoded once, so that a
    truncated one is left out here and cannot stop the training.

    Args:
        data: the JSON file.
        images: folder, zip or tar that the entries' image paths start from; default the file's own
            folder.
        seed: order in which samples are used.
        skip_bad: leave bad entries out and list them, instead of stopping at the first.

    Raises:
        DataError: a file or an entry that does not fit, with its place and the remedy.
    """
    entries = read_entries(data)
    root = image_root(images if images is not None else data.parent)
    unread: Counter[str] = Counter()
    makers = (
        partial(
            sample_of,
            entry,
            root,
            f"{data}, entry {number}",
            number,
            decode=skip_bad,
            unread=unread,
        )
        for number, entry in enumerate(entries)
    )
    return LlavaData.collect(
        data, makers, kind="entry", seed=seed, skip_bad=skip_bad, unread=unread
    )


def read_entries(data: Path) -> list[Any]:
    """The entries of a file in LLaVA's JSON, or of JSONL, unchecked. Raises `DataError`."""
    try:
        text = decode_text(read_bytes(data, MAX_ENTRIES, DataError)).strip()
        # whoever wrote it may have written NaN into keys that nobody reads here
        if text.startswith("{"):
            lines = enumerate(text.split("\n"), 1)
            entries = [
                parse_json(line, f"{data}, line {number}", strict=False)
                for number, line in lines
                if line.strip()
            ]
        else:
            entries = parse_json(text, str(data), strict=False)
    except DataError as error:
        raise DataError(f"{error}. Check --data.") from error
    except (UnicodeDecodeError, ConfigError) as error:
        raise DataError(
            f"{data}: expected a JSON list of entries, or an entry a line; {error}."
        ) from error
    if not isinstance(entries, list) or not any(entries):
        raise DataError(f"{data}: expected a non-empty JSON list of entries.")
    return entries


def sample_of(
    entry: Any,
    root: ImageRoot,
    where: str,
    number: int,
    *,
    decode: bool = False,
    unread: Counter[str] | None = None,
) -> Sample:
    """One entry of LLaVA's JSON, checked; with `decode` its pictures too, to the last byte.

    `unread` counts its keys that are not read; one that holds a medium is refused.

    Raises:
        InputError: beginning with `where`.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, got {type(entry).__name__}.")
    name = str(entry.get("id", number))
    if not is_text(name):
        raise DataError(f"{where}: its id {name!r} holds half a character. Write it in UTF-8.")
    where = f"{where} (id {name})"
    if entry.get("conversations") is not None and entry.get("messages") is not None:
        raise DataError(f"{where}: has 'conversations' and 'messages'. Keep one of them.")
    said = entry.get("messages", entry.get("conversations"))
    turns = read_turns(said, where, unread)
    refuse_media(entry, _KEYS, where)
    if unread is not None:
        count_unread(unread, entry, _KEYS)
    if entry.get("image") is not None and entry.get("images"):
        raise DataError(f"{where}: has 'image' and 'images'. Put all its pictures into one.")
    pictures = entry.get("image")
    pictures = entry.get("images") if pictures is None else pictures
    pictures = [] if pictures is None else pictures if isinstance(pictures, list) else [pictures]
    for picture in pictures:
        if not isinstance(picture, str):
            raise DataError(
                f"{where}: 'image' must be a path or a list of paths, got {type(picture).__name__}."
            )
    problem = misfit(turns, len(pictures))
    if problem:
        raise DataError(f"{where}: {problem}")
    for picture in dict.fromkeys(pictures):
        try:
            root.check(picture, decode=decode)
        except InputError as error:
            raise type(error)(f"{where}: {str(error).rstrip('.')}.") from error
    return Sample(name, tuple(root.opener(picture) for picture in pictures), turns)
