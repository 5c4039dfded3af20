"""One restart of an attack on one batch: evaluate, record, keep the best, judge, clip."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from vqguard.errors import InputError
from vqguard.redteam.pixels import ball


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


def loss_of(target: AttackTarget, pixels: Tensor, request: Tensor) -> Tensor:
    """The target's loss, with its shape checked: (B,).

    Raises:
        InputError: the target returned another shape.
    """
    loss = target.loss(pixels, request)
    if loss.shape != request.shape:
        raise InputError(
            f"expected a loss of shape {tuple(request.shape)} (one for each image), the target "
            f"returned {tuple(loss.shape)}; do not average over the batch"
        )
    return loss


def loss_and_gradient(
    target: AttackTarget, pixels: Tensor, request: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Loss (B,), its gradient with respect to the pixels (B, 3, H, W), and whether a path exists.

    Where no differentiable path leads from the loss to the pixels (a stopped gradient) the gradient
    is zero and the path is False. Rows whose gradient is not finite are set to zero.
    """
    leaf = pixels.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        loss = loss_of(target, leaf, request)
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

    Args:
        target: the victim.
        clean: (B, 3, H, W) images, the centres of the balls.
        request: (B,) int64, the request that each image attacks.
        eps_255: radius of the ball in 1/255.
        judge_every: evaluations between two judgements.
    """

    def __init__(
        self,
        target: AttackTarget,
        clean: Tensor,
        request: Tensor,
        eps_255: float,
        judge_every: int,
    ) -> None:
        batch = len(clean)
        self.target = target
        self.request = request
        self.judge_every = judge_every
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
        """Losses (B,) of each evaluation; NaN where the image was no longer attacked."""
        self._unjudged = ~self.won

    @property
    def finished(self) -> bool:
        """No image is left to attack, or no step can change one."""
        return self.blocked or bool(self.won.all())

    def project(self, pixels: Tensor) -> Tensor:
        """The nearest point of the ball cut by [0, 1]."""
        return torch.minimum(torch.maximum(pixels, self.low), self.high)

    def gradient(self, pixels: Tensor) -> Tensor:
        """Evaluate at the iterate (B, 3, H, W) and return its gradient, zero in finished rows."""
        rows = (~self.won).nonzero().squeeze(1)
        loss, gradient, path = loss_and_gradient(self.target, pixels[rows], self.request[rows])
        self._record(rows, pixels, loss)
        self.moved[rows] |= gradient.flatten(1).ne(0).any(dim=1)
        self.blocked = not path and not bool(self.moved.any())
        if len(self.curve) % self.judge_every == 0:
            self.judge()
        full = torch.zeros_like(pixels)
        full[rows] = gradient.to(full.dtype)
        return full

    def close(self, pixels: Tensor) -> None:
        """Evaluate the last iterate, which no gradient was asked for, and judge what is left."""
        rows = (~self.won).nonzero().squeeze(1)
        if len(rows) and not self.blocked:
            with torch.no_grad():
                loss = loss_of(self.target, pixels[rows], self.request[rows])
            self._record(rows, pixels, loss)
        self.judge()

    def judge(self) -> None:
        """Judge the best iterate of every image that has a new one since it was last judged."""
        rows = (~self.won & self._unjudged).nonzero().squeeze(1)
        if len(rows):
            self.won[rows] = judged(self.target, self.best[rows], self.request[rows])
            self._unjudged[rows] = False

    def losses(self, length: int) -> Tensor:
        """The curve as (length, B) on the CPU, NaN after an image was finished.

        A blocked iterate never moves, so that its one loss holds for all steps.
        """
        rows = self.curve
        if self.blocked:
            rows = rows[:1] * length
        missing = [torch.full_like(self.best_loss, float("nan"))] * (length - len(rows))
        return torch.stack([*rows, *missing]).cpu()

    def _record(self, rows: Tensor, pixels: Tensor, loss: Tensor) -> None:
        loss = loss.detach().to(self.best_loss)
        line = torch.full_like(self.best_loss, float("nan"))
        line[rows] = loss
        self.curve.append(line)
        self.not_finite[rows] |= ~loss.isfinite()
        better = rows[loss < self.best_loss[rows]]  # false for NaN
        self.best[better] = pixels[better].detach()
        self.best_loss[better] = line[better]
        self._unjudged[better] = True
