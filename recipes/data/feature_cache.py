"""F_v's outputs on disk: both stages leave the vision encoder frozen, so it runs once a picture.

A cache is a folder of safetensors shards, read through memory maps, beside ``index.json``: what
made it, each shard's SHA-256, and where each sample's features are. Stages then run without the
vision encoder and without decoding a picture.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from vqguard.adapters import get_adapter, visual_features
from vqguard.errors import ArtefactError, ChecksumError, ConfigError
from vqguard.files import checksums, drafts, file_sha256, replace_text, text_sha256
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.image_batches import batches, pixel_count
from vqguard.strict import StrictData
from vqguard.text_files import read_json

log = logging.getLogger(__name__)

INDEX, SCHEMA = "index.json", 2
MAX_INDEX = 2**30
"""Bytes of the index: 200 for a picture, of 5 million."""
SHARD_IMAGES = 1024
_SPOT_CHECKS = 32
# Neither is about features; some are written on saving alone, and a run resumes from a saved model.
_NOT_VISION = (
    "text_config",
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
)


@dataclass(frozen=True)
class CacheIdentity(StrictData):
    """What features depend on besides the picture."""

    model_type: str
    tower_sha256: str
    config_sha256: str
    processor_sha256: str
    dtype: str

    @classmethod
    def of(cls, model: Any, processor: Any) -> CacheIdentity:
        """The identity of a model's vision encoder and its image processor."""
        tensors: dict[str, torch.Tensor] = {}
        for number, module in enumerate(get_adapter(model).vision_modules(model)):
            state = module.state_dict()
            tensors |= {f"{number}.{name}": tensor for name, tensor in state.items()}
        config = _vision_settings(model.config.to_dict())
        return cls(
            model_type=model.config.model_type,
            tower_sha256=text_sha256(json.dumps(checksums(tensors), sort_keys=True)),
            config_sha256=text_sha256(json.dumps(config, sort_keys=True, default=str)),
            processor_sha256=text_sha256(
                json.dumps(processor.image_processor.to_dict(), sort_keys=True, default=str)
            ),
            dtype=str(model.dtype).removeprefix("torch."),
        )


def _vision_settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _vision_settings(value) if isinstance(value, dict) else value
        for name, value in config.items()
        if name not in _NOT_VISION
    }


@dataclass(frozen=True)
class CachedPicture:
    """A picture after the vision encoder.

    ``tokens`` (N, d_v), ``semantic`` (S, d_v), both in the model's dtype; ``placeholders``: image
    tokens that the processor writes into the text for it.
    """

    tokens: torch.Tensor
    semantic: torch.Tensor
    placeholders: int


class _Place(NamedTuple):
    shard: int
    row: int
    start: int
    length: int
    placeholders: int
    pixels_sha256: str


@dataclass(frozen=True)
class _Index(StrictData):
    schema: Literal[2]
    identity: CacheIdentity
    shards: list[str]
    samples: dict[str, tuple[_Place, ...]]


class FeatureCache:
    """An opened cache. Made by `build`."""

    def __init__(self, folder: Path, identity: CacheIdentity) -> None:
        """Open the cache in ``folder``.

        Raises:
            ConfigError: it was made by another model, image size or processor.
            ArtefactError: its index is damaged.
        """
        self.folder = folder
        self._shards: list[str] = []
        self._places: dict[str, tuple[_Place, ...]] = {}
        self._open: dict[int, Any] = {}
        if (folder / INDEX).is_file():
            self._read(identity)
        self.identity = identity

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, name: str) -> tuple[CachedPicture, ...]:
        """The features of a sample's pictures in their order, by the sample's id.

        Raises:
            ArtefactError: no such sample, or its shard cannot be read.
            ChecksumError: the shard is not the one that was written.
        """
        places = self._places.get(name)
        if places is None:
            raise ArtefactError(
                f"{self.folder} has no features of sample {name!r}: the data changed since it was "
                "made. Remove the folder and go on with --resume."
            )
        return tuple(self._picture(place) for place in places)

    def _picture(self, place: _Place) -> CachedPicture:
        shard = self._shard(place.shard)
        tokens = shard.get_slice("tokens")[place.start : place.start + place.length]
        semantic = shard.get_slice("semantic")[place.row : place.row + 1]
        return CachedPicture(tokens, semantic[0], place.placeholders)

    def __getstate__(self) -> dict[str, Any]:
        # Memory maps stay in their process; a worker opens its own.
        return {**self.__dict__, "_open": {}}

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            path = self.folder / _shard_name(number)
            try:
                checksum = file_sha256(path)
            except ArtefactError as error:
                raise ArtefactError(
                    f"{path} cannot be read ({error}). Remove {self.folder} and go on with "
                    "--resume."
                ) from error
            if checksum != self._shards[number]:
                raise ChecksumError(
                    f"{path}: its SHA-256 is {checksum}, the index says {self._shards[number]}. "
                    f"Remove {self.folder} and go on with --resume."
                )
            opened: Any = safe_open(path, framework="pt")
            self._open[number] = opened.__enter__()
        return self._open[number]

    # -- the index

    def _read(self, identity: CacheIdentity) -> None:
        path = self.folder / INDEX
        try:
            index = _Index.from_dict(read_json(path, ConfigError, MAX_INDEX))
        except ConfigError as error:
            raise ArtefactError(
                f"{path} is damaged, or of another version ({error}). Remove {self.folder} and go "
                "on with --resume."
            ) from error
        self._shards, self._places = index.shards, index.samples
        if index.identity != identity:
            wanted, kept = identity.to_dict(), index.identity.to_dict()
            other = [name for name in wanted if wanted[name] != kept[name]]
            raise ConfigError(
                f"{self.folder} holds features of another model or processor (different: "
                f"{', '.join(other)}). Name another folder for this run."
            )

    def _write(self) -> None:
        index = {
            "schema": SCHEMA,
            "identity": self.identity.to_dict(),
            "shards": self._shards,
            "samples": self._places,
        }
        replace_text(self.folder / INDEX, json.dumps(index))

    # -- making it

    @classmethod
    def build(
        cls, folder: Path, model: Any, processor: Any, samples: Sequence[Sample]
    ) -> FeatureCache:
        """Add what is missing to the cache in ``folder``; a killed build goes on where it was.

        Args:
            model: guarded or not; its vision encoder is run in eval mode.
            samples: their ids name the features; those without a picture are left out.

        Raises:
            ConfigError: a cache of another model, two pictures under one id, too little disk
                space, or a family whose features before the projector cannot be read.
            InputError: a picture that cannot be opened.
        """
        adapter = get_adapter(model)
        if "encoder" not in adapter.sites:
            raise ConfigError(
                f"{model.config.model_type} has no features before its projector to keep. Set "
                "features.cache=false."
            )
        folder.mkdir(parents=True, exist_ok=True)
        cache = cls(folder, CacheIdentity.of(model, processor))
        wanted = _pictured(samples)
        cache._spot_check(wanted)
        missing = [sample for sample in wanted if sample.id not in cache]
        model.eval()
        pictures = sum(len(sample.images) for sample in missing)
        with tqdm(total=pictures, desc="features", mininterval=5) as bar:
            for start in range(0, len(missing), SHARD_IMAGES):
                cache._add_shard(model, processor, missing[start : start + SHARD_IMAGES], bar)
                if start == 0:
                    cache._require_space(len(missing) - SHARD_IMAGES)
        return cache

    def remove(self) -> None:
        """Delete the folder."""
        self._open.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _add_shard(self, model: Any, processor: Any, samples: list[Sample], bar: Any) -> None:
        number, start = len(self._shards), 0
        tokens: list[torch.Tensor] = []
        semantic: list[torch.Tensor] = []
        places: dict[str, tuple[_Place, ...]] = {}
        opened = ((sample.id, opener()) for sample in samples for opener in sample.images)
        for batch in batches(opened, lambda named: pixel_count(named[1])):
            pictures = [picture for _, picture in batch]
            for (name, _), picture, (patches, whole, placeholders) in zip(
                batch, pictures, _encode(model, processor, pictures), strict=True
            ):
                place = _Place(
                    number,
                    len(semantic),
                    start,
                    len(patches),
                    placeholders,
                    pixels_sha256(picture),
                )
                places[name] = (*places.get(name, ()), place)
                tokens.append(patches)
                semantic.append(whole)
                start += len(patches)
            bar.update(len(batch))
        path = self.folder / _shard_name(number)
        with drafts(path) as (draft,):
            save_file({"tokens": torch.cat(tokens), "semantic": torch.stack(semantic)}, draft)
        self._shards.append(file_sha256(path))
        self._places |= places
        self._write()

    def _require_space(self, images: int) -> None:
        written = (self.folder / _shard_name(0)).stat().st_size
        each = written / max(1, min(len(self._places), SHARD_IMAGES))
        needed, free = int(max(0, images) * each), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ConfigError(
                f"the features of {images} more pictures need {needed / 1e9:.1f} GB in "
                f"{self.folder}, {free / 1e9:.1f} GB are free. Set features.cache=false, or name "
                "a folder on a larger disk with features.folder."
            )

    def _spot_check(self, samples: list[Sample]) -> None:
        """Refuse a cache of other pictures under the same ids, by looking at some of them."""
        known = [sample for sample in samples if sample.id in self]
        generator = np.random.default_rng(len(known))
        chosen = generator.permutation(len(known))[:_SPOT_CHECKS]
        for sample in (known[int(i)] for i in chosen):
            if _hashes(sample) != [place.pixels_sha256 for place in self._places[sample.id]]:
                raise ConfigError(
                    f"{self.folder} holds features of another picture under the id {sample.id!r}: "
                    "it was made from other data. Name another folder for this run."
                )


def pixels_sha256(picture: Image.Image) -> str:
    """SHA-256 of a picture's size, mode and pixels."""
    digest = hashlib.sha256(f"{picture.mode} {picture.size}".encode())
    digest.update(picture.tobytes())
    return digest.hexdigest()


def _shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def _pictured(samples: Sequence[Sample]) -> list[Sample]:
    """Samples with a picture, each id once.

    Raises:
        ConfigError: one id names two pictures.
    """
    by_id: dict[str, Sample] = {}
    for sample in samples:
        if not sample.images:
            continue
        first = by_id.setdefault(sample.id, sample)
        if first.images == sample.images:
            continue
        if _hashes(first) != _hashes(sample):
            raise ConfigError(
                f"two samples with different pictures have the id {sample.id!r}; features are kept "
                "by id. Give them ids of their own, or set features.cache=false."
            )
    return list(by_id.values())


def _hashes(sample: Sample) -> list[str]:
    return [pixels_sha256(opener()) for opener in sample.images]


@torch.no_grad()
def _encode(
    model: Any, processor: Any, pictures: list[Image.Image]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """(tokens, semantic, placeholders) of each picture, contiguous on the CPU."""
    token = processor.image_token
    inputs = processor(
        images=pictures, text=[token] * len(pictures), return_tensors="pt", padding=True
    )
    placeholders = (inputs.pop("input_ids") == processor.image_token_id).sum(-1).tolist()
    inputs.pop("attention_mask", None)
    pixels: dict[str, Any] = {name: value.to(model.device) for name, value in inputs.items()}
    features = visual_features(model, site="encoder", **pixels)
    units = zip(features.tokens, features.semantic_units, placeholders, strict=True)
    for tokens, semantic, count in units:
        yield tokens.cpu().contiguous(), semantic.cpu().contiguous(), int(count)
