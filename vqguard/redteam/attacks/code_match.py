"""Codes first, pixels after: search in code space, then paint what was found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attack import Attack
from vqguard.redteam.attacks.adam import Adam
from vqguard.redteam.attacks.pgd import PGD, step_size
from vqguard.redteam.code_search import CodeMatch, CodeSearch
from vqguard.redteam.quantised import quantised
from vqguard.redteam.trial import Loss, Steered, Trial


@dataclass(frozen=True, kw_only=True)
class MatchedCodes(Attack):
    """`search_steps` look for codes, then `steps` bring the features into those cells.

    One image a request: codes are kept by request number.
    """

    name: ClassVar[str] = "code_match"
    label: ClassVar[str] = "Code search, then matched in pixels"
    sentence: ClassVar[str] = (
        "Searches codes that make the model answer, then paints a picture within the budget whose "
        "tokens have them and which the guard lets pass."
    )
    measured: ClassVar[bool] = False
    quantised: ClassVar[bool] = True
    gradients: ClassVar[tuple[str, ...]] = ("straight_through",)

    tried: int = 24
    """See `CodeSearch.tried`."""
    search_steps: int = 60
    """Gradients of the search."""
    reach: int = 0
    """See `CodeSearch.reach`; 0 without a bound, else by the budget: 8 codewords for each 1/255."""
    step_255: float = 8.0
    """Adam's step where there is no budget."""

    def run(self, trial: Trial, start: Tensor) -> None:
        """See `Attack.run`."""
        target = quantised(trial.target, self.name)
        reach = self.reach or (0 if self.eps_255 >= 255 else int(8 * self.eps_255))
        search = CodeSearch(steps=self.search_steps, tried=self.tried, reach=reach)
        found = search(target, start, trial.request, trial.generators)
        numbers = {number: row for row, number in enumerate(trial.request.tolist())}
        self._paint(trial, start, CodeMatch(target, found.codes, numbers))

    def _paint(self, trial: Trial, start: Tensor, objective: Loss) -> None:
        painting = Steered(trial, objective)
        if self.eps_255 >= 255:
            adam = Adam(
                eps_255=self.eps_255,
                steps=self.steps,
                step_255=self.step_255,
                judge_every=self.judge_every,
            )
            adam.descend(painting, start)
            return
        pgd = PGD(
            eps_255=self.eps_255,
            steps=self.steps,
            step_255=step_size(self.eps_255),
            decay="cosine",
            judge_every=self.judge_every,
        )
        pgd.descend(painting, start)


def agreement(objective: CodeMatch, pixels: Tensor, request: Tensor) -> Tensor:
    """(B,) the share of tokens that have their wanted code."""
    with torch.no_grad():
        codes = objective.target.codes(objective.target.features(pixels))
    wanted = objective.wanted[[objective.rows[number] for number in request.tolist()]]
    return (codes == wanted).float().mean(dim=1)
