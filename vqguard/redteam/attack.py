"""The base of every attack: it checks, restarts, clips, judges and scores; attacks write `run`."""

from __future__ import annotations

import contextlib
import logging
from abc import abstractmethod
from dataclasses import asdict, dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from vqguard.errors import ConfigError, InputError
from vqguard.redteam.facts import AttackOutcome, Budget, MeasuredAttack, Scope
from vqguard.redteam.pixels import check_images, random_start
from vqguard.redteam.trial import AttackTarget, Trial, judged

logger = logging.getLogger("vqguard.redteam")


@dataclass(frozen=True)
class AttackResult(AttackOutcome):
    """What an attack found."""

    adversarial: Tensor
    """(B, 3, H, W) float32 in [0, 1], inside the ball: of all iterates of all restarts, one that
    succeeded, else the one of lowest loss."""
    success: Tensor
    """(B,) bool, the judge's answer on `adversarial`."""
    best_loss: Tensor
    """(B,) float32, the target's loss on `adversarial` (infinite if none was finite)."""
    losses: Tensor
    """(steps + 1, B) float32 on the CPU, for each image of the restart that made its `adversarial`;
    row t is the loss after t steps, NaN once the image was finished."""
    evaluations: Tensor
    """(B,) int64 on the CPU: how often the loss was evaluated until the judge saw a success, over
    all restarts; -1 where there was none."""

    @property
    def scored(self) -> Tensor:
        """(B,) bool: every image counts."""
        return self.success

    @property
    def example(self) -> Tensor:
        """(3, H, W) float32 in [0, 1]: the first image."""
        return self.adversarial[0]

    @property
    def curve(self) -> list[float]:
        """The mean loss over the steps.

        A finished image has no further loss: its last one stands, so that the mean stays
        comparable.
        """
        filled = self.losses.clone()
        for step in range(1, len(filled)):
            missing = filled[step].isnan()
            filled[step][missing] = filled[step - 1][missing]
        return [float(v) for v in filled.mean(dim=1) if v == v]


def warning_texts(masked: Tensor, not_finite: Tensor, restarts: int) -> tuple[str, ...]:
    """Warnings on gradients that were always zero (B,) bool and losses not finite (B,) bool."""
    texts = []
    if masked.any():
        texts.append(
            f"masked gradient: {int(masked.sum())} of {len(masked)} images never received a "
            f"non-zero gradient, so this was a search over {restarts} starts; a defense rate "
            "measured with it says nothing about an adaptive attacker"
        )
    if not_finite.any():
        texts.append(
            f"loss not finite: {int(not_finite.sum())} of {len(not_finite)} images met a NaN or "
            "infinite loss; those iterates were passed over"
        )
    for text in texts:
        logger.warning(text)
    return tuple(texts)


def entered(target: AttackTarget) -> contextlib.AbstractContextManager[object]:
    """The target's own context (frozen weights, eval mode), or one that does nothing."""
    if isinstance(target, contextlib.AbstractContextManager):
        return target
    return contextlib.nullcontext()


def check_requests(target: AttackTarget, requests: Tensor, count: int | None = None) -> None:
    """Refuse request numbers that are not int64 (count,) or that the target does not have.

    Raises:
        InputError: naming what was expected and what came.
    """
    if requests.ndim != 1 or requests.dtype != torch.int64 or len(requests) == 0:
        raise InputError(
            f"expected requests as int64 of shape (B,) with B >= 1, got {requests.dtype} of shape "
            f"{tuple(requests.shape)}"
        )
    if count is not None and len(requests) != count:
        raise InputError(f"got {len(requests)} requests for {count} images; give one an image")
    low, high = int(requests.min()), int(requests.max())
    if low < 0 or high >= target.requests:
        raise InputError(
            f"request numbers run from {low} to {high}, but the target has {target.requests} "
            "requests, numbered from 0"
        )


@dataclass(frozen=True, kw_only=True)
class Attack(MeasuredAttack):
    """An attack on each image by itself.

    Restart 0 starts at the clean image, as the published attacks do, or near it (`start_255`); the
    others at a uniform point of the ball. The same seed gives the same result whatever the batch:
    the start of an image depends on its pixels, its request, the seed and the restart only. What
    batch dependence is left comes from the kernels of the model.

    When the gradient is exactly zero (a stopped gradient) an image does not move: random-sign steps
    are not the published attack. Only restarts change it then, each costs one evaluation, and the
    result carries a warning.

    Raises:
        ConfigError: a value out of range.
    """

    scope: ClassVar[Scope] = Scope.PER_REQUEST

    eps_255: float = 8.0
    """Radius of the L-infinity ball in 1/255, in (0, 255]; 255 is unbounded."""
    steps: int = 100
    """Gradient steps of one restart."""
    restarts: int = 1
    """How many, the one from the clean image included."""
    seed: int = 0
    """For the random starts."""
    judge_every: int = 25
    """Steps between judgements by real generation; an image that succeeded stops."""
    start_255: float = 0.0
    """Where restart 0 starts: a uniform point at most so many 1/255 from the clean image, and in
    the ball; 0: the image itself, whatever the seed."""

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 < self.eps_255 <= 255.0:
            problems.append(f"eps_255 must be in (0, 255] (units of 1/255), got {self.eps_255}")
        if not 0.0 <= self.start_255 <= 255.0:
            problems.append(f"start_255 must be in [0, 255] (1/255), got {self.start_255}")
        for name in ("steps", "restarts", "judge_every"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, got {getattr(self, name)}")
        problems += self.problems()
        if problems:
            raise ConfigError("; ".join(problems))

    @classmethod
    def within(cls, budget: Budget) -> Attack:
        """See `MeasuredAttack.within`."""
        return cls(**asdict(budget))

    def measure(self, target: AttackTarget, images: Tensor, held_out: Tensor) -> AttackResult:
        """See `MeasuredAttack.measure`."""
        return self(target, images)

    @classmethod
    def condition(cls, budget: Budget, gradient: str) -> dict[str, str | float]:
        """See `MeasuredAttack.condition`. Restarts come second: reports have always said so."""
        first: dict[str, str | float] = {"attack": cls.name, "restarts": budget.restarts}
        return first | super().condition(budget, gradient)

    @property
    def starts_at_random(self) -> bool:
        """Whether any of its restarts starts at a point that the seed draws."""
        return self.restarts > 1 or self.start_255 > 0

    def problems(self) -> list[str]:
        """What is wrong with the values that a subclass adds."""
        return []

    @abstractmethod
    def run(self, trial: Trial, start: Tensor) -> None:
        """Attack from `start` (B, 3, H, W): ask `trial.gradient`, move, `trial.project`.

        The last iterate goes to `trial.close`.
        """

    @final
    def __call__(
        self,
        target: AttackTarget,
        images: Tensor,
        requests: Tensor | None = None,
        *,
        batch_size: int = 32,
    ) -> AttackResult:
        """Attack every image.

        Args:
            target: the victim.
            images: (B, 3, H, W) float32 in [0, 1].
            requests: (B,) int64, the request that each image attacks; default: image i, request i.
            batch_size: images attacked at the same time.

        Raises:
            InputError: images or requests of another kind.
        """
        check_images(images)
        images = images.detach()
        if requests is None:
            requests = torch.arange(len(images))
        check_requests(target, requests, len(images))
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        requests = requests.to(images.device)
        with entered(target):
            parts = [
                self._attack_batch(target, some, which)
                for some, which in zip(
                    torch.split(images, batch_size), torch.split(requests, batch_size), strict=True
                )
            ]
        masked, not_finite, lost = (torch.cat([p.flags[i] for p in parts]) for i in range(3))
        texts = warning_texts(masked, not_finite, self.restarts)
        if lost.any():
            texts += (
                f"judge not stable: {int(lost.sum())} of {len(lost)} images succeeded at a "
                "checkpoint and not in the final scoring; they count as failures",
            )
            logger.warning(texts[-1])
        return AttackResult(
            adversarial=torch.cat([p.adversarial for p in parts]),
            success=torch.cat([p.success for p in parts]),
            best_loss=torch.cat([p.best_loss for p in parts]),
            losses=torch.cat([p.losses for p in parts], dim=1),
            evaluations=torch.cat([p.evaluations for p in parts]),
            masked=int(masked.sum()),
            eps_255=self.eps_255,
            steps=self.steps,
            restarts=self.restarts,
            warnings=texts,
        )

    def _attack_batch(self, target: AttackTarget, clean: Tensor, request: Tensor) -> _Part:
        best = self._restart(target, clean, request, 0)
        losses = best.losses(self.steps + 1)
        evaluations, spent = best.won_after, len(best.curve)
        for restart in range(1, self.restarts):
            rows = (~best.won).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            trial = self._restart(target, clean[rows], request[rows], restart)
            better = trial.won | (trial.best_loss < best.best_loss[rows])
            into = rows[better]
            best.best[into] = trial.best[better]
            best.best_loss[into] = trial.best_loss[better]
            losses[:, into.cpu()] = trial.losses(self.steps + 1)[:, better.cpu()]
            won_now = rows[trial.won]
            evaluations[won_now] = spent + trial.won_after[trial.won]
            spent += len(trial.curve)
            best.won[rows] |= trial.won
            best.moved[rows] |= trial.moved
            best.not_finite[rows] |= trial.not_finite
        success = judged(target, best.best, request)
        flags = (~best.moved, best.not_finite, best.won & ~success)
        evaluations = evaluations.where(success, -1).cpu()
        return _Part(best.best, success, best.best_loss, losses, evaluations, flags)

    def _restart(self, target: AttackTarget, clean: Tensor, request: Tensor, restart: int) -> Trial:
        given = target, clean, request, self.eps_255, self.judge_every
        trial = Trial(*given, seed=self.seed, restart=restart)
        radius = self.eps_255 if restart > 0 else min(self.eps_255, self.start_255)
        start = clean
        if radius > 0:
            start = random_start(clean, radius, self.seed, restart, request)
        # kept even if no loss is ever finite, so that what is judged is this restart's image
        trial.best = trial.project(start)
        self.run(trial, trial.best.clone())
        return trial


@dataclass(frozen=True)
class _Part:
    """The result of one batch; flags are (masked, not finite, lost in the final scoring)."""

    adversarial: Tensor
    success: Tensor
    best_loss: Tensor
    losses: Tensor
    evaluations: Tensor
    flags: tuple[Tensor, Tensor, Tensor]
