"""Pictures as codes on disk: behind a frozen guard nothing else of them reaches a language model.

Stage 2 then trains without a vision encoder and without decoding a picture: 576 visual tokens are
1152 bytes. Codes are kept by sample and not by picture: how a processor writes a picture into the
text, or cuts it into tiles, may depend on the others, and a Q-Former reads the question.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from vqguard.adapters import get_adapter
from vqguard.adapters.codes import Form, Shape, VisualCodes
from vqguard.errors import SeamError
from vqguard.files import checksums, text_sha256
from vqguard.recipes.data.feature_cache import CacheIdentity
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.data.shard_store import ShardStore
from vqguard.strict import StrictData


@dataclass(frozen=True)
class CodeIdentity(StrictData):
    """What codes depend on besides the picture and the text around it."""

    guard_sha256: str
    site: str
    projector_sha256: str
    encoder: CacheIdentity
    kept_features: bool
    max_length: int

    @classmethod
    def of(
        cls, model: Any, processor: Any, max_length: int, *, kept_features: bool
    ) -> CodeIdentity:
        """The identity of a guarded model's way from pixels, or kept features, to codes."""
        guard, adapter = model.vqguard, get_adapter(model)
        books = [guard.patch, guard.semantic, *guard.deep]
        tensors: dict[str, torch.Tensor] = {}
        for number, module in enumerate(adapter.projectors(model)):
            tensors |= {f"{number}.{name}": value for name, value in module.state_dict().items()}
        static = adapter.static_vectors(model)
        if static is not None:
            tensors["static"] = static
        return cls(
            guard_sha256=text_sha256(" ".join(book.codebook.checksum() for book in books)),
            site=guard.config.site,
            projector_sha256=text_sha256(json.dumps(checksums(tensors), sort_keys=True)),
            encoder=CacheIdentity.of(model, processor),
            kept_features=kept_features,
            max_length=max_length,
        )


Runs = tuple[tuple[int, int], ...]
"""(number, how often in a row)."""


@dataclass(frozen=True)
class Numbers(StrictData):
    """A small tensor as the index holds it."""

    dtype: str
    shape: Shape
    values: list[int | float]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Numbers:
        kind = str(tensor.dtype).removeprefix("torch.")
        values = tensor.int() if tensor.dtype == torch.bool else tensor
        return cls(kind, tuple(tensor.shape), values.flatten().tolist())

    def tensor(self) -> torch.Tensor:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.tensor(self.values, dtype=dtype).reshape(self.shape)


@dataclass(frozen=True)
class Layout(StrictData):
    """All of a sample's pictures but their codes. Most samples of a data set share one."""

    pictures: int
    """Those that fit into the sequence."""
    tokens: tuple[int, ...]
    """Of each unit."""
    semantic: tuple[int, ...]
    positions: tuple[int, ...]
    form: Form
    deep_form: Form | None
    pixels: dict[str, Shape]
    dtype: str
    written: tuple[dict[str, Runs], ...]
    """What stands in the text for each picture: token ids, and what else has a number a token."""
    others: dict[str, Numbers]
    """What the image processor gives beside pixels."""


class Place(NamedTuple):
    """Where a sample's codes are."""

    shard: int
    start: int
    semantic: int
    layout: int
    sha256: list[str]


@dataclass(frozen=True)
class _Index(StrictData):
    schema_version: ClassVar[int] = 1

    schema: Literal[1]
    identity: CodeIdentity
    shards: list[str]
    samples: dict[str, Place]
    layouts: list[Layout]
    complete: bool


@dataclass(frozen=True)
class KeptCodes:
    """A sample's pictures: their codes, and how they stand in its text."""

    codes: VisualCodes
    layout: Layout

    def written(self, name: str) -> list[list[int]]:
        """What stands in the text for each picture: `input_ids`, or another input like them."""
        return [
            [number for number, times in runs.get(name, ()) for _ in range(times)]
            for runs in self.layout.written
        ]

    @property
    def per_token(self) -> list[str]:
        """Names of the other inputs that have a number for each token."""
        return sorted({name for runs in self.layout.written for name in runs} - {"input_ids"})

    @property
    def others(self) -> dict[str, torch.Tensor]:
        """What the image processor gave beside pixels."""
        return {name: numbers.tensor() for name, numbers in self.layout.others.items()}


class CodeCache(ShardStore[Place]):
    """An opened store of codes. Made by `build_codes`."""

    noun = "codes"
    maker = "guard, model or processor"
    index_type = _Index
    remedy = "Remove the folder and go on with --resume."

    def __init__(self, folder: Path, identity: CodeIdentity) -> None:
        """Open the store in ``folder``; raises as `ShardStore` does."""
        self._layouts: list[Layout] = []
        self._numbers: dict[str, int] = {}  # of each layout
        self.complete = False
        """Whether all samples that it was asked for are in it."""
        super().__init__(folder, identity)

    def _index(self) -> dict[str, Any]:
        layouts = [layout.to_dict() for layout in self._layouts]
        return {**super()._index(), "layouts": layouts, "complete": self.complete}

    def _take(self, index: _Index) -> None:
        super()._take(index)
        self._layouts, self.complete = index.layouts, index.complete
        for number, layout in enumerate(index.layouts):
            self._numbers[json.dumps(layout.to_dict(), sort_keys=True)] = number

    def __getitem__(self, name: str) -> KeptCodes:
        """A sample's codes, by its id.

        Raises:
            ArtefactError: no such sample, or its shard cannot be read.
            ChecksumError: the shard is not the one that was written.
        """
        place = self.place(name)
        layout = self._layouts[place.layout]
        sizes = list(layout.tokens)
        tokens = self.rows(place.shard, "tokens", place.start, sum(sizes))
        semantic = self.rows(place.shard, "semantic", place.semantic, sum(layout.semantic))
        deep: list[list[torch.Tensor]] = []
        if layout.deep_form is not None:
            rows = self.rows(place.shard, "deep", place.start, sum(sizes)).int()
            deep = [list(torch.split(level, sizes)) for level in rows.unbind(1)]
        codes = VisualCodes(
            list(torch.split(tokens.int(), sizes)),
            list(torch.split(semantic.int(), list(layout.semantic))),
            tuple(deep),
            layout.form,
            layout.deep_form,
            list(layout.positions),
            layout.pixels,
            getattr(torch, layout.dtype),
        )
        return KeptCodes(codes, layout)

    def sha256(self, place: Place) -> list[str]:
        return place.sha256

    def hashes(self, sample: Sample) -> list[str]:
        text = text_sha256(json.dumps(sample.turns))
        return [*super().hashes(sample), text]

    def finish(self) -> None:
        """Say that all samples are in it."""
        self.complete = True
        self._write()

    def number(self, layout: Layout) -> int:
        """The layout's number; raises SeamError where no batch could hold it beside the others."""
        key = json.dumps(layout.to_dict(), sort_keys=True)
        if key not in self._numbers:
            for first in self._layouts[:1]:
                Form.joined([first.form, layout.form])
                if first.dtype != layout.dtype or first.pixels.keys() != layout.pixels.keys():
                    raise SeamError("pictures of several samples are read in different ways")
            self._numbers[key] = len(self._layouts)
            self._layouts.append(layout)
        return self._numbers[key]
