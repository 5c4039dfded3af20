"""Samples' tensors on disk: safetensors shards, read through memory maps, beside `index.json`.

The index says what made them, each shard's SHA-256, and where each sample's rows are. It is written
anew after every shard, so that what is killed goes on behind its last whole one.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from vqguard.errors import ArtefactError, ChecksumError, ConfigError
from vqguard.files import drafts, file_sha256, replace_text
from vqguard.recipes.data.records.lazy import LazySamples
from vqguard.recipes.data.samples import Sample
from vqguard.strict import StrictData
from vqguard.text_files import read_json

INDEX = "index.json"
MAX_INDEX = 2**30
"""Bytes of the index: 200 for a picture, of 5 million."""
_SPOT_CHECKS = 32


class Index(Protocol):
    """What `index.json` holds in every kind of store."""

    @property
    def identity(self) -> Any: ...
    @property
    def shards(self) -> list[str]: ...
    @property
    def samples(self) -> dict[str, Any]: ...


Place = TypeVar("Place")
"""Where a sample's rows are."""


class ShardStore(ABC, Generic[Place]):
    """A folder of shards. What it holds and how it is made is said by a subclass."""

    noun: ClassVar[str]
    """What it holds; shards are named by it."""
    maker: ClassVar[str]
    """What it was made by, where another one is refused."""
    index_type: ClassVar[Any]
    remedy: ClassVar[str]
    """What to do about a store that belongs to something else."""

    def __init__(self, folder: Path, identity: StrictData) -> None:
        """Open the store in ``folder``.

        Raises:
            ConfigError: its identity is another one.
            ArtefactError: its index is damaged.
        """
        self.folder = folder
        self.identity = identity
        self._shards: list[str] = []
        self._places: dict[str, Place] = {}
        self._open: dict[int, Any] = {}
        if (folder / INDEX).is_file():
            self._read()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps stay in their process; a worker opens its own.
        return {**self.__dict__, "_open": {}}

    def remove(self) -> None:
        """Delete the folder."""
        self._open.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def place(self, name: str) -> Place:
        """Where a sample is, by its id. Raises ArtefactError where it is not."""
        place = self._places.get(name)
        if place is None:
            raise ArtefactError(
                f"{self.folder} has no {self.noun} of sample {name!r}: the data changed since it "
                "was made. Remove the folder and go on with --resume."
            )
        return place

    def rows(self, shard: int, name: str, start: int, length: int) -> torch.Tensor:
        """Rows of a shard's tensor.

        Raises:
            ArtefactError: the shard cannot be read.
            ChecksumError: it is not the one that was written.
        """
        rows: torch.Tensor = self._shard(shard).get_slice(name)[start : start + length]
        return rows

    def add(self, tensors: Mapping[str, torch.Tensor], places: Mapping[str, Place]) -> None:
        """Write one more shard, the `next_shard`, and then the index."""
        path = self.folder / self.shard_name(self.next_shard)
        with drafts(path) as (draft,):
            save_file(dict(tensors), draft)
        self._shards.append(file_sha256(path))
        self._places |= places
        self._write()

    @property
    def next_shard(self) -> int:
        return len(self._shards)

    def shard_name(self, number: int) -> str:
        """The name of a shard's file."""
        return f"{self.noun}-{number:05d}.safetensors"

    def require_space(self, samples: int, a_shard: int, advice: str) -> None:
        """See that so many more samples have room, going by the first shard, which has `a_shard`.

        Raises:
            ConfigError: they have not; it ends with `advice`.
        """
        written = (self.folder / self.shard_name(0)).stat().st_size
        each = written / max(1, min(len(self), a_shard))
        needed, free = int(max(0, samples) * each), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConfigError(
                f"the {self.noun} of {samples} more samples need {needed / 1e9:.1f} GB in "
                f"{self.folder}, {free / 1e9:.1f} GB are free. {advice}"
            )

    @abstractmethod
    def sha256(self, place: Place) -> list[str]:
        """Of each picture whose rows are in this place; see `hashes`."""

    def hashes(self, sample: Sample) -> list[str]:
        """SHA-256 of all that the sample's rows are made of."""
        return [pixels_sha256(opener()) for opener in sample.images]

    def spot_check(self, samples: Sequence[Sample]) -> None:
        """Refuse a store of other pictures under the same ids, by looking at some of them."""
        if not len(self):  # to make every sample anew for nothing takes long
            return
        known = [place for place, sample in enumerate(samples) if sample.id in self]
        generator = np.random.default_rng(len(known))
        chosen = generator.permutation(len(known))[:_SPOT_CHECKS]
        for sample in (samples[known[int(i)]] for i in chosen):
            if self.hashes(sample) != self.sha256(self._places[sample.id]):
                raise ConfigError(
                    f"{self.folder} holds {self.noun} of another picture under the id "
                    f"{sample.id!r}: it was made from other data. {self.remedy}"
                )

    def missing(self, samples: LazySamples) -> LazySamples:
        """Those that are not in the store."""
        return samples.where(lambda sample: sample.id not in self) if len(self) else samples

    # -- the index

    def _index(self) -> dict[str, Any]:
        """What the index holds, as plain values."""
        return {
            "schema": self.index_type.schema_version,
            "identity": self.identity.to_dict(),
            "shards": self._shards,
            "samples": self._places,
        }

    def _take(self, index: Any) -> None:
        """Take over what was read."""
        self._shards, self._places = index.shards, index.samples

    def _read(self) -> None:
        path = self.folder / INDEX
        try:
            index = self.index_type.from_dict(read_json(path, ConfigError, MAX_INDEX))
        except ConfigError as error:
            raise ArtefactError(
                f"{path} is damaged, or of another version ({error}). Remove {self.folder} and go "
                "on with --resume."
            ) from error
        if index.identity != self.identity:
            wanted, found = self.identity.to_dict(), index.identity.to_dict()
            other = [name for name in wanted if wanted[name] != found[name]]
            raise ConfigError(
                f"{self.folder} holds {self.noun} of another {self.maker} (different: "
                f"{', '.join(other)}). {self.remedy}"
            )
        self._take(index)

    def _write(self) -> None:
        replace_text(self.folder / INDEX, json.dumps(self._index()))

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            path = self.folder / self.shard_name(number)
            try:
                found = file_sha256(path)
            except ArtefactError as error:
                raise ArtefactError(
                    f"{path} cannot be read ({error}). Remove {self.folder} and go on with "
                    "--resume."
                ) from error
            if found != self._shards[number]:
                raise ChecksumError(
                    f"{path}: its SHA-256 is {found}, the index says {self._shards[number]}. "
                    f"Remove {self.folder} and go on with --resume."
                )
            opened: Any = safe_open(path, framework="pt")
            self._open[number] = opened.__enter__()
        return self._open[number]


def pixels_sha256(picture: Image.Image) -> str:
    """SHA-256 of a picture's size, mode and pixels."""
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()
