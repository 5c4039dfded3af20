"""One restart of an attack on one batch: evaluate, record, keep the best, judge, clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from vqguard.errors import InputError
from vqguard.redteam.pixels import ball, row_generators

Loss = Callable[[Tensor, Tensor], Tensor]
"""Pixels (B, 3, H, W) float32 in [0, 1] and requests (B,) int64 -> (B,), as `AttackTarget.loss`."""


class AttackTarget(Protocol):
    """What an attack needs to know about its victim. Row i of a batch attacks `request[i]`.

    A target that is also a context manager is entered once around a whole attack.
    """

    @property
    def requests(self) -> int:
        """How many requests there are; they are numbered from 0."""
        ...

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) loss, lower = closer to the attacker's goal, differentiable in the pixels.

        `pixels` (B, 3, H, W) float32 in [0, 1], `request` (B,) int64. Rows are independent.
        """
        ...

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) bool: the verdict of a judge on what the model really does with these images."""
        ...


def loss_of(
    target: AttackTarget, pixels: Tensor, request: Tensor, objective: Loss | None = None
) -> Tensor:
    """The target's loss, or another objective, with its shape checked: (B,).

    Raises:
        InputError: the target returned another shape.
    """
    loss = (objective or target.loss)(pixels, request)
    if loss.shape != request.shape:
        raise InputError(
            f"expected a loss of shape {tuple(request.shape)} (one for each image), the target "
            f"returned {tuple(loss.shape)}; do not average over the batch"
        )
    return loss


def loss_and_gradient(
    target: AttackTarget, pixels: Tensor, request: Tensor, objective: Loss | None = None
) -> tuple[Tensor, Tensor, bool]:
    """Loss (B,), its gradient with respect to the pixels (B, 3, H, W), and whether a path exists.

    Where no differentiable path leads from the loss to the pixels (a stopped gradient) the gradient
    is zero and the path is False. Rows whose gradient is not finite are set to zero.
    """
    leaf = pixels.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        loss = loss_of(target, leaf, request, objective)
        gradient = None
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss.sum(), leaf, allow_unused=True)
    if gradient is None:
        return loss.detach(), torch.zeros_like(pixels), False
    bad = ~gradient.flatten(1).isfinite().all(dim=1) | ~loss.detach().isfinite()
    gradient[bad] = 0.0
    return loss.detach(), gradient, True


def judged(target: AttackTarget, pixels: Tensor, request: Tensor) -> Tensor:
    """The judge's answer on the pixels' device, with its shape checked: (B,) bool.

    Raises:
        InputError: the target returned another shape or dtype.
    """
    with torch.no_grad():
        success = target.succeeded(pixels, request)
    if success.shape != request.shape or success.dtype != torch.bool:
        raise InputError(
            f"expected a bool tensor of shape {tuple(request.shape)} from succeeded(), got "
            f"{success.dtype} of shape {tuple(success.shape)}"
        )
    return success.to(pixels.device)


class Trial:
    """State of one restart on one batch.

    An attack asks for `gradient` at its iterate, moves, calls `project`, and stops when `finished`.
    The trial keeps for every image the iterate of lowest loss, and every `judge_every` evaluations
    judges it. An image that succeeded is not evaluated any more.

    An attack may go down on an objective of its own instead of the target's loss. The target's is
    then evaluated at judgements only, and it decides which of those iterates is the best.

    Args:
        target: the victim.
        clean: (B, 3, H, W) images, the centres of the balls.
        request: (B,) int64, the request that each image attacks.
        eps_255: radius of the ball in 1/255.
        judge_every: evaluations between two judgements.
        seed: of what an attack draws.
        restart: which restart this is.
    """

    def __init__(
        self,
        target: AttackTarget,
        clean: Tensor,
        request: Tensor,
        eps_255: float,
        judge_every: int,
        *,
        seed: int = 0,
        restart: int = 0,
    ) -> None:
        batch = len(clean)
        self.target = target
        self.clean = clean
        self.request = request
        self.judge_every = judge_every
        self.restart = restart
        self.low, self.high = ball(clean, eps_255)
        self.best = clean.clone()
        self.best_loss = clean.new_full((batch,), float("inf"))
        self.won = torch.zeros(batch, dtype=torch.bool, device=clean.device)
        self.moved = self.won.clone()
        """(B,) bool: a gradient other than zero was seen."""
        self.not_finite = self.won.clone()
        """(B,) bool: a loss that is not finite was seen."""
        self.blocked = False
        """No differentiable path leads from the loss to the pixels: the iterate cannot move."""
        self.curve: list[Tensor] = []
        """Losses (B,) of each evaluation; NaN where the image was no longer attacked, and where an
        objective was evaluated in place of the loss."""
        self.won_after = torch.full((batch,), -1, device=clean.device)
        """(B,) int64: evaluations until the judge saw the success; -1 without one."""
        self.generators = row_generators(clean, seed, restart, request)
        """One CPU generator an image, for what the attack draws: the same in any batch."""
        self._unjudged = ~self.won

    @property
    def finished(self) -> bool:
        """No image is left to attack, or no step can change one."""
        return self.blocked or bool(self.won.all())

    def project(self, pixels: Tensor) -> Tensor:
        """The nearest point of the ball cut by [0, 1]."""
        return torch.minimum(torch.maximum(pixels, self.low), self.high)

    @property
    def active(self) -> Tensor:
        """(R,) int64: the images that are still attacked."""
        return (~self.won).nonzero().squeeze(1)

    def gradient(self, pixels: Tensor, objective: Loss | None = None) -> Tensor:
        """Evaluate at the iterate (B, 3, H, W) and return its gradient, zero in finished rows.

        With an `objective` it is that one's gradient.
        """
        rows = self.active
        given = self.target, pixels[rows], self.request[rows]
        loss: Tensor | None
        loss, gradient, path = loss_and_gradient(*given, objective)
        self.not_finite[rows] |= ~loss.isfinite()
        self.moved[rows] |= gradient.flatten(1).ne(0).any(dim=1)
        self.blocked = not path and not bool(self.moved.any())
        judging = (len(self.curve) + 1) % self.judge_every == 0
        if objective is not None:
            loss = self._loss(rows, pixels) if judging or not self.curve else None
        self._record(rows, pixels, loss)
        if judging:
            self.judge()
        full = torch.zeros_like(pixels)
        full[rows] = gradient.to(full.dtype)
        return full

    def evaluate(self, pixels: Tensor) -> Tensor:
        """(B,) the target's loss at the iterate (B, 3, H, W), NaN in finished rows.

        For attacks that look at the loss alone: that they see no gradient is no defect of theirs.
        """
        rows = self.active
        self.moved[rows] = True
        self._record(rows, pixels, self._loss(rows, pixels))
        if len(self.curve) % self.judge_every == 0:
            self.judge()
        return self.curve[-1]

    def observe(self, pixels: Tensor, loss: Tensor) -> None:
        """Take an iterate (B, 3, H, W) with a loss (B,) that the attacker has found by itself.

        For who sees answers alone: the target's own loss stays unseen.
        """
        rows = self.active
        self.moved[rows] = True
        self._record(rows, pixels, loss[rows])
        if len(self.curve) % self.judge_every == 0:
            self.judge()

    def close(self, pixels: Tensor) -> None:
        """Evaluate the last iterate, which no gradient was asked for, and judge what is left."""
        rows = self.active
        if len(rows) and not self.blocked:
            self._record(rows, pixels, self._loss(rows, pixels))
        self.judge()

    def judge(self) -> None:
        """Judge the best iterate of every image that has a new one since it was last judged."""
        rows = (~self.won & self._unjudged).nonzero().squeeze(1)
        if len(rows):
            self.won[rows] = judged(self.target, self.best[rows], self.request[rows])
            self.won_after[rows[self.won[rows]]] = len(self.curve)
            self._unjudged[rows] = False

    def losses(self, length: int) -> Tensor:
        """The curve as (length, B) on the CPU, NaN after an image was finished.

        A blocked iterate never moves, so that its one loss holds for all steps.
        """
        rows = self.curve
        if self.blocked:
            rows = rows[:1] * length
        rows = rows[:length]
        missing = [torch.full_like(self.best_loss, float("nan"))] * (length - len(rows))
        return torch.stack([*rows, *missing]).cpu()

    def _loss(self, rows: Tensor, pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return loss_of(self.target, pixels[rows], self.request[rows])

    def _record(self, rows: Tensor, pixels: Tensor, loss: Tensor | None) -> None:
        """Keep a line of the curve, and the iterates that are better; None: nothing evaluated."""
        line = torch.full_like(self.best_loss, float("nan"))
        self.curve.append(line)
        if loss is None:
            return
        loss = loss.detach().to(self.best_loss)
        line[rows] = loss
        self.not_finite[rows] |= ~loss.isfinite()
        better = rows[loss < self.best_loss[rows]]  # false for NaN
        self.best[better] = pixels[better].detach()
        self.best_loss[better] = line[better]
        self._unjudged[better] = True


class Descent(Protocol):
    """What a descent goes down on: `Trial`, `Steered` or `UniversalTrial`."""

    @property
    def finished(self) -> bool:
        """Nothing is left to attack, or no step can change it."""

    def gradient(self, pixels: Tensor) -> Tensor:
        """The gradient at the iterate."""

    def project(self, pixels: Tensor) -> Tensor:
        """The nearest point of the ball cut by [0, 1]."""

    def close(self, pixels: Tensor) -> None:
        """Take the last iterate."""


class Steerable(Protocol):
    """A trial that takes an objective: `Trial` or `UniversalTrial`."""

    @property
    def finished(self) -> bool:
        """See `Descent.finished`."""

    def gradient(self, pixels: Tensor, objective: Loss | None = None) -> Tensor:
        """The objective's gradient at the iterate, or that of the target's loss."""

    def project(self, pixels: Tensor) -> Tensor:
        """See `Descent.project`."""

    def close(self, pixels: Tensor) -> None:
        """See `Descent.close`."""


class Steered:
    """A trial that goes down on another objective, for attacks that move as others do."""

    def __init__(self, trial: Steerable, objective: Loss) -> None:
        self.trial = trial
        self.objective = objective

    @property
    def finished(self) -> bool:
        """See `Trial.finished`."""
        return self.trial.finished

    def gradient(self, pixels: Tensor) -> Tensor:
        """The objective's, see `Trial.gradient`."""
        return self.trial.gradient(pixels, self.objective)

    def project(self, pixels: Tensor) -> Tensor:
        """See `Trial.project`."""
        return self.trial.project(pixels)

    def close(self, pixels: Tensor) -> None:
        """See `Trial.close`."""
        self.trial.close(pixels)
