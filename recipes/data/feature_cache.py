"""F_v's outputs on disk: both stages leave the vision encoder frozen, so it runs once a picture.

Stages then run without the vision encoder and without decoding a picture.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from PIL import Image

from vqguard.adapters import get_adapter, visual_features
from vqguard.errors import ConfigError
from vqguard.files import checksums, text_sha256
from vqguard.recipes.console.progress import Progress
from vqguard.recipes.data.records.lazy import pictured
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.data.shard_store import ShardStore, pixels_sha256
from vqguard.recipes.image_batches import batches, pixel_count, side_by_side
from vqguard.strict import StrictData

log = logging.getLogger(__name__)

SHARD_IMAGES = 1024
_NO_SPACE = "Set features.cache=false, or name a folder on a larger disk with features.folder."
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
    schema_version: ClassVar[int] = 2

    schema: Literal[2]
    identity: CacheIdentity
    shards: list[str]
    samples: dict[str, tuple[_Place, ...]]


class FeatureCache(ShardStore[tuple[_Place, ...]]):
    """An opened cache. Made by `build`."""

    noun = "features"
    maker = "model or processor"
    index_type = _Index
    remedy = "Name another folder for this run."

    def __getitem__(self, name: str) -> tuple[CachedPicture, ...]:
        """The features of a sample's pictures in their order, by the sample's id.

        Raises:
            ArtefactError: no such sample, or its shard cannot be read.
            ChecksumError: the shard is not the one that was written.
        """
        return tuple(self._picture(place) for place in self.place(name))

    def _picture(self, place: _Place) -> CachedPicture:
        tokens = self.rows(place.shard, "tokens", place.start, place.length)
        semantic = self.rows(place.shard, "semantic", place.row, 1)
        return CachedPicture(tokens, semantic[0], place.placeholders)

    def sha256(self, place: tuple[_Place, ...]) -> list[str]:
        return [picture.pixels_sha256 for picture in place]

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
                space, samples with videos, or a family whose features before the projector
                cannot be read.
            InputError: a picture that cannot be opened.
        """
        adapter = get_adapter(model)
        if "encoder" not in adapter.sites:
            raise ConfigError(
                f"{model.config.model_type} has no features before its projector to keep. Set "
                "features.cache=false."
            )
        wanted = pictured(samples, _same_pictures, _clash)
        if wanted.facts.filmed.any():
            raise ConfigError(
                "some samples show videos, and features are kept of pictures alone. Set "
                "features.cache=false."
            )
        folder.mkdir(parents=True, exist_ok=True)
        cache = cls(folder, CacheIdentity.of(model, processor))
        cache.spot_check(wanted)
        missing = cache.missing(wanted)
        model.eval()
        pictures = sum(len(sample.images) for sample in missing)
        with Progress(pictures, "features") as progress:
            for start in range(0, len(missing), SHARD_IMAGES):
                cache._add_shard(model, processor, missing[start : start + SHARD_IMAGES], progress)
                if start == 0:
                    cache.require_space(len(missing) - SHARD_IMAGES, SHARD_IMAGES, _NO_SPACE)
        return cache

    def _add_shard(
        self, model: Any, processor: Any, samples: Sequence[Sample], progress: Progress
    ) -> None:
        number, start = self.next_shard, 0
        tokens: list[torch.Tensor] = []
        semantic: list[torch.Tensor] = []
        places: dict[str, tuple[_Place, ...]] = {}
        opened = ((sample.id, opener()) for sample in samples for opener in sample.images)
        named = batches(opened, lambda pair: pixel_count(pair[1]))
        for batch, encoded in side_by_side(model, partial(_encode, model, processor), named):
            for (name, _), (patches, whole, placeholders, sha256) in zip(
                batch, encoded, strict=True
            ):
                place = _Place(
                    number,
                    len(semantic),
                    start,
                    len(patches),
                    placeholders,
                    sha256,
                )
                places[name] = (*places.get(name, ()), place)
                tokens.append(patches)
                semantic.append(whole)
                start += len(patches)
            progress.update(len(batch))
        self.add({"tokens": torch.cat(tokens), "semantic": torch.stack(semantic)}, places)


def _same_pictures(one: Sample, other: Sample) -> bool:
    return one.images == other.images or _hashes(one) == _hashes(other)


def _clash(name: str) -> ConfigError:
    return ConfigError(
        f"two samples with different pictures have the id {name!r}; features are kept by id. Give"
        " them ids of their own, or set features.cache=false."
    )


def _hashes(sample: Sample) -> list[str]:
    return [pixels_sha256(opener()) for opener in sample.images]


def _encode(
    model: Any, processor: Any, named: Sequence[tuple[str, Image.Image]]
) -> list[tuple[torch.Tensor, torch.Tensor, int, str]]:
    """(tokens, semantic, placeholders, SHA-256) of each named picture, contiguous on the CPU."""
    pictures = [picture for _, picture in named]
    token = processor.image_token
    inputs = processor(
        images=pictures, text=[token] * len(pictures), return_tensors="pt", padding=True
    )
    placeholders = (inputs.pop("input_ids") == processor.image_token_id).sum(-1).tolist()
    inputs.pop("attention_mask", None)
    pixels: dict[str, Any] = {name: value.to(model.device) for name, value in inputs.items()}
    features = visual_features(model, site="encoder", **pixels)
    hashes = map(pixels_sha256, pictures)
    units = zip(features.tokens, features.semantic_units, placeholders, hashes, strict=True)
    return [
        (tokens.cpu().contiguous(), semantic.cpu().contiguous(), int(count), sha256)
        for tokens, semantic, count, sha256 in units
    ]
