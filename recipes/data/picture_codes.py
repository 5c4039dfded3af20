"""The samples of stage 2 to codes, once, after stage 1."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from vqguard.adapters import VisualFeatures, get_adapter
from vqguard.adapters.codes import Shape, VisualCodes
from vqguard.adapters.runtime.code_training import (
    require_same_logits,
    units_of_rows,
    visual_codes,
)
from vqguard.errors import ConfigError, SeamError
from vqguard.files import text_sha256
from vqguard.recipes.console.progress import Progress
from vqguard.recipes.data.code_cache import CodeCache, CodeIdentity, Layout, Numbers, Place, Runs
from vqguard.recipes.data.code_dtypes import code_dtype
from vqguard.recipes.data.encoding import (
    CAPTION,
    CAPTION_PICTURES,
    CAPTION_VIDEOS,
    ENCODER_SEMANTIC,
    ENCODER_TOKENS,
    Collator,
    EncodedSamples,
    Example,
    Whole,
    is_per_token,
    pad_id,
)
from vqguard.recipes.data.records.lazy import pictured
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.data.shard_store import pixels_sha256
from vqguard.recipes.image_batches import batches
from vqguard.recipes.processes import first_alone, is_first

log = logging.getLogger(__name__)

SHARD_SAMPLES = 8192
_LARGEST = 4096
"""Numbers that a sample may have beside its codes, as sizes of pictures and grids."""
_NO_SPACE = "Free some and go on with --resume, or set stage2.from_codes=false."


class NoCodesError(ConfigError):
    """Pictures cannot stand as codes, and the reason."""


def build_codes(folder: Path, model: Any, data: EncodedSamples) -> CodeCache:
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
    samples = pictured(data.samples, _same, _clash)
    if samples.facts.filmed.any():
        raise NoCodesError("some samples show videos, and codes are kept of pictures alone")
    for sample in samples:
        _require_one_question(sample)
    identity = _identity(model, data)
    try:
        cache = CodeCache(folder, identity)
        cache.spot_check(samples)
    except ConfigError as error:
        log.info("%s They are made again.", error)
        shutil.rmtree(folder)
        cache = CodeCache(folder, identity)
    folder.mkdir(parents=True, exist_ok=True)
    missing = cache.missing(samples)
    model.eval()
    encoder = _Encoder(model, data)
    try:
        if missing:
            encoder.prove(missing[0])
        _add_all(cache, encoder, missing)
    except SeamError as error:
        raise NoCodesError(f"{model.config.model_type}: {error}") from error
    cache.finish()
    return cache


def shared_codes(folder: Path, model: Any, data: EncodedSamples) -> CodeCache:
    """`build_codes` by the first process of a run; the others open what it made.

    Raises:
        NoCodesError: in every process.
        TrainingError: in the others, where the first one raised something else.
    """
    made: list[CodeCache] = []
    reasons = ["the first process of this run says why"]

    def build() -> None:
        try:
            made.append(build_codes(folder, model, data))
        except NoCodesError as error:
            reasons[0] = str(error)

    first_alone(build)
    cache = made[0] if made else None
    if not is_first():
        cache = CodeCache(folder, _identity(model, data))
    if cache is None or not cache.complete:
        raise NoCodesError(reasons[0])
    return cache


def _identity(model: Any, data: EncodedSamples) -> CodeIdentity:
    return CodeIdentity.of(
        model, data.processor, data.max_length, kept_features=data.cache is not None
    )


def _add_all(cache: CodeCache, encoder: _Encoder, samples: Sequence[Sample]) -> None:
    with Progress(len(samples), "codes") as progress:
        for start in range(0, len(samples), SHARD_SAMPLES):
            _add_shard(cache, encoder, samples[start : start + SHARD_SAMPLES], progress)
            if start == 0:
                cache.require_space(len(samples) - SHARD_SAMPLES, SHARD_SAMPLES, _NO_SPACE)


def _add_shard(
    cache: CodeCache, encoder: _Encoder, samples: Sequence[Sample], progress: Progress
) -> None:
    kept: list[VisualCodes] = []
    places: dict[str, Place] = {}
    start = semantic = 0
    for batch in batches(samples):
        for sample, codes, layout, hashes in encoder.encode(batch):
            number = cache.number(layout)
            places[sample.id] = Place(cache.next_shard, start, semantic, number, hashes)
            kept.append(codes)
            start += sum(layout.tokens)
            semantic += sum(layout.semantic)
        progress.update(len(batch))
    sizes = encoder.sizes
    tensors = {
        "tokens": _packed([unit for codes in kept for unit in codes.tokens], sizes[0]),
        "semantic": _packed([unit for codes in kept for unit in codes.semantic], sizes[1]),
    }
    if kept[0].deep:
        levels = [torch.stack([torch.cat(level) for level in codes.deep], 1) for codes in kept]
        tensors["deep"] = _packed(levels, sizes[0])
    cache.add(tensors, places)


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


_NO_CAPTIONS: Example = {"caption_ids": [], CAPTION_PICTURES: [], CAPTION_VIDEOS: []}


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
        shares = [share for module in projector.modules() for share in _dropped(module)]
        if shares:
            raise SeamError(
                f"{type(projector).__name__} drops features at random in training (p "
                f"{max(shares):g}), and codes would hold one draw"
            )


def _dropped(module: torch.nn.Module) -> list[float]:
    """Shares that a module drops in training: as a layer, or by an argument of a function."""
    named = (value for name, value in vars(module).items() if "drop" in name)
    shares = [value for value in named if isinstance(value, float) and value > 0]
    if isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p > 0:
        shares.append(module.p)
    return shares


def _same(one: Sample, other: Sample) -> bool:
    return (one.turns, one.images) == (other.turns, other.images)


def _clash(name: str) -> NoCodesError:
    return NoCodesError(f"two samples have the id {name!r}, and codes are kept by id")


def _require_one_question(sample: Sample) -> None:
    """A Q-Former reads the question: in another epoch it would read another than was encoded.

    Raises:
        NoCodesError: the questions change with the epoch.
    """
    questions = {tuple(question for question, _ in turns) for turns in sample.wordings}
    if len(questions) > 1:
        raise NoCodesError(f"sample {sample.id!r} asks another question in another epoch")


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
