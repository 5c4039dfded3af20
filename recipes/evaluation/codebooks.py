"""How much of the codebooks is used, and how far features are from their codewords."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from PIL import Image

from vqguard.codebooks.codebook import Codebook
from vqguard.codebooks.quantizer import VectorQuantizer
from vqguard.guard import VQGuard
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.image_batches import collect_features


@torch.no_grad()
def usage(level: VectorQuantizer, features: torch.Tensor) -> tuple[float, float]:
    """(perplexity, dead share) of a level over features (n, d)."""
    probe = Codebook(level.codebook.codes, 1)
    probe.count(level.encode(features.to(level.codebook.weight.device)).cpu())
    return probe.perplexity(), probe.dead_share()


@torch.no_grad()
def relative_error(level: VectorQuantizer, features: torch.Tensor) -> float:
    """Sum of squared distances to the codewords, as a share of the features' total variance."""
    codewords = level.lookup(level.encode(features.to(level.codebook.weight.device))).cpu()
    spread = (features - features.mean(0)).square().sum()
    return float((features - codewords).square().sum() / spread)


def measure_codebooks(
    ledger: Ledger, model: Any, processor: Any, images: Iterable[Image.Image]
) -> None:
    """`perplexity`, `dead_share` and `quantisation_error` of both levels on held-out images.

    The error is relative: 0 is lossless, 1 is as far as the mean of the features.
    """
    guard: VQGuard = model.vqguard
    patches, semantic = collect_features(model, processor, images)
    for name, level, features in (
        ("patch", guard.patch, patches),
        ("semantic", guard.semantic, semantic),
    ):
        perplexity, dead = usage(level, features)
        size = {"level": name, "codes": level.codebook.codes}
        ledger.value("perplexity", "guarded", perplexity, len(features), **size)
        ledger.value("dead_share", "guarded", dead, len(features), **size)
        error = relative_error(level, features)
        ledger.value("quantisation_error", "guarded", error, len(features), **size)
