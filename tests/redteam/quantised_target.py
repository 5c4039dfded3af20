"""A victim with a quantiser that is known to the last bit: four tokens, one a quarter's colour."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vqguard.codebooks.quantizer import Estimator, straight_through_estimator
from vqguard.redteam.verdict import denial_hinge, distance_to, verdict_hinge


class Quarters:
    """Each quarter of a picture is a token, its mean colour; codewords are a grid of 27 colours.

    An answer is given when every token has the colour that its request wants. The guard flags
    pictures that are red on the whole.
    """

    def __init__(self, wanted: Tensor, *, distance: float = 0.0) -> None:
        steps = torch.tensor([0.0, 0.5, 1.0])
        self.codewords = torch.cartesian_prod(steps, steps, steps)
        self.wanted = wanted  # (R, 4) int64
        self.distance = distance  # of a token's loss, below which it counts as right
        self.flagged = (self.codewords[:, 0] == 1.0) & (self.codewords[:, 1:].sum(dim=1) == 0.0)
        self.asked = 0

    @property
    def requests(self) -> int:
        return len(self.wanted)

    def features(self, pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels, 2).flatten(2).transpose(1, 2)

    def codes(self, features: Tensor) -> Tensor:
        return torch.cdist(features, self.codewords).argmin(dim=-1)

    def _answer(self, tokens: Tensor, request: Tensor) -> Tensor:
        apart = (tokens - self.codewords[self.wanted[request]]).square().sum(dim=-1)
        return apart.mean(dim=1)

    def answer_through(self, pixels: Tensor, request: Tensor, estimator: Estimator) -> Tensor:
        features = self.features(pixels)
        tokens = estimator(features, self.codewords, self.codes(features))
        return self._answer(tokens, request)

    def answer_by_codes(self, codes: Tensor, pixels: Tensor, request: Tensor) -> Tensor:
        return self._answer(self.codewords[codes], request)

    def loss_through(self, pixels: Tensor, request: Tensor, estimator: Estimator) -> Tensor:
        return self.answer_through(pixels, request, estimator) + self.verdict_loss(pixels)

    def answer_loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        return self.answer_through(pixels, request, straight_through_estimator)

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        return self.loss_through(pixels, request, straight_through_estimator)

    def _mean(self, pixels: Tensor) -> Tensor:
        return self.features(pixels).mean(dim=1, keepdim=True)

    def verdict_loss(self, pixels: Tensor) -> Tensor:
        return verdict_hinge(self._mean(pixels), self.codewords, self.flagged)

    def denial_loss(self, pixels: Tensor) -> Tensor:
        return denial_hinge(self._mean(pixels), self.codewords, self.flagged)

    def verdict_distance(self, pixels: Tensor, *, flagged: bool) -> Tensor:
        return distance_to(self._mean(pixels), self.codewords, self.flagged, wanted=flagged)

    def refused(self, pixels: Tensor) -> Tensor:
        return self.flagged[self.codes(self._mean(pixels))].squeeze(1)

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        codes = self.codes(self.features(pixels))
        return self.succeeded_by_codes(codes, pixels, request) & ~self.refused(pixels)

    def succeeded_by_codes(self, codes: Tensor, pixels: Tensor, request: Tensor) -> Tensor:
        return self._answer(self.codewords[codes], request) <= self.distance

    # what one sees who sees answers only: how many quarters are right

    def answers(self, pixels: Tensor, request: Tensor) -> list[str]:
        self.asked += len(pixels)
        right = self.codes(self.features(pixels)) == self.wanted[request]
        return ["".join("1" if token else "0" for token in row) for row in right.tolist()]

    def progress(self, texts: list[str], request: Tensor) -> Tensor:
        return torch.tensor([text.count("1") / len(text) for text in texts])


def grey(count: int, side: int = 8) -> Tensor:
    """Pictures that are grey all over, each a little different."""
    level = 0.5 + 0.004 * torch.arange(count)
    return level.view(-1, 1, 1, 1).expand(count, 3, side, side).clone()


def wanted_colours(count: int, *, reach: float = math.inf, seed: int = 0) -> Tensor:
    """(count, 4) codes drawn among those whose colours are no further than `reach` from grey."""
    generator = torch.Generator().manual_seed(seed)
    words = Quarters(torch.zeros(1, 4, dtype=torch.int64)).codewords
    near = ((words - 0.5).abs().amax(dim=1) <= reach).nonzero().flatten()
    near = near[near != 18]  # pure red alone could be refused
    return near[torch.randint(len(near), (count, 4), generator=generator)]
