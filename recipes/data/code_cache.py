"""Pictures as codes on disk: behind a frozen guard nothing else of them reaches a language model.

Stage 2 then trains without a vision encoder and without decoding a picture: 576 visual tokens are
1152 bytes. Codes are kept by sample and not by picture: how a processor writes a picture into the
text, or cuts it into tiles, may depend on the others, and a Q-Former reads the question.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from tqdm import tqdm

from vqguard.adapters import VisualFeatures, get_adapter
from vqguard.adapters.codes import Form, Shape, VisualCodes
from vqguard.adapters.runtime.code_training import (
    require_same_logits,
    units_of_rows,
    visual_codes,
)
from vqguard.errors import ConfigError, SeamError
from vqguard.files import checksums, text_sha256
from vqguard.recipes.data.code_dtypes import code_dtype
from vqguard.recipes.data.encoding import (
    CAPTION,
    ENCODER_SEMANTIC,
    ENCODER_TOKENS,
    Collator,
    EncodedSamples,
    Example,
    Whole,
    is_per_token,
    pad_id,
)
from vqguard.recipes.data.feature_cache import CacheIdentity
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.data.shard_store import ShardStore, pixels_sha256
from vqguard.recipes.image_batches import batches
from vqguard.recipes.processes import first_alone, is_first
from vqguard.strict import StrictData

log = logging.getLogger(__name__)

SHARD_SAMPLES = 8192
_LARGEST = 4096
"""Numbers that a sample may have beside its codes, as sizes of pictures and grids."""
_NO_SPACE = "Free some and go on with --resume, or set stage2.from_codes=false."


class NoCodesError(ConfigError):
    """Pictures cannot stand as codes, and the reason."""


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
    def of(cls, model: Any, data: EncodedSamples) -> CodeIdentity:
        """The identity of a guarded model's way from pixels to codes."""
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
            encoder=CacheIdentity.of(model, data.processor),
            kept_features=data.cache is not None,
            max_length=data.max_length,
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
    """An opened store of codes. Made by `build`."""

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

    # -- making it

    @classmethod
    def build(cls, folder: Path, model: Any, data: EncodedSamples) -> CodeCache:
        """Add what is missing to the store in ``folder``; a killed build goes on where it was.

        Codes of another guard, model or processor, which an earlier attempt left, are made again.

        Args:
            folder: of this run.
            model: guarded, where it computes; it is run in eval mode.
            data: the samples, with pixels or with the vision encoder's kept outputs.

        Raises:
            NoCodesError: pictures cannot stand as codes here.
            ConfigError: too little disk space.
            ArtefactError: the store is damaged.
            InputError: a picture that cannot be opened.
        """
        samples = _pictured(data.samples)
        identity = CodeIdentity.of(model, data)
        try:
            cache = cls(folder, identity)
            cache.spot_check(samples)
        except ConfigError as error:
            log.info("%s They are made again.", error)
            shutil.rmtree(folder)
            cache = cls(folder, identity)
        folder.mkdir(parents=True, exist_ok=True)
        missing = [sample for sample in samples if sample.id not in cache]
        model.eval()
        encoder = _Encoder(model, data)
        try:
            if missing:
                encoder.prove(missing[0])
            cache._add_all(encoder, missing)
        except SeamError as error:
            raise NoCodesError(f"{model.config.model_type}: {error}") from error
        cache.complete = True
        cache._write()
        return cache

    def hashes(self, sample: Sample) -> list[str]:
        text = text_sha256(json.dumps(sample.turns))
        return [*super().hashes(sample), text]

    def _add_all(self, encoder: _Encoder, samples: Sequence[Sample]) -> None:
        with tqdm(total=len(samples), desc="codes", mininterval=5) as bar:
            for start in range(0, len(samples), SHARD_SAMPLES):
                self._add_shard(encoder, samples[start : start + SHARD_SAMPLES], bar)
                if start == 0:
                    self.require_space(len(samples) - SHARD_SAMPLES, SHARD_SAMPLES, _NO_SPACE)

    def _add_shard(self, encoder: _Encoder, samples: Sequence[Sample], bar: Any) -> None:
        kept: list[VisualCodes] = []
        places: dict[str, Place] = {}
        start = semantic = 0
        for batch in batches(samples):
            for sample, codes, layout, hashes in encoder.encode(batch):
                number = self._number(layout)
                places[sample.id] = Place(self.next_shard, start, semantic, number, hashes)
                kept.append(codes)
                start += sum(layout.tokens)
                semantic += sum(layout.semantic)
            bar.update(len(batch))
        sizes = encoder.sizes
        tensors = {
            "tokens": _packed([unit for codes in kept for unit in codes.tokens], sizes[0]),
            "semantic": _packed([unit for codes in kept for unit in codes.semantic], sizes[1]),
        }
        if kept[0].deep:
            levels = [torch.stack([torch.cat(level) for level in codes.deep], 1) for codes in kept]
            tensors["deep"] = _packed(levels, sizes[0])
        self.add(tensors, places)

    def _number(self, layout: Layout) -> int:
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


def shared_codes(folder: Path, model: Any, data: EncodedSamples) -> CodeCache:
    """`CodeCache.build` by the first process of a run; the others open what it made.

    Raises:
        NoCodesError: in every process.
        TrainingError: in the others, where the first one raised something else.
    """
    made: list[CodeCache] = []
    reasons = ["the first process of this run says why"]

    def build() -> None:
        try:
            made.append(CodeCache.build(folder, model, data))
        except NoCodesError as error:
            reasons[0] = str(error)

    first_alone(build)
    cache = made[0] if made else None
    if not is_first():
        cache = CodeCache(folder, CodeIdentity.of(model, data))
    if cache is None or not cache.complete:
        raise NoCodesError(reasons[0])
    return cache


class _Encoder:
    """Samples to codes, with a guarded model."""

    def __init__(self, model: Any, data: EncodedSamples) -> None:
        self.model = model
        self.data = data
        self.collate = Collator(pad_id(data.processor))
        self.pixels = {name for seam in get_adapter(model).seams(model) for name in seam.pixels}
        guard, static = model.vqguard, get_adapter(model).static_vectors(model)
        constants = 0 if static is None else len(static)
        self.sizes = (guard.config.patch_codes + constants, guard.config.semantic_codes)

    def prove(self, sample: Sample) -> None:
        """Show on one sample that codes are all that the language model sees.

        Raises:
            SeamError: they are not, or the next time it would see something else.
        """
        whole = self.data.whole(sample)
        _require_rest(self.model, self.data, whole)
        batch, features = self._batch([whole])
        with torch.no_grad():
            codes = visual_codes(self.model, features, **batch)
        require_same_logits(self.model, codes, batch, features)

    @torch.no_grad()
    def encode(
        self, samples: Sequence[Sample]
    ) -> Iterator[tuple[Sample, VisualCodes, Layout, list[str]]]:
        """Each sample with its codes, the rest of its pictures, and what they were made of."""
        wholes = [self.data.whole(sample) for sample in samples]
        batch, features = self._batch(wholes)
        codes = visual_codes(self.model, features, **batch)
        units = units_of_rows(self.model, codes, batch)
        shapes = [self._shapes(codes, whole.example) for whole in wholes]
        for sample, whole, own in zip(samples, wholes, codes.by_sample(units, shapes), strict=True):
            yield sample, own, self._layout(whole, own), self._hashes(sample)

    def _batch(self, wholes: Sequence[Whole]) -> tuple[dict[str, Any], VisualFeatures | None]:
        """What the model takes of these samples, where it computes."""
        batch = self.collate([{**w.example, **_NO_CAPTIONS} for w in wholes])
        inputs = {
            name: value.to(self.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()
            if name not in ("labels", *CAPTION)
        }
        tokens, semantic = inputs.pop(ENCODER_TOKENS, None), inputs.pop(ENCODER_SEMANTIC, None)
        if tokens is None:
            return inputs, None
        device = self.model.device
        if isinstance(tokens, list):
            return inputs, VisualFeatures([unit.to(device) for unit in tokens], semantic)
        return inputs, VisualFeatures(tokens, semantic)

    def _shapes(self, codes: VisualCodes, example: Example) -> dict[str, Shape]:
        """The shapes of a sample's own pixels."""
        if ENCODER_SEMANTIC in example:
            kept = torch.stack(example[ENCODER_SEMANTIC])
            return dict.fromkeys(codes.pixels, tuple(kept.shape))
        return {name: tuple(example[name].shape) for name in codes.pixels}

    def _layout(self, whole: Whole, codes: VisualCodes) -> Layout:
        per_token = [name for name in whole.example if is_per_token(name)]
        return Layout(
            len(whole.sample.images),
            tuple(len(unit) for unit in codes.tokens),
            tuple(len(unit) for unit in codes.semantic),
            tuple(codes.positions),
            codes.form,
            codes.deep_form,
            codes.pixels,
            str(codes.dtype).removeprefix("torch."),
            tuple(
                {
                    "input_ids": _runs(whole.example["input_ids"][start:end]),
                    **{n: _runs(whole.example[n][0, start:end].tolist()) for n in per_token},
                }
                for start, end in whole.spans
            ),
            {
                name: self._numbers(name, value)
                for name, value in sorted(whole.example.items())
                if isinstance(value, torch.Tensor)
                and name not in self.pixels
                and name not in per_token
                and not name.startswith(("pixel_", "qformer_"))
            },
        )

    def _numbers(self, name: str, value: torch.Tensor) -> Numbers:
        if value.numel() > _LARGEST:
            raise SeamError(f"{name} has {value.numel()} numbers a sample, as much as pixels")
        return Numbers.of(value)

    def _hashes(self, sample: Sample) -> list[str]:
        kept = self.data.cache
        pictures = (
            [pixels_sha256(opener()) for opener in sample.images]
            if kept is None
            else kept.sha256(kept.place(sample.id))
        )
        return [*pictures, text_sha256(json.dumps(sample.turns))]


_NO_CAPTIONS: Example = {"caption_ids": [], "caption_pictures": []}


def _require_rest(model: Any, data: EncodedSamples, whole: Whole) -> None:
    """Raise `SeamError` where a picture has other codes each time that it is trained on."""
    if data.cache is None:
        again = data.whole(whole.sample).example
        for name, value in whole.example.items():
            if isinstance(value, torch.Tensor) and not torch.equal(value, again[name]):
                raise SeamError(
                    f"the image processor gives a picture other {name} each time (augmentation), "
                    "and codes would hold one of them"
                )
    if model.vqguard.config.site == "encoder":
        return
    for projector in get_adapter(model).projectors(model):
        for module in projector.modules():
            if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
                raise SeamError(
                    f"{type(projector).__name__} drops features at random in training (p "
                    f"{module.p:g}), and codes would hold one draw"
                )


def _pictured(samples: Sequence[Sample]) -> list[Sample]:
    """Samples with a picture, each id once.

    Raises:
        NoCodesError: one id names two samples.
    """
    known: dict[str, Sample] = {}
    for sample in samples:
        if not sample.images:
            continue
        first = known.setdefault(sample.id, sample)
        if first is not sample and (first.turns, first.images) != (sample.turns, sample.images):
            raise NoCodesError(f"two samples have the id {sample.id!r}, and codes are kept by id")
    return list(known.values())


def _runs(numbers: Sequence[int]) -> Runs:
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][0] == number:
            runs[-1] = (number, runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return tuple(runs)


def _packed(units: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    return torch.cat([unit.long() for unit in units]).to(code_dtype(size))
