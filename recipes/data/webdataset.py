"""Reads WebDataset shards: tars in which the files of a sample share a name up to its first dot.

A sample is an image (`.jpg`, `.png`, `.webp`) beside a `.json` with LLaVA's `conversations`, or
beside a `.txt` with a caption. Only names, places and texts are kept in memory; images are read
from the tars when they are asked for, so a set may be larger than memory.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from vqguard.errors import DataError
from vqguard.recipes.data.image_roots import TarRoot, read_at_most
from vqguard.recipes.data.llava_json import LlavaData, sample_of
from vqguard.recipes.data.samples import IMAGE_MARK, Sample
from vqguard.text_files import parse_json

PROMPT = "Describe the image."
"""The question of a sample that has only a caption."""
MAX_TEXT = 16 * 2**20
"""Largest `.json` or `.txt` of a sample, in bytes."""
_IMAGES = frozenset({"jpg", "jpeg", "png", "webp"})
_TEXTS = frozenset({"json", "txt"})


def read_shards(data: Path, *, seed: int = 0, skip_bad: bool = False) -> LlavaData:
    """Read and check every sample of a tar, or of a folder's tars in the order of their names.

    Args:
        data: a `.tar`, or a folder with some.
        seed: order in which samples are used.
        skip_bad: leave bad samples out and list them, instead of stopping at the first.

    Raises:
        DataError: no shards there, or a shard or sample that does not fit, by name.
    """
    shards = sorted(data.glob("*.tar")) if data.is_dir() else [data]
    if not shards:
        raise DataError(f"{data}: no .tar in this folder. Give the shards' folder with --data.")
    makers = (
        partial(_sample, root, key, parts, f"{root.path}, sample {key}", number, decode=skip_bad)
        for root in map(TarRoot, shards)
        for number, (key, parts) in enumerate(_samples(root).items())
    )
    return LlavaData.collect(data, makers, kind="sample", seed=seed, skip_bad=skip_bad)


def _samples(root: TarRoot) -> dict[str, dict[str, str]]:
    """Key -> ending -> member name, for the endings that are read; in the shard's order."""
    samples: dict[str, dict[str, str]] = {}
    for name in root.names:
        pure = PurePosixPath(name)
        stem, _, ending = pure.name.partition(".")
        if stem and ending.lower() in _IMAGES | _TEXTS:
            samples.setdefault(str(pure.with_name(stem)), {})[ending.lower()] = name
    return samples


def _sample(
    root: TarRoot, key: str, parts: dict[str, str], where: str, number: int, *, decode: bool
) -> Sample:
    images = sorted(_IMAGES & parts.keys())
    if len(images) > 1:
        raise DataError(f"{where}: has {' and '.join(images)}; a sample holds one image.")
    entry: Any
    if "json" in parts:
        entry = parse_json(_text(root, parts["json"], where), where)
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected a JSON object, got {type(entry).__name__}.")
    elif "txt" in parts:
        caption = _text(root, parts["txt"], where).strip()
        turns = [f"{IMAGE_MARK}\n{PROMPT}" if images else PROMPT, caption]
        entry = {
            "conversations": [
                {"from": role, "value": text}
                for role, text in zip(("human", "gpt"), turns, strict=True)
            ]
        }
    else:
        raise DataError(f"{where}: has neither .json nor .txt.")
    # the shard says which image belongs to the sample, whatever path the JSON remembers
    entry = {**entry, "id": key, "image": parts[images[0]] if images else None}
    return sample_of(entry, root, where, number, decode=decode)


def _text(root: TarRoot, name: str, where: str) -> str:
    with root.stream(name) as stream:
        content = read_at_most(stream, MAX_TEXT)
    if content is None:
        raise DataError(f"{where}: {name} is larger than {MAX_TEXT:,} bytes.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {name} is not UTF-8 ({error}).") from error
