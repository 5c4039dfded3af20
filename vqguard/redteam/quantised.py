"""What an attack may ask of a model with a quantiser, beyond its loss and its judge."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from vqguard.codebooks.quantizer import Estimator
from vqguard.errors import ConfigError
from vqguard.redteam.facts import Goal
from vqguard.redteam.trial import AttackTarget


@runtime_checkable
class QuantisedTarget(AttackTarget, Protocol):
    """A victim whose visual tokens are quantised, to an attacker who has all its weights."""

    @property
    def codewords(self) -> Tensor:
        """(P, d) float32, the codebook of the visual tokens."""
        ...

    def features(self, pixels: Tensor) -> Tensor:
        """(B, N, d) float32, the visual tokens before the quantiser; differentiable."""
        ...

    def codes(self, features: Tensor) -> Tensor:
        """(B, N) int64, the nearest codewords of (B, N, d)."""
        ...

    def loss_through(self, pixels: Tensor, request: Tensor, estimator: Estimator) -> Tensor:
        """(B,) `loss` with `estimator` in place of the visual tokens' quantiser.

        It decides both what the language model reads and where the gradient goes.
        """
        ...

    def answer_through(self, pixels: Tensor, request: Tensor, estimator: Estimator) -> Tensor:
        """(B,) the part of `loss_through` that is about the answer."""
        ...

    def answer_by_codes(self, codes: Tensor, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) what `answer_through` gives where the tokens have the codes (B, N); no gradient.

        The pixels are the same in all rows.
        """
        ...

    def answer_loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) the part of `loss` that is about the answer, by the target's own gradient."""
        ...

    def verdict_loss(self, pixels: Tensor) -> Tensor:
        """(B,) how far the guard is from letting the image pass, 0 where it does by a margin."""
        ...

    def denial_loss(self, pixels: Tensor) -> Tensor:
        """(B,) how far the guard is from flagging the image, 0 where it does by a margin."""
        ...

    def verdict_distance(self, pixels: Tensor, *, flagged: bool) -> Tensor:
        """(B,) how far the guard is from this verdict, by `vqguard.redteam.verdict.distance_to`.

        Of a guard that judges noisy copies it is the mean over such copies, drawn anew each time.
        """
        ...

    def refused(self, pixels: Tensor) -> Tensor:
        """(B,) bool: the guard flags the image."""
        ...

    def succeeded_by_codes(self, codes: Tensor, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) bool: `succeeded` if the tokens had the codes (B, N), without a verdict."""
        ...


@runtime_checkable
class OnePass(Protocol):
    """A `QuantisedTarget` that gives two things by one pass of its vision encoder."""

    def features_and_verdict(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`features` and `verdict_loss`."""
        ...

    def answer_and_verdict(self, pixels: Tensor, request: Tensor) -> tuple[Tensor, Tensor]:
        """`answer_loss` and `verdict_loss`."""
        ...


def features_and_verdict(target: QuantisedTarget, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """`features` and `verdict_loss`, by one pass where the target can."""
    if isinstance(target, OnePass):
        return target.features_and_verdict(pixels)
    return target.features(pixels), target.verdict_loss(pixels)


def answer_and_verdict(
    target: QuantisedTarget, pixels: Tensor, request: Tensor
) -> tuple[Tensor, Tensor]:
    """`answer_loss` and `verdict_loss`, by one pass where the target can."""
    if isinstance(target, OnePass):
        return target.answer_and_verdict(pixels, request)
    return target.answer_loss(pixels, request), target.verdict_loss(pixels)


def nearest_other(features: Tensor, codewords: Tensor, codes: Tensor) -> Tensor:
    """(B, N) squared distance of features (B, N, d) to the nearest codeword but one.

    `codes` (B, N) int64: the ones that do not count. Differentiable in the features: only the
    nearest one has a share in it, so that all others are compared without a gradient.
    """
    with torch.no_grad():
        # without |x|^2, which is the same for all
        scores = codewords.square().sum(dim=-1) - 2.0 * features @ codewords.T
        nearest = scores.scatter_(2, codes[..., None], float("inf")).argmin(dim=2)
    return (features - codewords[nearest]).square().sum(dim=-1)


def quantised(target: AttackTarget, attack: str) -> QuantisedTarget:
    """The target, where it has a quantiser.

    Raises:
        ConfigError: it has none.
    """
    if not isinstance(target, QuantisedTarget):
        raise ConfigError(
            f"the attack {attack!r} gets past a quantiser, and {type(target).__name__} has none: "
            "run it on a guarded model"
        )
    return target


class VerdictVictim:
    """A guard to an attacker to whom nothing but its verdict matters."""

    def __init__(self, target: QuantisedTarget, goal: Goal) -> None:
        self.target = target
        self.flags = goal is Goal.DENIAL

    @property
    def requests(self) -> int:
        """As the victim's."""
        return self.target.requests

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) how far the image is from the verdict that is wanted."""
        return self.target.verdict_distance(pixels, flagged=self.flags)

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) bool: it has that verdict."""
        return (self.target.refused(pixels) == self.flags).to(pixels.device)


class AgainstVerdict:
    """Mixed into an attack, it turns it against the verdict alone: no answer is generated."""

    name: ClassVar[str]
    goal: ClassVar[Goal]
    measured: ClassVar[bool] = False
    quantised: ClassVar[bool] = True

    def measure(self, target: AttackTarget, images: Tensor, held_out: Tensor) -> Any:
        """See `MeasuredAttack.measure`."""
        attack: Any = self
        victim = VerdictVictim(quantised(target, self.name), self.goal)
        return attack(victim, images)
