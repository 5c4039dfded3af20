"""The base of attacks with one image for many requests (ImgJP: Niu et al. 2024, arXiv 2402.02309).

It checks, restarts, clips, judges and scores; attacks write `run`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from vqguard.errors import ConfigError, InputError
from vqguard.redteam.attack import check_requests, entered, warning_texts
from vqguard.redteam.facts import AttackOutcome, Budget, MeasuredAttack, Scope
from vqguard.redteam.pixels import check_images
from vqguard.redteam.trial import AttackTarget
from vqguard.redteam.universal_trial import UniversalTrial


@dataclass(frozen=True)
class UniversalResult(AttackOutcome):
    """What a universal attack found."""

    adversarial: Tensor
    """(3, H, W) float32 in [0, 1], inside the ball: of all judged iterates, the one with most
    successes over the attacked requests, then of lowest mean loss."""
    success: Tensor
    """(R,) bool, the judge's answer for each attacked request."""
    held_out_success: Tensor
    """(H,) bool, the same for each held-out request; (0,) if there were none. The image was not
    chosen by them."""
    mean_loss: float
    """Mean loss over all attacked requests at `adversarial`."""
    losses: Tensor
    """(steps,) float32 on the CPU, of the restart that made `adversarial`; entry t is the mean loss
    of the mini-batch at step t, NaN after `adversarial` was found."""

    @property
    def scored(self) -> Tensor:
        """(H,) bool: the requests that the image was not made for."""
        return self.held_out_success

    @property
    def example(self) -> Tensor:
        """(3, H, W) float32 in [0, 1]: the image."""
        return self.adversarial

    @property
    def curve(self) -> list[float]:
        """The mean loss of each mini-batch."""
        return [float(v) for v in self.losses if v == v]


@dataclass(frozen=True, kw_only=True)
class UniversalAttack(MeasuredAttack):
    """An attack with one image whose loss is the mean over a mini-batch of requests.

    Requests are drawn without replacement until all were used, then again in another order. At
    checkpoints the image is judged on all attacked requests; it stops when all of them succeed.
    Under a gradient that is exactly zero the image does not move, as in `Attack`.

    Raises:
        ConfigError: requests_per_step below 1.
    """

    scope: ClassVar[Scope] = Scope.UNIVERSAL
    on_controls: ClassVar[bool] = False

    requests_per_step: int = 8
    """Size of the mini-batch."""

    def __post_init__(self) -> None:
        if self.requests_per_step < 1:
            raise ConfigError(f"requests_per_step must be at least 1, got {self.requests_per_step}")

    @property
    @abstractmethod
    def budget(self) -> Budget:
        """What the attack may spend."""

    @abstractmethod
    def run(self, trial: UniversalTrial, start: Tensor) -> None:
        """Attack from `start` (1, 3, H, W): ask `trial.gradient`, move, `trial.project`.

        The last iterate goes to `trial.close`.
        """

    def measure(self, target: AttackTarget, images: Tensor, held_out: Tensor) -> UniversalResult:
        """See `MeasuredAttack.measure`."""
        return self(target, images[0], held_out=held_out)

    @final
    def __call__(
        self,
        target: AttackTarget,
        image: Tensor,
        requests: Tensor | None = None,
        held_out: Tensor | None = None,
        *,
        batch_size: int = 32,
    ) -> UniversalResult:
        """Attack one image.

        Args:
            target: the victim.
            image: (3, H, W) float32 in [0, 1], the centre of the ball.
            requests: (R,) int64, the requests to attack; default: all but the held-out ones.
            held_out: (H,) int64, requests to judge at the end only; default: none.
            batch_size: requests evaluated at the same time when the whole set is.

        Raises:
            InputError: image or requests of another kind, or a request attacked and held out.
        """
        if image.ndim != 3:
            raise InputError(
                f"a universal attack takes one image (3, H, W), got shape {tuple(image.shape)}"
            )
        check_images(image[None])
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        requests, held_out = _split_requests(target, requests, held_out)
        budget = self.budget
        with entered(target):
            trial = UniversalTrial(
                target,
                image.detach()[None],
                requests.to(image.device),
                budget,
                requests_per_step=self.requests_per_step,
                batch_size=batch_size,
            )
            for restart in range(budget.restarts):
                self.run(trial, trial.start(restart))
                if trial.won:
                    break
            success = trial.judged(trial.requests)
            held = trial.judged(held_out.to(image.device))
        masked = torch.tensor([not trial.moved])
        not_finite = torch.tensor([trial.not_finite])
        return UniversalResult(
            adversarial=trial.best[0],
            success=success,
            held_out_success=held,
            mean_loss=trial.mean_loss,
            losses=trial.best_curve,
            eps_255=budget.eps_255,
            steps=budget.steps,
            restarts=budget.restarts,
            warnings=warning_texts(masked, not_finite, budget.restarts),
            masked=int(masked.sum()),
        )


def _split_requests(
    target: AttackTarget, requests: Tensor | None, held_out: Tensor | None
) -> tuple[Tensor, Tensor]:
    if held_out is None or len(held_out) == 0:
        held_out = torch.empty(0, dtype=torch.int64)
    else:
        check_requests(target, held_out)
    if requests is None:
        kept = set(range(target.requests)) - set(held_out.tolist())
        requests = torch.tensor(sorted(kept), dtype=torch.int64)
    check_requests(target, requests)
    both = sorted(set(requests.tolist()) & set(held_out.tolist()))
    if both:
        raise InputError(
            f"requests {both[:5]} are both attacked and held out; a held-out request must not be "
            "seen by the attack"
        )
    return requests, held_out
