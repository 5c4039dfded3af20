"""Images in batches: features before the quantiser, and verdicts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import torch
from PIL import Image

from vqguard.adapters import visual_features
from vqguard.adapters.features import VisualFeatures
from vqguard.adapters.runtime.quantise import copy_features
from vqguard.encoder import GuardedEncoder
from vqguard.images import MAX_BATCH_PIXELS, check_plain
from vqguard.judging.verdict import Part
from vqguard.safety_map import Verdict

IMAGES = 64
"""Images that a model sees at a time where nothing is trained."""

_AT_A_TIME = 2
"""Batches that a processor computes at once. The next one is in memory too."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def pixel_count(image: Image.Image) -> int:
    """Width times height."""
    return image.width * image.height


def batches(
    items: Iterable[Item],
    pixels_of: Callable[[Item], int] | None = None,
    most: int | None = None,
) -> Iterator[list[Item]]:
    """The items in lists of ``most`` (`IMAGES`), the last one shorter.

    Args:
        items: drawn when their list is asked for; with `pixels_of`, the first of the next too.
        pixels_of: how many pixels an item holds. Lists then end where they would hold more than
            `MAX_BATCH_PIXELS`, so that large pictures are not all in memory at a time; one that is
            larger comes alone.
        most: longest list.
    """
    most = IMAGES if most is None else most
    batch: list[Item] = []
    pixels = 0
    for item in items:
        size = 0 if pixels_of is None else pixels_of(item)
        if batch and pixels + size > MAX_BATCH_PIXELS:
            yield batch
            batch, pixels = [], 0
        batch.append(item)
        pixels += size
        if len(batch) == most:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def side_by_side(
    model: Any, work: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[Item, Result]]:
    """Each item with what `work`, which runs `model` and needs no gradient, makes of it, in order.

    On a processor two at a time, with half of torch's threads each: threads that share one small
    product wait for each other, and pictures are made or opened meanwhile (docs/decisions, 0196). A
    `GuardedEncoder` is somebody's own, and used by one thread at a time.
    """

    @torch.no_grad()
    def run(item: Item) -> Result:
        return work(item)

    threads = torch.get_num_threads()
    if threads < _AT_A_TIME or isinstance(model, GuardedEncoder) or model.device.type != "cpu":
        for item in items:
            yield item, run(item)
        return
    begun: deque[tuple[Item, Future[Result]]] = deque()
    each = (threads // _AT_A_TIME,)
    pool = ThreadPoolExecutor(_AT_A_TIME, initializer=torch.set_num_threads, initargs=each)
    try:
        for item in items:
            begun.append((item, pool.submit(copy_context().run, run, item)))
            if len(begun) > _AT_A_TIME:
                done, result = begun.popleft()
                yield done, result.result()
        for done, result in begun:
            yield done, result.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # of MKL there is one number for all threads


def pixel_inputs(
    processor: Any, images: Sequence[Image.Image], device: torch.device
) -> dict[str, torch.Tensor]:
    """What the image processor makes of images: `pixel_values` and whatever goes with them.

    Raises:
        InputError: a picture that can be read in more than one way (`check_plain`).
    """
    for image in images:
        check_plain(image)
    inputs = processor.image_processor(images=list(images), return_tensors="pt")
    return {name: value.to(device) for name, value in inputs.items()}


def image_features(model: Any, processor: Any, images: Sequence[Image.Image]) -> VisualFeatures:
    """Unquantised features of a batch of images at the guard's site.

    `model`: guarded; or a `GuardedEncoder`, which prepares images itself and needs no `processor`.
    """
    if isinstance(model, GuardedEncoder):
        tokens, semantic, layouts = model.image_features(images)
        parts: list[Part] = ["picture"] * len(tokens)
        return VisualFeatures.of_units(list(tokens), semantic, (), layouts, parts)
    inputs: dict[str, Any] = pixel_inputs(processor, images, model.device)
    return visual_features(model, **inputs)


def labelled_features(
    model: Any, processor: Any, batch: Sequence[tuple[object, Image.Image]]
) -> VisualFeatures:
    """`image_features` of the images of (label, image) pairs."""
    return image_features(model, processor, [image for _, image in batch])


def copied_features(
    model: Any, processor: Any, images: Sequence[Image.Image]
) -> Iterator[VisualFeatures]:
    """`image_features` of each copy that the guard judges in place of the images, if it does.

    A `GuardedEncoder` makes no copies.
    """
    if model.vqguard.smooths and not isinstance(model, GuardedEncoder):
        yield from copy_features(model, **pixel_inputs(processor, images, model.device))


@torch.no_grad()
def screen_images(model: Any, processor: Any, images: Iterable[Image.Image]) -> list[Verdict]:
    """One verdict an image; the language model does not run.

    Raises:
        InputError: a picture that can be read in more than one way (`check_plain`).
    """
    model.eval()
    verdicts: list[Verdict] = []
    for batch in batches(images, pixel_count):
        if isinstance(model, GuardedEncoder):
            verdicts += model.screen(batch, batch=len(batch))
        else:
            verdicts += model.screen(**pixel_inputs(processor, batch, model.device))
    return verdicts


@torch.no_grad()
def collect_features(
    model: Any,
    processor: Any,
    images: Iterable[Image.Image],
    *,
    tokens_an_image: int | None = None,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unquantised features of images at the guard's site.

    Args:
        model: guarded.
        tokens_an_image: keep so many random visual tokens of each image; None keeps all.

    Returns:
        `(patches, semantic)`: float32 (n, d) and (m, d_s), on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    patches, semantic = [], []
    model.eval()
    read = partial(image_features, model, processor)
    for _, features in side_by_side(model, read, batches(images, pixel_count)):
        semantic.append(torch.cat(features.semantic_units).float().cpu())
        for tokens in features.tokens:
            rows = tokens.float().cpu()
            if tokens_an_image is not None and tokens_an_image < len(rows):
                rows = rows[torch.randperm(len(rows), generator=generator)[:tokens_an_image]]
            patches.append(rows)
    return torch.cat(patches), torch.cat(semantic)
