"""Which samples each process takes for a step, and what each micro batch counts in it.

A step is the same samples with the same weights however many processes and micro batches share it:
one process, two, or two with accumulated gradients differ by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import Sampler

from vqguard.distributed import rank_and_world, shared_sum
from vqguard.errors import ConfigError
from vqguard.recipes.data.encoding import CAPTION_PICTURES, IGNORED, Example


class SharedBatches(Sampler[list[int]]):
    """The micro batches of one process, as indices.

    Seed and epoch alone decide the order of the samples. Every step takes the next `batch` of them;
    each process takes a run of as many, and cuts it into micro batches. What is left of an epoch is
    a smaller step; in several processes fewer samples than processes may be left out of it.
    """

    def __init__(self, samples: int, batch: int, micro: int, seed: int) -> None:
        """Share steps of `batch` of `samples` among the processes, `micro` at a time.

        Raises:
            ConfigError: when there are fewer samples than processes.
        """
        self.samples, self.batch, self.micro, self.seed = samples, batch, micro, seed
        self.rank, self.world = rank_and_world()
        self.epoch = 0
        if samples < self.world:
            raise ConfigError(
                f"{samples} samples cannot be shared out to {self.world} processes: start fewer"
            )

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return sum(1 for size in self._sizes() if size)

    def __len__(self) -> int:
        return sum(-(-size // self.micro) for size in self._sizes())

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.samples, generator=generator).tolist()
        for number, size in enumerate(self._sizes()):
            start = number * self.batch + self.rank * size
            share = order[start : start + size]
            for first in range(0, size, self.micro):
                yield share[first : first + self.micro]

    def _sizes(self) -> list[int]:
        """A process's samples in each step."""
        whole, left = divmod(self.samples, self.batch)
        return [self.batch // self.world] * whole + [left // self.world] * bool(left)


def by_length(micro_batches: Sequence[Sequence[Example]]) -> list[list[Example]]:
    """The examples of a step in micro batches of the same sizes, like lengths together.

    A micro batch is padded to its longest example. The step is the same, and differs by rounding.
    The longest come first: what does not fit into memory fails at once.
    """
    if len(micro_batches) < 2:
        return [list(batch) for batch in micro_batches]
    longest_first = sorted(
        (example for batch in micro_batches for example in batch),
        key=lambda example: len(example["input_ids"]),
        reverse=True,
    )
    rest = iter(longest_first)
    return [list(islice(rest, len(batch))) for batch in micro_batches]


@dataclass(frozen=True)
class Share:
    """Factors that make a mean over one micro batch its part of the mean over the whole step.

    `tokens` for means over answer tokens, `samples` for means over samples, `turns` for means over
    the turns that show pictures. The trainer takes the mean over micro batches and processes
    afterwards: with one of each all are 1.
    """

    tokens: float
    samples: float
    turns: float


def shares(batches: Sequence[Mapping[str, Any]], device: torch.device) -> list[Share]:
    """The shares of a process's micro batches in their step; a collective call."""
    counts = torch.tensor(
        [
            [
                int((b["labels"] != IGNORED).sum()),
                len(b["labels"]),
                len(b.get(CAPTION_PICTURES, ())),
            ]
            for b in batches
        ],
        dtype=torch.float64,
        device=device,
    )
    totals = shared_sum(counts.sum(0)).clamp_min(1)  # a step of texts alone has no turn to weigh
    parts = len(batches) * rank_and_world()[1]
    return [Share(*row) for row in (counts * parts / totals).tolist()]
