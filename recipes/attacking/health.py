"""What there is to see of a guard before anybody attacks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vqguard.adapters.code_target import CodeTarget


@torch.no_grad()
def guard_health(target: CodeTarget, pixels: Tensor) -> Mapping[str, int]:
    """Counts over pictures (B, 3, H, W): what a guard that works would not leave at zero, or raise.

    `cells` and `flagged_cells` of the safety map, `codes` of the codebook, `codes_used` by these
    pictures, and `foreign_tokens`: visual tokens that the language model was given and that are no
    codeword.
    """
    guard: Any = target.model.vqguard
    flagged = guard.safety_map.flagged(torch.arange(guard.cells)[:, None])
    foreign, used = 0, set[int]()
    for output in target.guard_outputs(pixels):
        for tokens, codes in zip(list(output.tokens), list(output.codes), strict=True):
            words = guard.patch.lookup(codes, tokens.dtype)
            foreign += int((tokens != words).any(dim=-1).sum())
            used.update(codes.flatten().tolist())
    return {
        "cells": guard.cells,
        "flagged_cells": int(flagged.sum()),
        "codes": guard.patch.codebook.codes,
        "codes_used": len(used),
        "foreign_tokens": foreign,
    }
