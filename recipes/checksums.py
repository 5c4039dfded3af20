"""SHA-256 of tensors and texts: what must not change, and what must be the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
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


def text_sha256(text: str) -> str:
    """SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
