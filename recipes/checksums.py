"""SHA-256 of tensors, files and texts: what must not change, and what must be the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of each tensor's bytes."""
    return {
        name: hashlib.sha256(_bytes_of(tensor.detach().cpu())).hexdigest()
        for name, tensor in tensors.items()
    }


def _bytes_of(tensor: torch.Tensor) -> Any:
    # The array itself is hashed, without a copy; numpy's types say it is a buffer from 3.12 on.
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(2**22):
            digest.update(piece)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
