"""Reads LLaVA's JSON: a list of `{id, image, conversations: [{from, value}]}`.

Every entry is checked before training starts, so a bad one is found in the first second and not in
the third hour. Entries without an `image` are text-only samples, as in LLaVA's instruction mix;
`image` may be a list, with as many `<image>` in the human turns, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vqguard.bounded import read_bytes
from vqguard.errors import ConfigError, DataError, InputError
from vqguard.recipes.data.image_roots import ImageRoot, image_root
from vqguard.recipes.data.samples import IMAGE_MARK, Sample, misfit
from vqguard.text_files import parse_json

MAX_ENTRIES = 2 * 2**30
"""Bytes of a data file; its entries are kept in memory. LLaVA's mix of 665 000 has 1 GB."""
_ROLES = ("human", "gpt")


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
    ) -> LlavaData:
        """Make the samples of `data` one by one.

        Args:
            makers: each makes a sample, or raises what is wrong with it.
            kind: what the format calls one, as in "row".
            seed: order in which samples are used.
            skip_bad: leave bad ones out and list them, instead of stopping at the first.

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
    makers = (
        partial(sample_of, entry, root, f"{data}, entry {number}", number, decode=skip_bad)
        for number, entry in enumerate(entries)
    )
    return LlavaData.collect(data, makers, kind="entry", seed=seed, skip_bad=skip_bad)


def read_entries(data: Path) -> list[Any]:
    """The entries of a file in LLaVA's JSON, unchecked. Raises `DataError`."""
    try:
        # whoever wrote it may have written NaN into keys that nobody reads here
        text = read_bytes(data, MAX_ENTRIES, DataError).decode("utf-8")
        entries = parse_json(text, str(data), strict=False)
    except DataError as error:
        raise DataError(f"{error}. Check --data.") from error
    except (UnicodeDecodeError, ConfigError) as error:
        raise DataError(f"{data}: expected a JSON list of entries; {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{data}: expected a non-empty JSON list of entries.")
    return entries


def sample_of(
    entry: Any, root: ImageRoot, where: str, number: int, *, decode: bool = False
) -> Sample:
    """One entry of LLaVA's JSON, checked; with `decode` its pictures too, to the last byte.

    Raises:
        InputError: beginning with `where`.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, got {type(entry).__name__}.")
    name = str(entry.get("id", number))
    if not _is_text(name):
        raise DataError(f"{where}: its id {name!r} holds half a character. Write it in UTF-8.")
    where = f"{where} (id {name})"
    turns = read_turns(entry.get("conversations"), where)
    pictures = entry.get("image")
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


def _is_text(value: str) -> bool:
    """Whether it can be encoded: JSON can write half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def mark_first(question: str) -> str:
    """The question with its picture in front, where it has exactly one; several stay in place.

    As LLaVA trains (LLaVA-NeXT, `llava/train/train.py`, `preprocess_multimodal`).
    """
    if question.count(IMAGE_MARK) != 1:
        return question.strip()
    return f"{IMAGE_MARK}\n{question.replace(IMAGE_MARK, '').strip()}".strip()


def read_turns(conversations: Any, where: str) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs of LLaVA's `conversations`.

    Raises:
        DataError: naming `where`.
    """
    if not isinstance(conversations, list) or not conversations:
        raise DataError(f"{where}: expected a non-empty list 'conversations'.")
    if len(conversations) % 2:
        raise DataError(
            f"{where}: expected human and gpt turns in pairs, got {len(conversations)} turns."
        )
    texts = []
    for place, turn in enumerate(conversations):
        expected = _ROLES[place % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise DataError(f"{where}: turn {place} must be {{'from': …, 'value': text}}.")
        if turn.get("from") != expected:
            raise DataError(
                f"{where}: turn {place} is from {turn.get('from')!r}, expected {expected!r}; turns "
                f"alternate between {_ROLES[0]!r} and {_ROLES[1]!r}."
            )
        if not _is_text(turn["value"]):
            raise DataError(f"{where}: turn {place} holds half a character. Write it in UTF-8.")
        if expected == "gpt" and not turn["value"].strip():
            raise DataError(f"{where}: turn {place} is an empty answer.")
        texts.append(turn["value"])
    return tuple(zip(map(mark_first, texts[::2]), texts[1::2], strict=True))
