"""The entries of one codebook and their life: start, use counts, revival."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vqguard.errors import InputError, NonFiniteError
from vqguard.kmeans import kmeans, separate


class Codebook(nn.Module):
    """P entries of width d with their use counts.

    `weight` (P, d) float32 parameter, `counts` (P,) int64 buffer. Casting a model (`half`,
    `to(torch.bfloat16)`) moves the codebook but leaves it in float32: rounding the entries would
    change codes and verdicts.
    """

    weight: nn.Parameter
    counts: Tensor

    def __init__(self, codes: int, dim: int, seed: int = 0) -> None:
        """Start with `codes` seeded random entries of width `dim` and length about 1."""
        super().__init__()
        if codes < 1 or dim < 1:
            raise InputError(f"a codebook needs codes >= 1 and dim >= 1, got {codes} and {dim}")
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(codes, dim, generator=generator) / math.sqrt(dim))
        self.register_buffer("counts", torch.zeros(codes, dtype=torch.int64))

    @property
    def codes(self) -> int:
        """Number of entries P."""
        return self.weight.shape[0]

    @property
    def dim(self) -> int:
        """Width d of an entry."""
        return self.weight.shape[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype != tensor.dtype else moved

        apply: Any = super()._apply
        apply(move, recurse)
        return self

    def start_from(
        self,
        features: Tensor,
        method: Literal["kmeans", "sample"] = "kmeans",
        seed: int = 0,
        iterations: int = 20,
    ) -> None:
        """Set the entries from `features` (n, d), any float dtype, and reset the counts.

        "kmeans" takes seeded cluster centres (faiss if installed, torch otherwise), "sample" random
        rows. Entries that would repeat another one (few or repeated features) get small seeded
        noise. Raises InputError on a wrong shape, NonFiniteError on NaN or infinity.
        """
        points = self._points(features)
        if method == "kmeans":
            centres = kmeans(points, self.codes, seed, iterations)
        elif method == "sample":
            generator = torch.Generator().manual_seed(seed)
            centres = separate(_draw(points, self.codes, generator), points, generator)
        else:
            raise InputError(f"unknown start {method!r}; use 'kmeans' or 'sample'")
        with torch.no_grad():
            self.weight.copy_(centres)
        self.reset_counts()

    def revive(self, features: Tensor, threshold: int, generator: torch.Generator) -> int:
        """Give entries used fewer than `threshold` times a new life; return how many.

        They become random rows of `features` (n, d), apart by small noise where rows repeat. All
        counts are reset. `generator` is a CPU generator. An optimiser's moments of revived entries
        are the caller's to clear.
        """
        dead = (self.counts < threshold).nonzero().flatten()
        if dead.numel():
            points = self._points(features)
            rows = _draw(points, int(dead.numel()), generator)
            with torch.no_grad():
                self.weight[dead] = separate(rows, points, generator)
        self.reset_counts()
        return int(dead.numel())

    def count(self, indices: Tensor) -> None:
        """Add the uses of `indices` (int64, any shape) to the counts."""
        self.counts += torch.bincount(indices.flatten(), minlength=self.codes)

    def reset_counts(self) -> None:
        """Forget all uses."""
        self.counts.zero_()

    def perplexity(self) -> float:
        """exp(entropy) of the uses since the last reset: 1 to P; NaN when nothing was counted."""
        total = int(self.counts.sum())
        if total == 0:
            return math.nan
        share = self.counts[self.counts > 0].double() / total
        return float(torch.exp(-(share * share.log()).sum()))

    def dead_share(self) -> float:
        """Share of entries, 0 to 1, that were not used since the last reset."""
        return float((self.counts == 0).double().mean())

    def checksum(self) -> str:
        """SHA-256 of the entries' shape and bytes, the same on every device."""
        digest = hashlib.sha256(f"float32 {tuple(self.weight.shape)}".encode())
        entries = self.weight.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(entries.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def extra_repr(self) -> str:
        return f"codes={self.codes}, dim={self.dim}"

    def _points(self, features: Tensor) -> Tensor:
        if features.dim() != 2 or features.shape[1] != self.dim or features.shape[0] < 1:
            raise InputError(
                f"expected features of shape (n, {self.dim}) with n >= 1 for a codebook of width"
                f" {self.dim}, got {tuple(features.shape)}"
            )
        points = features.detach().to(self.weight.device, torch.float32)
        if not bool(torch.isfinite(points).all()):
            raise NonFiniteError("the features for the codebook hold NaN or infinity")
        return points.contiguous()


def _draw(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random rows, each at most once as long as there are enough."""
    if count <= points.shape[0]:
        chosen = torch.randperm(points.shape[0], generator=generator)[:count]
    else:
        chosen = torch.randint(points.shape[0], (count,), generator=generator)
    return points[chosen.to(points.device)]
