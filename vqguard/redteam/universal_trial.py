"""The search for one image against many requests: mini-batches, the best image so far, judging."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vqguard.redteam.facts import Budget
from vqguard.redteam.pixels import ball, random_start
from vqguard.redteam.trial import AttackTarget, Loss, judged, loss_and_gradient, loss_of


class UniversalTrial:
    """The best image so far over all restarts.

    An attack asks for `gradient` at its iterate, moves, calls `project`, and stops when `finished`,
    as with `Trial`. The loss is the mean over a mini-batch of requests, new at every step; the
    iterate is judged on all requests every `judge_every` steps.

    Args:
        target: the victim.
        clean: (1, 3, H, W) the centre of the ball.
        requests: (R,) int64, those to attack.
        budget: what the attack may spend.
        requests_per_step: size of the mini-batch.
        batch_size: requests evaluated at the same time when the whole set is.
    """

    def __init__(
        self,
        target: AttackTarget,
        clean: Tensor,
        requests: Tensor,
        budget: Budget,
        *,
        requests_per_step: int,
        batch_size: int,
    ) -> None:
        self.target = target
        self.clean = clean
        self.requests = requests
        self.budget = budget
        self.requests_per_step = requests_per_step
        self.batch_size = batch_size
        self.low, self.high = ball(clean, budget.eps_255)
        self.best = clean.clone()
        self.successes = -1
        self.mean_loss = float("inf")
        self.best_curve = torch.full((budget.steps,), float("nan"))
        self.moved = False
        """A gradient other than zero was seen."""
        self.not_finite = False
        """A loss that is not finite was seen."""
        self._blocked = False
        self._step = 0
        self._curve = self.best_curve.clone()
        self._batches: Iterator[Tensor] = iter(())

    @property
    def won(self) -> bool:
        """The best image succeeds with every request."""
        return self.successes == len(self.requests)

    @property
    def finished(self) -> bool:
        """Every request succeeds, or no step can change the image."""
        return self._blocked or self.won

    def start(self, restart: int) -> Tensor:
        """Begin a restart; returns where: the clean image, or a point of the ball."""
        self._blocked = False
        self._step = 0
        self._curve = torch.full((self.budget.steps,), float("nan"))
        generator = torch.Generator().manual_seed(self.budget.seed + restart)
        self._batches = _mini_batches(self.requests, self.requests_per_step, generator)
        if restart == 0:
            return self.clean.clone()
        key = torch.tensor([-1])  # no single request is attacked
        return random_start(self.clean, self.budget.eps_255, self.budget.seed, restart, key)

    def project(self, pixels: Tensor) -> Tensor:
        """The nearest point of the ball cut by [0, 1]."""
        return torch.minimum(torch.maximum(pixels, self.low), self.high)

    def gradient(self, pixels: Tensor, objective: Loss | None = None) -> Tensor:
        """Evaluate the next mini-batch at the iterate (1, 3, H, W); returns its mean gradient.

        With an `objective` it is that one's, and the curve is of it.
        """
        requests = next(self._batches)
        shared = pixels.expand(len(requests), -1, -1, -1)
        loss, gradient, path = loss_and_gradient(self.target, shared, requests, objective)
        finite = loss.isfinite()
        self.not_finite |= not bool(finite.all())
        mean_loss = loss[finite].mean().cpu() if finite.any() else float("nan")
        self._curve[self._step] = mean_loss
        gradient = gradient.sum(dim=0, keepdim=True) / len(requests)
        self.moved |= bool(gradient.ne(0).any())
        self._blocked = not path and not self.moved
        if self._blocked:
            self._curve[:] = mean_loss  # nothing can move it: one loss for all steps
        elif self._step > 0 and self._step % self.budget.judge_every == 0:
            self._judge(pixels)
        self._step += 1
        return gradient

    def close(self, pixels: Tensor) -> None:
        """Judge the last iterate."""
        if not self.won:
            self._judge(pixels)

    def judged(self, requests: Tensor) -> Tensor:
        """(R,) bool for the best image."""
        return self._judged(self.best, requests)

    def _judged(self, pixels: Tensor, requests: Tensor) -> Tensor:
        parts = [
            judged(self.target, pixels.expand(len(some), -1, -1, -1), some)
            for some in torch.split(requests, self.batch_size)
            if len(some)
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.bool)

    def _judge(self, pixels: Tensor) -> None:
        """Keep these pixels if they are better."""
        successes = int(self._judged(pixels, self.requests).sum())
        with torch.no_grad():
            losses = [
                loss_of(self.target, pixels.expand(len(some), -1, -1, -1), some)
                for some in torch.split(self.requests, self.batch_size)
            ]
        mean = float(torch.cat(losses).float().mean())
        if successes > self.successes or (successes == self.successes and mean < self.mean_loss):
            self.best, self.successes, self.mean_loss = pixels.clone(), successes, mean
            self.best_curve = self._curve.clone()


def _mini_batches(requests: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Requests without replacement until all were used, then again in another order."""
    size = min(size, len(requests))
    order = requests[:0]
    while True:
        while len(order) < size:
            shuffled = torch.randperm(len(requests), generator=generator)
            order = torch.cat([order, requests[shuffled.to(requests.device)]])
        yield order[:size]
        order = order[size:]
