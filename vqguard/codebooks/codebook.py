"""The entries of one codebook and their life: start, use counts, revival."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from vqguard.codebooks.full_precision import FullPrecision
from vqguard.codebooks.kmeans import kmeans, repeat_rows, separate, streamed_kmeans
from vqguard.distributed import (
    finite_chunks,
    rank_and_world,
    shared_choice,
    shared_sample,
    shared_sum,
)
from vqguard.errors import InputError


class Codebook(FullPrecision):
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

    def start_from(
        self,
        features: Tensor | Iterable[Tensor],
        method: Literal["kmeans", "sample"] = "kmeans",
        seed: int = 0,
        iterations: int = 20,
    ) -> None:
        """Set the entries from `features` (n, d), any float dtype, and reset the counts.

        Features larger than memory come as an iterable of chunks (n_i, d) that can be iterated
        again and again (a list, a dataset; not a generator). Where torch.distributed is
        initialised, every process gives its own share and all get the same entries.

        "kmeans" takes seeded cluster centres (faiss if installed and the features are one tensor of
        one process, torch otherwise), "sample" random rows. Entries that would repeat another one
        (few or repeated features) get small seeded noise.

        Raises:
            InputError: on a wrong shape.
            NonFiniteError: on NaN or infinity.
        """
        generator = torch.Generator().manual_seed(seed)
        if isinstance(features, Iterator):
            raise InputError(
                "expected a tensor or an iterable that can be iterated again, got an iterator; make"
                " a list of it, or a class with __iter__"
            )
        if method == "sample":
            drawn = shared_sample(self._chunks(features), self.codes, generator, self.weight)
            centres = separate(repeat_rows(drawn, self.codes, generator), drawn, generator)
        elif method == "kmeans" and isinstance(features, Tensor) and rank_and_world()[1] == 1:
            (points,) = self._chunks(features)
            centres = kmeans(points, self.codes, seed, iterations)
        elif method == "kmeans":
            centres = streamed_kmeans(
                lambda: self._chunks(features), self.weight, self.codes, seed, iterations
            )
        else:
            raise InputError(f"unknown start {method!r}; use 'kmeans' or 'sample'")
        with torch.no_grad():
            self.weight.copy_(centres)
        self.reset_counts()

    def revive(
        self, features: Tensor | Iterable[Tensor], threshold: int, generator: torch.Generator
    ) -> int:
        """Give entries used fewer than `threshold` times a new life; return how many.

        They become random rows of `features` (n, d), or of chunks (n_i, d) that can be iterated
        twice, apart by small noise where rows repeat. All counts are reset. `generator` is a CPU
        generator. An optimiser's moments of revived entries are the caller's to clear.

        Where torch.distributed is initialised, every process calls this with its own features and
        a generator of the same seed: uses are summed, and all revive the same entries alike, as
        one process with all the features would.
        """
        dead = (self.shared_counts() < threshold).nonzero().flatten()
        if dead.numel():
            count = int(dead.numel())
            drawn = shared_choice(lambda: self._chunks(features), count, generator, self.weight)
            rows = repeat_rows(drawn, count, generator)
            with torch.no_grad():
                self.weight[dead] = separate(rows, drawn, generator)
        self.reset_counts()
        return int(dead.numel())

    def shared_counts(self) -> Tensor:
        """The uses (P,) int64 summed over all processes of torch.distributed; a collective call."""
        return shared_sum(self.counts)

    def count(self, indices: Tensor) -> None:
        """Add the uses of `indices` (int64, any shape) to the counts."""
        self.counts += torch.bincount(indices.flatten(), minlength=self.codes)

    def reset_counts(self) -> None:
        """Forget all uses."""
        self.counts.zero_()

    def perplexity(self, counts: Tensor | None = None) -> float:
        """exp(entropy) of the uses since the last reset: 1 to P; NaN when nothing was counted.

        Of this process's uses, or of `counts` (P,) such as `shared_counts` gives.
        """
        counts = self.counts if counts is None else counts
        total = int(counts.sum())
        if total == 0:
            return math.nan
        share = counts[counts > 0].double() / total
        return float(torch.exp(-(share * share.log()).sum()))

    def dead_share(self, counts: Tensor | None = None) -> float:
        """Share of entries, 0 to 1, that were not used since the last reset; as `perplexity`."""
        counts = self.counts if counts is None else counts
        return float((counts == 0).double().mean())

    def checksum(self) -> str:
        """SHA-256 of the entries' shape and bytes, the same on every device."""
        digest = hashlib.sha256(f"float32 {tuple(self.weight.shape)}".encode())
        entries = self.weight.detach().to("cpu", torch.float32).contiguous().numpy()
        digest.update(entries.astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def extra_repr(self) -> str:
        return f"codes={self.codes}, dim={self.dim}"

    def _chunks(self, features: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
        chunks = [features] if isinstance(features, Tensor) else features
        if isinstance(features, Tensor) and features.dim() == 2 and not features.shape[0]:
            raise InputError(f"expected at least one row of features of width {self.dim}, got none")
        return finite_chunks(chunks, self.dim, self.weight.device)
