"""What verdicts on many images are read from, gathered batch by batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vqguard.adapters.features import pad_semantic
from vqguard.codebooks.guard_output import Judged
from vqguard.judging.rules import JudgeRules
from vqguard.safety_map import NEUTRAL, SafetyMap


class JudgedRows:
    """`Judged` of images, a row each, on the CPU."""

    def __init__(self) -> None:
        """None yet."""
        self._codes: list[Tensor] = []
        self._distances: list[Tensor] = []
        self._visual: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._codes)

    def add(self, judged: Judged) -> None:
        """Put a batch behind the others, all with the same parts."""
        own = (judged.codes >= 0).cpu()
        self._codes += [row[mine] for row, mine in zip(judged.codes.cpu(), own, strict=True)]
        if judged.distances is not None:
            far = judged.distances.cpu()
            self._distances += [row[mine] for row, mine in zip(far, own, strict=True)]
        if judged.visual is not None:
            self._visual.append(judged.visual.cpu())

    def together(self) -> Judged:
        """All of them, padded to one length; a mask always."""
        codes, mask = pad_semantic(self._codes)
        return Judged(
            codes,
            torch.ones_like(codes, dtype=torch.bool) if mask is None else mask,
            pad_semantic(self._distances)[0] if self._distances else None,
            torch.cat(self._visual) if self._visual else None,
        )


def chosen_rows(judged: Judged, rows: Tensor) -> Judged:
    """The rows (m,) of `JudgedRows.together`."""
    mask, far, visual = (None if part is None else part[rows] for part in judged[1:])
    return Judged(judged.codes[rows], mask, far, visual)


def with_unfamiliar(
    safety_map: SafetyMap,
    rules: JudgeRules,
    judged: Judged,
    labels: Sequence[tuple[str, ...]],
    patch_checksum: str,
) -> SafetyMap:
    """The map with the distance from which an image is unfamiliar, where the rules give a budget.

    Args:
        judged: images that the codebooks were not trained on, with the distances that are asked
            for; by visual tokens the neutral ones alone count.
        labels: their categories.
        patch_checksum: of the patch codebook, by whose distances `judged.visual` is.

    Raises:
        InputError: too few images for the budget.
    """
    if rules.unfamiliar is None:
        return safety_map
    if rules.unfamiliar_by == "visual" and judged.visual is not None:
        neutral = torch.tensor([names == (NEUTRAL,) for names in labels])
        return safety_map.with_unfamiliar(
            rules.unfamiliar,
            judged.visual[neutral],
            first=rules.unfamiliar_first,
            patch_checksum=patch_checksum,
        )
    if judged.distances is None:
        raise ValueError(f"expected distances of {rules.unfamiliar_by} tokens, got none")
    return safety_map.with_unfamiliar(
        rules.unfamiliar, judged.distances, judged.mask, first=rules.unfamiliar_first
    )
