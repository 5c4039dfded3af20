"""The search in code space as a line of the table: no picture, the bound of all that have one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vqguard.redteam.attack import AttackResult, entered
from vqguard.redteam.code_search import CodeSearch
from vqguard.redteam.facts import Budget, MeasuredAttack, Scope
from vqguard.redteam.pixels import row_generators
from vqguard.redteam.quantised import QuantisedTarget, quantised
from vqguard.redteam.trial import AttackTarget


@dataclass(frozen=True, kw_only=True)
class SearchedCodes(MeasuredAttack):
    """Codes for each request, judged as if a picture with them could be painted.

    The guard's verdict plays no part in it. What it does not break no attack on pixels will, unless
    the search itself was too short: more steps and restarts say.
    """

    name: ClassVar[str] = "code_search"
    label: ClassVar[str] = "Code search (bound, no picture)"
    sentence: ClassVar[str] = (
        "Greedy search for codes that make the model answer, whether or not a picture has them and "
        "whatever the verdict: the bound of every attack on pixels."
    )
    scope: ClassVar[Scope] = Scope.PER_REQUEST
    measured: ClassVar[bool] = False
    quantised: ClassVar[bool] = True
    gradients: ClassVar[tuple[str, ...]] = ("straight_through",)

    spent: Budget
    """Steps are gradients; the radius plays no part."""
    tried: int = 24
    """See `CodeSearch.tried`."""
    most_swaps: int = 8
    """See `CodeSearch.most_swaps`."""

    @classmethod
    def within(cls, budget: Budget) -> SearchedCodes:
        """See `MeasuredAttack.within`."""
        return cls(spent=budget)

    def measure(self, target: AttackTarget, images: Tensor, held_out: Tensor) -> AttackResult:
        """See `MeasuredAttack.measure`."""
        return self(target, images, torch.arange(len(images)))

    def __call__(self, target: AttackTarget, images: Tensor, requests: Tensor) -> AttackResult:
        """Search for every request; the images are where the search starts, and stay."""
        inside = quantised(target, self.name)
        spent = self.spent
        search = CodeSearch(steps=spent.steps, tried=self.tried, most_swaps=self.most_swaps)
        requests = requests.to(images.device)
        success = torch.zeros(len(images), dtype=torch.bool)
        best = torch.full((len(images),), torch.inf)
        curve = torch.full((spent.steps + 1, len(images)), torch.nan)
        evaluations = torch.full((len(images),), -1)
        with entered(target):
            for restart in range(spent.restarts):
                rows = (~success).nonzero().flatten()
                if not len(rows):
                    break
                given = images[rows.to(images.device)], requests[rows.to(images.device)]
                draws = row_generators(given[0], spent.seed, restart, given[1])
                start = random_codes(inside, given[0], draws, restart)
                found = search(inside, *given, draws, start)
                won = inside.succeeded_by_codes(found.codes, *given).cpu()
                better = won | (found.loss < best[rows])
                best[rows[better]] = found.loss[better]
                curve[:, rows[better]] = found.curve[:, better]
                success[rows] |= won
                evaluations[rows[won]] = (restart + 1) * spent.steps * (1 + self.tried)
        return AttackResult(
            adversarial=images.detach().clone(),
            success=success.to(images.device),
            best_loss=best.to(images.device),
            losses=curve,
            evaluations=evaluations,
            eps_255=spent.eps_255,
            steps=spent.steps,
            restarts=spent.restarts,
        )


def random_codes(
    target: QuantisedTarget, images: Tensor, draws: list[torch.Generator], restart: int
) -> Tensor | None:
    """(B, N) int64 where a restart begins; None for the first: at the pictures' own codes."""
    if restart == 0:
        return None
    with torch.no_grad():
        shape = target.codes(target.features(images)).shape
    size = len(target.codewords)
    codes = [torch.randint(size, shape[1:], generator=generator) for generator in draws]
    return torch.stack(codes).to(images.device)
