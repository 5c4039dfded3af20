"""Evidence from text: what prompts say of each semantic codeword, as if it were images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vqguard.errors import InputError
from vqguard.judging.evidence import NEUTRAL
from vqguard.judging.settings import TextEvidence


def text_evidence(
    codewords: Tensor,
    embeddings: Mapping[str, Tensor],
    prompts: Mapping[str, Sequence[str]],
    *,
    categories: Sequence[str],
    scale: float,
    strength: float,
) -> TextEvidence:
    """Pseudo-counts of each cell and category, by how close its codeword is to their prompts.

    P(c|k) = softmax_c log mean_j exp(scale cos(codeword_k, prompt_cj)), the zero-shot classifier of
    CLIP (A. Radford et al., arXiv 2103.00020) with the mean over a category's prompts; a cell gets
    `strength` P(c|k) images of each category. Categories without prompts get none.

    Args:
        codewords: (K, d) floating, in the space that images and texts share.
        embeddings: by category, neutral among them, its prompts (m, d).
        prompts: the same prompts as texts, kept for the record.
        categories: toxic categories of the map, in its order.
        scale: the encoder's own factor before the softmax (CLIP's logit scale).
        strength: images that the prompts stand for in each cell, more than 0.

    Raises:
        InputError: without prompts of neutral or of any category, for prompts of categories that
            are not there, and for widths that differ.
    """
    columns = (*categories, NEUTRAL)
    unknown = sorted(set(embeddings) - set(columns))
    if unknown:
        raise InputError(f"prompts for {unknown}, which are not among the categories {columns}")
    if NEUTRAL not in embeddings or len(embeddings) < 2:
        raise InputError(
            f"expected prompts of {NEUTRAL!r}, such as 'a photo', and of at least one toxic"
            f" category, got {sorted(embeddings)}: without them all is toxic, or nothing"
        )
    if not (0.0 < strength < math.inf and 0.0 < scale < math.inf):
        raise InputError(f"strength and scale must be positive numbers, got {strength}, {scale}")
    cells = normalize(codewords.detach().double().cpu(), dim=1)
    logits = torch.full((len(cells), len(columns)), -math.inf, dtype=torch.float64)
    for name, vectors in embeddings.items():
        if vectors.dim() != 2 or not len(vectors) or vectors.shape[1] != cells.shape[1]:
            raise InputError(
                f"the prompts of {name!r} have embeddings {tuple(vectors.shape)}, the codewords a"
                f" width of {cells.shape[1]}: they are not in one space"
            )
        cosine = cells @ normalize(vectors.detach().double().cpu(), dim=1).T
        mean = torch.logsumexp(scale * cosine, dim=1) - math.log(len(vectors))
        logits[:, columns.index(name)] = mean
    if bool(logits.isnan().any()):
        raise InputError("embeddings of prompts, or codewords, hold NaN or infinity")
    counts = strength * logits.softmax(dim=1)
    return TextEvidence(
        prompts={name: tuple(texts) for name, texts in prompts.items()},
        strength=float(strength),
        counts=tuple(tuple(row) for row in counts.tolist()),
    )
