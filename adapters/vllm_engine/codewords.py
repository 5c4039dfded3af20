"""The workers' half of the guard: codes in, codewords out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from vqguard.adapters.storage.bound_files import GUARD, GUARD_FOLDER
from vqguard.adapters.storage.manifest import read_manifest
from vqguard.errors import ChecksumError, InputError
from vqguard.files import file_sha256
from vqguard.guard import VQGuard


class Codewords:
    """The codebooks of a folder's guard, whole on each rank: what they give is never split."""

    def __init__(self, folder: Path) -> None:
        """Raises `ArtefactError`, `ChecksumError` among them."""
        if file_sha256(folder / GUARD) != read_manifest(folder).guard_sha256:
            raise ChecksumError(
                f"{folder / GUARD} is not the file that was saved with this model; restore it"
            )
        guard = VQGuard.from_pretrained(folder / GUARD_FOLDER)
        levels = [guard.patch, *guard.deep]
        self._tables = [level.get_parameter("codebook.weight").detach() for level in levels]

    @property
    def levels(self) -> int:
        """How many deep-stack levels follow the patch level."""
        return len(self._tables) - 1

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Codewords:
        """Keep them where and as the language model takes them."""
        self._tables = [table.to(device, dtype) for table in self._tables]
        return self

    def of(self, codes: Tensor) -> Tensor:
        """(N, (1 + levels) · d) from (N, 1 + levels) codes; zeros in the place of negative ones.

        Levels that have no column are zeros too: pictures that are made up have none.

        Raises:
            InputError: codes that no codebook has.
        """
        columns = []
        for level, table in enumerate(self._tables):
            if level >= codes.shape[1]:
                columns.append(table.new_zeros(len(codes), table.shape[1]))
                continue
            column = codes[:, level].long()
            if len(column) and int(column.max()) >= len(table):
                raise InputError(f"expected codes below {len(table)}, got {int(column.max())}")
            words = table[column.clamp(min=0)]
            columns.append(words.masked_fill((column < 0)[:, None], 0))
        return torch.cat(columns, dim=-1)
