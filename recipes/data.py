"""Reads LLaVA's JSON: a list of ``{id, image, conversations: [{from, value}]}``.

Every entry is checked before training starts, so a bad one is found in the first second and not in
the third hour. Entries without an ``image`` are text-only samples, as in LLaVA's instruction mix.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vqguard.errors import DataError, InputError
from vqguard.recipes.image_roots import ImageRoot, image_root
from vqguard.recipes.samples import Sample

IMAGE_TOKEN = "<image>"
_ROLES = ("human", "gpt")


@dataclass
class LlavaData:
    """Samples of one LLaVA-format file, or of shards.

    ``skipped`` lists what ``skip_bad`` left out, each with its reason.
    """

    samples: list[Sample]
    seed: int
    skipped: list[str] = field(default_factory=list)

    def captions(self, count: int) -> Sequence[Sample]:
        """Samples with a picture, in a seeded order, at most ``count``."""
        return self._shuffled([s for s in self.samples if s.image is not None])[:count]

    def instructions(self, count: int) -> Sequence[Sample]:
        """All samples in a seeded order, at most ``count``."""
        return self._shuffled(self.samples)[:count]

    def _shuffled(self, samples: list[Sample]) -> list[Sample]:
        order = np.random.default_rng(self.seed).permutation(len(samples))
        return [samples[int(i)] for i in order]


def read_llava(
    data: Path, images: Path | None, *, seed: int = 0, skip_bad: bool = False
) -> LlavaData:
    """Read and check a LLaVA-format file.

    Images are checked by their headers; with ``skip_bad`` each is decoded once, so that a
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
    entries = _entries(data)
    root = image_root(images if images is not None else data.parent)
    result = LlavaData([], seed)
    for number, entry in enumerate(entries):
        where = f"{data}, entry {number}"
        try:
            result.samples.append(sample_of(entry, root, where, number, decode=skip_bad))
        except InputError as error:
            if not skip_bad:
                raise DataError(f"{error} With --skip-bad the run goes on without it.") from error
            result.skipped.append(str(error))
    if not any(s.image for s in result.samples):
        raise DataError(f"{data}: no usable entry has an image, so there is nothing to quantise.")
    return result


def _entries(data: Path) -> list[Any]:
    try:
        entries = json.loads(data.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{data}: cannot be read ({error.strerror}). Check --data.") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{data}: expected a JSON list of entries; {error}.") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{data}: expected a non-empty JSON list of entries.")
    return entries


def sample_of(
    entry: Any, root: ImageRoot, where: str, number: int, *, decode: bool = False
) -> Sample:
    """One entry of LLaVA's JSON, checked; with ``decode`` its picture too, to the last byte.

    Raises `InputError` beginning with `where`.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, got {type(entry).__name__}.")
    name = str(entry.get("id", number))
    where = f"{where} (id {name})"
    turns = _turns(entry.get("conversations"), where)
    picture = entry.get("image")
    placeholders = sum(question.count(IMAGE_TOKEN) for question, _ in turns)
    if picture is None:
        if placeholders:
            raise DataError(f"{where}: has {IMAGE_TOKEN} in its text but no 'image'.")
        return Sample(name, None, turns)
    if not isinstance(picture, str):
        raise DataError(f"{where}: 'image' must be a path, got {type(picture).__name__}.")
    if placeholders != 1 or IMAGE_TOKEN not in turns[0][0]:
        raise DataError(
            f"{where}: expected exactly one {IMAGE_TOKEN}, in the first human turn, for its image; "
            f"found {placeholders}."
        )
    first = (turns[0][0].replace(IMAGE_TOKEN, "").strip(), turns[0][1])
    try:
        root.check(picture, decode=decode)
    except InputError as error:
        raise type(error)(f"{where}: {str(error).rstrip('.')}.") from error
    return Sample(name, root.opener(picture), (first, *turns[1:]))


def _turns(conversations: Any, where: str) -> tuple[tuple[str, str], ...]:
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
        if expected == "gpt" and not turn["value"].strip():
            raise DataError(f"{where}: turn {place} is an empty answer.")
        texts.append(turn["value"])
    return tuple(zip(texts[::2], texts[1::2], strict=True))
