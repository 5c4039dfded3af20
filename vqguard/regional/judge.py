"""Semantic codes of regions: what the regional judge reads in an image's visual tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqguard.codebooks.quantizer import VectorQuantizer
from vqguard.config import RegionalSettings
from vqguard.errors import NonFiniteError
from vqguard.regional.layout import Layout, layouts_of
from vqguard.regional.projection import FLOOR, SemanticProjection


class Regions(NamedTuple):
    """Semantic tokens of the regions of B images, at most S each."""

    tokens: Tensor
    """(B, S, r) float32; zeros at padding."""
    mask: Tensor | None
    """(B, S) bool, True for an image's own regions; None where none is padding."""


class RegionalJudge(nn.Module):
    """A semantic projection and the semantic codebook of its r-dimensional space."""

    def __init__(self, dim: int, settings: RegionalSettings, search: str, seed: int) -> None:
        """For visual tokens of width `dim`; the entries and the projection start random."""
        super().__init__()
        self.projection = SemanticProjection(
            dim, settings.hidden, settings.width, settings.windows, seed
        )
        self.quantizer = VectorQuantizer(settings.codes, settings.width, search=search, seed=seed)
        self.requires_grad_(False)  # no stage trains it: it has a training of its own

    def regions(
        self, tokens: Tensor | Sequence[Tensor], layouts: Sequence[Layout | None] | None = None
    ) -> Regions:
        """The semantic tokens of the regions of visual tokens (B, N, d), or (N_i, d) an image.

        `layouts`: where each image's tokens lie; None, or None for an image: not known. An image's
        regions are the same alone and in a batch, bit for bit.

        Raises:
            InputError: for a layout that does not hold an image's tokens.
            NonFiniteError: on NaN or infinity.
        """
        images = list(tokens)
        known = layouts_of([len(image) for image in images], layouts)
        alike: dict[tuple[int, Layout | None], list[int]] = {}
        for number, (image, layout) in enumerate(zip(images, known, strict=True)):
            if not bool(torch.isfinite(image).all()):
                raise NonFiniteError("visual tokens hold NaN or infinity; refuse this image")
            alike.setdefault((len(image), layout), []).append(number)
        read: list[Tensor] = [images[0]] * len(images)
        for (_, layout), numbers in alike.items():
            together = self.projection(torch.stack([images[n] for n in numbers]), layout)
            for number, regions in zip(numbers, together, strict=True):
                read[number] = regions
        counts = torch.tensor([len(regions) for regions in read])
        if len(set(counts.tolist())) == 1:
            return Regions(torch.stack(read), None)
        mask = torch.arange(int(counts.max())) < counts[:, None]
        padded = nn.utils.rnn.pad_sequence(read, batch_first=True)
        return Regions(padded, mask.to(padded.device))

    @torch.no_grad()
    def learned_shares(self, categories: int) -> Tensor:
        """(K, C + 1) float64: what the projection learnt to say of each codeword, neutral last.

        The chance that a region like it shows anything toxic is that of its strongest evidence;
        categories share it as their own chances are.
        """
        logits = self.quantizer.codebook.weight[:, :categories].cpu().double() + FLOOR
        each = logits.sigmoid()
        toxic = each.amax(dim=1, keepdim=True)
        return torch.cat([each / each.sum(dim=1, keepdim=True) * toxic, 1.0 - toxic], dim=1)

    def checksum(self) -> str:
        """SHA-256 of the projection and the codewords, the same on every device."""
        digest = hashlib.sha256(self.quantizer.codebook.checksum().encode())
        digest.update(str(self.projection.windows.sides).encode())
        for name, parameter in self.projection.named_parameters():
            values = parameter.detach().to("cpu", torch.float32).contiguous().numpy()
            digest.update(f"{name} {values.shape}".encode())
            digest.update(values.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()
