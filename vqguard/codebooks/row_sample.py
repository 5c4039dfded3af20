"""A uniform sample of a stream's rows, in bounded memory."""

from __future__ import annotations

import torch
from torch import Tensor

from vqguard.errors import InputError


class RowSample:
    """At most `limit` rows of all that are added, each as likely as any other.

    Every row draws a random key and the smallest keys stay (reservoir sampling by random sort:
    Sunter 1977). Seeded: the same rows in the same order give the same sample, however they were
    cut into batches.
    """

    def __init__(self, limit: int, seed: int = 0) -> None:
        if limit < 1:
            raise InputError(f"a sample keeps at least one row, got limit={limit}")
        self.limit = limit
        self.seen = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: Tensor | None = None
        self._keys = torch.empty(0, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Offer rows (n, d), on the CPU; all calls with the same d and dtype."""
        keys = torch.rand(len(rows), generator=self._generator, dtype=torch.float64)
        self.seen += len(rows)
        self._keys = torch.cat([self._keys, keys])
        self._rows = rows if self._rows is None else torch.cat([self._rows, rows])
        if len(self._keys) > self.limit:
            kept = self._keys.argsort(stable=True)[: self.limit].sort().values
            self._keys, self._rows = self._keys[kept], self._rows[kept]

    def rows(self) -> Tensor:
        """The sample (m, d), m <= limit, in the order of the stream.

        Raises:
            InputError: if empty.
        """
        if self._rows is None or not len(self._rows):
            raise InputError("no rows to sample from: expected at least one image")
        return self._rows
