"""A model as the target of an attack whose request comes a turn after the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vqguard.adapters.attack_target import GenerationTarget
from vqguard.redteam.gradients import GradientPath
from vqguard.redteam.modes import GradientMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FIRST_TOKENS = 24
"""Length of the first turn's answers."""


@dataclass(frozen=True)
class Turns:
    """Two turns for each of R requests."""

    first: Sequence[str]
    """The first turn's prompt, with the picture, ready to be answered."""
    second: Callable[[int, str], str]
    """A request's number and the first turn's answer -> both turns, ready to be answered."""
    openings: Sequence[str]
    """What the second answer shall begin with: one for all, or one for each request."""


class LaterTurnTarget(GenerationTarget):
    """`GenerationTarget` of the second turn, behind the model's own answer in the first.

    The loss is that behind the answers to the clean pictures, so that it does not jump when an
    answer changes. `answers`, and so `succeeded`, are those of the conversation as it goes: the
    model answers the first question about the very pixels, and then the request.

    Args:
        model: an image-text-to-text model, guarded or not.
        processor: its processor.
        turns: what is said.
        clean: (R, 3, H, W) float32 in [0, 1], the pictures before the attack.
        gradient: as of `GenerationTarget`.
        evade_verdict: as of `GenerationTarget`.
        defense: as of `GenerationTarget`; it stands in front of both turns.

    Raises:
        ConfigError: as of `GenerationTarget`.
        InputError: as of `GenerationTarget`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        turns: Turns,
        clean: Tensor,
        *,
        gradient: GradientPath | GradientMode | str = "plain",
        evade_verdict: bool = False,
        defense: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.turns = turns
        self._first = GenerationTarget(
            model, processor, turns.first, turns.openings, max_new_tokens=FIRST_TOKENS
        )
        self._first.defense = defense
        said = self._first.answers(clean, torch.arange(len(turns.first)))
        super().__init__(
            model,
            processor,
            [turns.second(number, text) for number, text in enumerate(said)],
            turns.openings,
            gradient=gradient,
            evade_verdict=evade_verdict,
        )
        self.defense = defense

    def answers(self, pixels: Tensor, request: Tensor) -> list[str]:
        """What the model says in the second turn of a conversation about these pixels: B texts."""
        said = self._first.answers(pixels, request)
        prompts = [
            self._text.tokens(self.turns.second(number, text), f"turn 2 of request {number}")
            for number, text in zip(request.tolist(), said, strict=True)
        ]
        return self._answered(*self._text.left_padded(prompts), pixels)
