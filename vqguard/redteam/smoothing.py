"""Randomised smoothing of a yes-or-no decision on images.

Cohen, Rosenfeld and Kolter 2019 (arXiv 1902.02918): CERTIFY and theorem 1. The decision that a
majority takes on an image with Gaussian noise cannot change inside an L2 ball. The certificate is
for that majority, not for the model without noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vqguard.errors import ConfigError
from vqguard.intervals import clopper_pearson

Decision = Callable[[Tensor], Tensor]
"""Pixels (B, 3, H, W), any real numbers -> (B,) bool."""


@dataclass(frozen=True)
class Certificate:
    """What is known of one image."""

    decision: bool | None
    """The majority's; None: no majority is certain, the smoothed model abstains."""
    share: float
    """Lower bound of the majority's share, that holds with confidence 1 - alpha."""
    radius: float
    """L2 radius in pixels of [0, 1] (all values of the image together) inside which the decision
    stands; 0 without one."""


@dataclass(frozen=True, kw_only=True)
class Smoothing:
    """How images are certified.

    Raises:
        ConfigError: a value out of range.
    """

    sigma: float = 0.25
    """Standard deviation of the noise, in pixels of [0, 1]."""
    guesses: int = 50
    """n_0: noisy copies by which the majority is guessed."""
    samples: int = 500
    """n: others by which its share is bounded."""
    alpha: float = 0.001
    """Chance that a certificate is wrong."""
    batch: int = 100
    """Copies that are judged at the same time."""

    def __post_init__(self) -> None:
        problems = []
        if not 0.0 < self.sigma < math.inf:
            problems.append(f"sigma must be positive, got {self.sigma}")
        if not 0.0 < self.alpha < 1.0:
            problems.append(f"alpha must be in (0, 1), got {self.alpha}")
        problems += [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in ("guesses", "samples", "batch")
            if getattr(self, name) < 1
        ]
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def widest(self) -> float:
        """The radius of an image on which all samples agree: no larger one can be certified."""
        return radius_of(share_bound(self.samples, self.samples, self.alpha), self.sigma)

    def certify(self, decide: Decision, image: Tensor, seed: int) -> Certificate:
        """The certificate of an image (3, H, W) in [0, 1]; the noise depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        majority = 2 * self._count(decide, image, self.guesses, generator) > self.guesses
        yes = self._count(decide, image, self.samples, generator)
        agreed = yes if majority else self.samples - yes
        share = share_bound(agreed, self.samples, self.alpha)
        radius = radius_of(share, self.sigma)
        return Certificate(majority if radius > 0.0 else None, share, radius)

    def _count(
        self, decide: Decision, image: Tensor, copies: int, generator: torch.Generator
    ) -> int:
        yes = 0
        for first in range(0, copies, self.batch):
            count = min(self.batch, copies - first)
            # copy by copy: what is drawn together is drawn in another order
            noise = torch.stack(
                [torch.randn(image.shape, generator=generator) for _ in range(count)]
            )
            yes += int(decide(image + self.sigma * noise.to(image)).sum())
        return yes


def share_bound(agreed: int, samples: int, alpha: float) -> float:
    """The one-sided Clopper-Pearson bound: the share is at least this with confidence 1 - alpha."""
    # a two-sided interval has half of what is left on either side
    return clopper_pearson(agreed, samples, confidence=1.0 - 2.0 * alpha).low


def radius_of(share: float, sigma: float) -> float:
    """Sigma * Phi^-1(share) where the share is above a half, else 0 (theorem 1, p_B = 1 - p_A)."""
    if share <= 0.5:
        return 0.0
    inverse = torch.special.ndtri(torch.tensor(share, dtype=torch.float64))
    return sigma * float(inverse)


def linf_equivalent_255(radius: float, values: int) -> float:
    """The L-infinity ball inside an L2 ball, in 1/255: radius / sqrt(number of values) * 255."""
    return radius / math.sqrt(values) * 255.0


def distance_to_other_label(
    features: Tensor, codewords: Tensor, flagged: Tensor, mask: Tensor | None = None
) -> Tensor:
    """(B,) how far an image's tokens must move, at least, before its verdict can change.

    Euclidean, in the space of the judged features. Between a token whose nearest codeword is i and
    the cell of j lies the plane of equal distance, (d_j - d_i) / (2 |w_j - w_i|) away, d being
    squared distances: the least over all j of the other label bounds the distance from below. A
    flagged image changes when its last flagged token has left, another when its first one arrives.

    Args:
        features: (B, S, d).
        codewords: (K, d).
        flagged: (K,) bool.
        mask: (B, S) bool, True for an image's own tokens; None: all are.
    """
    words, tokens = codewords.detach().double(), features.double()
    distances = torch.cdist(tokens, words.expand(len(tokens), -1, -1)).square()
    own = distances.argmin(dim=2)
    apart = torch.cdist(words, words)[own].clamp_min(torch.finfo(torch.float64).tiny)
    planes = (distances - distances.gather(2, own[..., None])) / (2.0 * apart)
    is_flagged = flagged[own]
    same = is_flagged[..., None] == flagged
    nearest = planes.masked_fill(same, math.inf).amin(dim=2)
    real = torch.ones_like(is_flagged) if mask is None else mask
    leaving = nearest.masked_fill(~(real & is_flagged), -math.inf).amax(dim=1)
    arriving = nearest.masked_fill(~real, math.inf).amin(dim=1)
    return torch.where((real & is_flagged).any(dim=1), leaving, arriving)
