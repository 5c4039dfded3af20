"""Search in code space: what the language model would do, if any tokens could be painted.

Greedy coordinate descent as in GCG (Zou et al. 2023, arXiv 2307.15043, algorithm 1), on codewords
of visual tokens instead of words: the gradient at the tokens ranks replacements, some of them are
tried, the best is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqguard.redteam.quantised import QuantisedTarget, features_and_verdict, nearest_other


@dataclass(frozen=True)
class FoundCodes:
    """Where a search ended."""

    codes: Tensor
    """(B, N) int64, of the lowest loss."""
    loss: Tensor
    """(B,) float32, nats a token there."""
    curve: Tensor
    """(steps + 1, B) float32 on the CPU, the best loss after each step."""


@dataclass(frozen=True, kw_only=True)
class CodeSearch:
    """How codes are searched."""

    steps: int = 60
    """Gradients; each is followed by `tried` evaluations."""
    tried: int = 24
    """Replacements that are tried after each gradient."""
    ranked: int = 128
    """Most promising codewords of a position, of which one is drawn."""
    most_swaps: int = 8
    """Positions that a replacement changes in the first steps; it falls to one."""
    reach: int = 0
    """Only the nearest codewords of what a position shows now: those that a small budget may reach;
    0: all."""

    def __call__(
        self,
        target: QuantisedTarget,
        pixels: Tensor,
        request: Tensor,
        generators: list[torch.Generator],
        start: Tensor | None = None,
    ) -> FoundCodes:
        """Search from the codes of the pixels (B, 3, H, W), or from `start` (B, N) int64.

        Each image is searched by itself, by its own generator.
        """
        found = []
        for row in range(len(pixels)):
            own = slice(row, row + 1)
            begin = None if start is None else start[own]
            found.append(self._search(target, pixels[own], request[own], generators[row], begin))
        return FoundCodes(
            torch.cat([f.codes for f in found]),
            torch.cat([f.loss for f in found]),
            torch.cat([f.curve for f in found], dim=1),
        )

    def _search(
        self,
        target: QuantisedTarget,
        pixels: Tensor,
        request: Tensor,
        generator: torch.Generator,
        start: Tensor | None,
    ) -> FoundCodes:
        words = target.codewords
        with torch.no_grad():
            features = target.features(pixels)
            codes = target.codes(features)[0] if start is None else start[0]
            allowed = self._reachable(features[0], words)
        best, curve = None, []
        for step in range(self.steps):
            if best == 0.0:  # no loss is lower: nothing would change any more
                curve.append(best)
                continue
            loss, slope = _loss_and_slope(target, pixels, request, words[codes])
            best = loss if best is None else best
            curve.append(best)
            swaps = max(1, round(self.most_swaps * (1.0 - step / (0.5 * self.steps))))
            tried = self._candidates(codes, slope, words, allowed, swaps, generator)
            shared = pixels.expand(len(tried), -1, -1, -1)
            losses = target.answer_by_codes(tried, shared, request.expand(len(tried)))
            number = int(losses.nan_to_num(torch.inf).argmin())
            if float(losses[number]) < best:
                codes, best = tried[number], float(losses[number])
        curve.append(float("inf") if best is None else best)
        return FoundCodes(codes[None], torch.tensor(curve[-1:]), torch.tensor(curve)[:, None])

    def _reachable(self, features: Tensor, words: Tensor) -> Tensor | None:
        """(N, reach) int64; None: all."""
        if not self.reach or self.reach >= len(words):
            return None
        return torch.cdist(features, words).topk(self.reach, largest=False).indices

    def _candidates(
        self,
        codes: Tensor,
        slope: Tensor,
        words: Tensor,
        allowed: Tensor | None,
        swaps: int,
        generator: torch.Generator,
    ) -> Tensor:
        """(tried, N) int64: the codes with some positions replaced."""
        # the first-order change of the loss, less that of what stands there now
        change = slope @ words.T if allowed is None else _pairwise(slope, words, allowed)
        count = min(self.ranked, change.shape[1])
        ranked = change.topk(count, dim=1, largest=False)
        here = (slope * words[codes]).sum(dim=1)
        gain = (here - ranked.values[:, 0]).clamp_min(0.0).cpu()
        choices = ranked.indices if allowed is None else allowed.gather(1, ranked.indices)
        tried = codes.repeat(self.tried, 1)
        # positions of much promise are drawn more often, all of them now and then
        weights = gain / gain.sum().clamp_min(1e-12) + 1.0 / len(gain)
        for number in range(self.tried):
            changed = 1 if number % 2 else swaps
            places = torch.multinomial(weights, min(changed, len(gain)), generator=generator)
            # squares of a uniform number: low ranks more often
            draws = torch.rand(len(places), generator=generator).square() * count
            picked = choices[places.to(choices.device), draws.long().to(choices.device)]
            tried[number, places.to(tried.device)] = picked
        return tried


def _pairwise(slope: Tensor, words: Tensor, allowed: Tensor) -> Tensor:
    return torch.einsum("nd,nkd->nk", slope, words[allowed])


def _loss_and_slope(
    target: QuantisedTarget, pixels: Tensor, request: Tensor, tokens: Tensor
) -> tuple[float, Tensor]:
    """The loss behind tokens (N, d), and its gradient there (N, d)."""
    leaf = tokens[None].detach().clone().requires_grad_(True)

    def written(features: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
        return leaf.reshape(features.shape).to(features.dtype)

    with torch.enable_grad():
        loss = target.answer_through(pixels, request, written)
        (slope,) = torch.autograd.grad(loss.sum(), leaf)
    return float(loss.detach()), slope[0].nan_to_num()


@dataclass(frozen=True)
class CodeMatch:
    """An objective in pixels: bring each token's feature into the cell of a wanted codeword.

    For a token it is max(0, d(wanted) - d(nearest other) + margin) of squared distances, as a share
    of their sum, and a little of the distance itself, which shows the way from afar. With
    `verdict_weight` the guard's verdict is evaded too.
    """

    target: QuantisedTarget
    wanted: Tensor
    """(R, N) int64, one row a request of the trial."""
    rows: dict[int, int]
    """Request number -> row of `wanted`."""
    verdict_weight: float = 1.0
    margin: float = 0.02

    def __call__(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) of pixels (B, 3, H, W)."""
        features, verdict = self._seen(pixels)
        words = self.target.codewords
        codes = self.wanted[[self.rows[number] for number in request.tolist()]]
        apart = (features - words[codes]).square().sum(dim=-1)
        others = nearest_other(features, words, codes)
        total = (apart + others).clamp_min(torch.finfo(features.dtype).tiny)
        inside = ((apart - others) / total + self.margin).clamp_min(0.0)
        scale = others.detach().mean(dim=1, keepdim=True).clamp_min(1e-12)
        loss = (inside + 0.05 * apart / scale * (inside > 0)).mean(dim=1)
        return loss + self.verdict_weight * verdict

    def _seen(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        if self.verdict_weight == 0.0:
            return self.target.features(pixels), pixels.new_zeros(len(pixels))
        return features_and_verdict(self.target, pixels)
