"""One image against many requests (ImgJP: Niu et al. 2024, arXiv 2402.02309)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqguard.errors import ConfigError, InputError
from vqguard.redteam.attack import check_requests, entered, warning_texts
from vqguard.redteam.pgd import PGD
from vqguard.redteam.pixels import ball, check_images, random_start
from vqguard.redteam.trial import AttackTarget, judged, loss_and_gradient, loss_of


@dataclass(frozen=True)
class UniversalResult:
    """What a universal attack found.

    Attributes:
        adversarial: (3, H, W) float32 in [0, 1], inside the ball: of all judged iterates, the one
            with most successes over the attacked requests, then of lowest mean loss.
        success: (R,) bool, the judge's answer for each attacked request.
        held_out_success: (H,) bool, the same for each held-out request; (0,) if there were none.
            The image was not chosen by them.
        mean_loss: mean loss over all attacked requests at `adversarial`.
        losses: (steps,) float32 on the CPU, of the restart that made `adversarial`; entry t is
            the mean loss of the mini-batch at step t, NaN after `adversarial` was found.
        eps_255, steps, restarts, warnings: as in `AttackResult`.
    """

    adversarial: Tensor
    success: Tensor
    held_out_success: Tensor
    mean_loss: float
    losses: Tensor
    eps_255: float
    steps: int
    restarts: int
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class UniversalPGD:
    """PGD on one image whose loss is the mean over a mini-batch of requests, new at every step.

    Requests are drawn without replacement until all were used, then again in another order. At
    checkpoints the image is judged on all attacked requests; it stops when all of them succeed.
    Under a gradient that is exactly zero the image does not move, as in `Attack`.

    Attributes:
        pgd: budget, steps, step size, momentum, decay, restarts, seed, judgement interval.
        requests_per_step: size of the mini-batch.

    Raises:
        ConfigError: requests_per_step below 1.
    """

    pgd: PGD = field(default_factory=PGD)
    requests_per_step: int = 8

    def __post_init__(self) -> None:
        if self.requests_per_step < 1:
            raise ConfigError(f"requests_per_step must be at least 1, got {self.requests_per_step}")

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
        clean = image.detach()[None]
        with entered(target):
            search = _Search(self, target, clean, requests.to(image.device), batch_size)
            for restart in range(self.pgd.restarts):
                search.run(restart)
                if search.successes == len(requests):
                    break
            success = search.judged(search.requests)
            held = search.judged(held_out.to(image.device))
        masked = torch.tensor([not search.moved])
        not_finite = torch.tensor([search.not_finite])
        return UniversalResult(
            adversarial=search.best[0],
            success=success,
            held_out_success=held,
            mean_loss=search.mean_loss,
            losses=search.best_curve,
            eps_255=self.pgd.eps_255,
            steps=self.pgd.steps,
            restarts=self.pgd.restarts,
            warnings=warning_texts(masked, not_finite, self.pgd.restarts),
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


def _mini_batches(requests: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    size = min(size, len(requests))
    order = requests[:0]
    while True:
        while len(order) < size:
            shuffled = torch.randperm(len(requests), generator=generator)
            order = torch.cat([order, requests[shuffled.to(requests.device)]])
        yield order[:size]
        order = order[size:]


class _Search:
    """The best image so far over all restarts."""

    def __init__(
        self,
        attack: UniversalPGD,
        target: AttackTarget,
        clean: Tensor,
        requests: Tensor,
        batch_size: int,
    ) -> None:
        self.attack = attack
        self.target = target
        self.clean = clean
        self.requests = requests
        self.batch_size = batch_size
        self.best = clean.clone()
        self.successes = -1
        self.mean_loss = float("inf")
        self.best_curve = torch.full((attack.pgd.steps,), float("nan"))
        self.moved = False
        self.not_finite = False

    def run(self, restart: int) -> None:
        pgd = self.attack.pgd
        low, high = ball(self.clean, pgd.eps_255)
        pixels = self.clean.clone()
        if restart > 0:
            key = torch.tensor([-1])  # no single request is attacked
            pixels = random_start(self.clean, pgd.eps_255, pgd.seed, restart, key)
        generator = torch.Generator().manual_seed(pgd.seed + restart)
        batches = _mini_batches(self.requests, self.attack.requests_per_step, generator)
        velocity = torch.zeros_like(pixels)
        curve = torch.full((pgd.steps,), float("nan"))
        for step in range(pgd.steps):
            which = next(batches)
            shared = pixels.expand(len(which), -1, -1, -1)
            loss, gradient, path = loss_and_gradient(self.target, shared, which)
            finite = loss.isfinite()
            self.not_finite |= not bool(finite.all())
            curve[step] = loss[finite].mean().cpu() if finite.any() else float("nan")
            gradient = gradient.sum(dim=0, keepdim=True) / len(which)
            self.moved |= bool(gradient.ne(0).any())
            if not path and not self.moved:
                curve[:] = curve[step]  # nothing can move it: one loss for all steps
                break
            if step > 0 and step % pgd.judge_every == 0 and self._judge(pixels, curve):
                return
            pixels = pgd.step(pixels, velocity, gradient, step)
            pixels = torch.minimum(torch.maximum(pixels, low), high)
        self._judge(pixels, curve)

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

    def _judge(self, pixels: Tensor, curve: Tensor) -> bool:
        """Keep these pixels if they are better; true when every request succeeded."""
        successes = int(self._judged(pixels, self.requests).sum())
        with torch.no_grad():
            losses = [
                loss_of(self.target, pixels.expand(len(some), -1, -1, -1), some)
                for some in torch.split(self.requests, self.batch_size)
            ]
        mean = float(torch.cat(losses).float().mean())
        if successes > self.successes or (successes == self.successes and mean < self.mean_loss):
            self.best, self.successes, self.mean_loss = pixels.clone(), successes, mean
            self.best_curve = curve.clone()
        return successes == len(self.requests)
