"""A guarded model as the target of attackers who look inside it: features, codes, verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqguard.adapters.attack_target import (
    VERDICT_WEIGHT,
    GenerationTarget,
    evidence_seen,
    verdict_term,
)
from vqguard.adapters.codes import VisualCodes
from vqguard.adapters.features import VisualFeatures
from vqguard.adapters.runtime.code_training import training_codes, visual_codes
from vqguard.adapters.runtime.quantise import visual_features
from vqguard.adapters.runtime.smoothing import noisy_copies
from vqguard.codebooks.guard_output import GuardOutput
from vqguard.codebooks.quantizer import Estimator, use_estimator
from vqguard.codebooks.surrogate import with_gradient_of
from vqguard.guard import recording
from vqguard.redteam.gradients import crossing
from vqguard.redteam.pixels import to_8_bit
from vqguard.redteam.verdict import denial_hinge, distance_to, verdict_depth


class _Seen(NamedTuple):
    """What a guard reads its verdict from."""

    features: Tensor
    """(B, S, w) float32 of the level that judges."""
    mask: Tensor | None
    """(B, S) bool, True for an image's own."""
    evidence: Tensor | None
    """(B, S, w) float32 of regions before the last ReLU; None where the judge is global."""

    def by_message(self, pictures: int) -> _Seen:
        """Of each message what is seen of all of its pictures: (B / pictures, pictures S, ...)."""
        if pictures == 1:
            return self
        return _Seen(
            _side_by_side(self.features, pictures),
            None if self.mask is None else _side_by_side(self.mask, pictures),
            None if self.evidence is None else _side_by_side(self.evidence, pictures),
        )


_Term = Callable[[Any, _Seen, Tensor], Tensor]
"""Guard, what it sees, flagged cells (K,) -> (B,)."""


@contextlib.contextmanager
def _reading_codes(model: Any) -> Iterator[None]:
    """Codes are read in training mode alone; what is below the model stays in eval mode."""
    was = model.training
    model.training = True
    try:
        with torch.enable_grad():
            yield
    finally:
        model.training = was


class CodeTarget(GenerationTarget):
    """`GenerationTarget` of a guarded model, with what `QuantisedTarget` asks for.

    For models whose pictures all have the same number of visual tokens.
    """

    _coded: VisualCodes | None = None
    """A picture as codes, once there is one."""

    @property
    def codewords(self) -> Tensor:
        """(P, d) float32."""
        return self._guard.patch.codebook.weight.detach()  # type: ignore[no-any-return]

    def features(self, pixels: Tensor) -> Tensor:
        """(B, N, d) float32, differentiable in the pixels (B, 3, H, W)."""
        return _tokens(self._visual(pixels), len(pixels))

    def features_and_verdict(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`features` and `verdict_loss`, by one pass of the encoder where copies are not judged."""
        if self._guard.safety_map is None or self._guard.smooths:
            return self.features(pixels), self.verdict_loss(pixels)
        visual = self._visual(pixels)
        verdict = self._term(self._seen(visual), _passing).to(pixels.device)
        return _tokens(visual, len(pixels)), verdict

    def answer_and_verdict(self, pixels: Tensor, request: Tensor) -> tuple[Tensor, Tensor]:
        """`answer_loss` and `verdict_loss`, by one pass of the model where it has both."""
        nats, verdict = self.losses(pixels, request, crossing(self.model, self.gradient))
        if verdict is None or self._guard.smooths:
            return nats.to(pixels.device), self.verdict_loss(pixels)
        return nats.to(pixels.device), verdict.to(pixels.device)

    def codes(self, features: Tensor) -> Tensor:
        """(B, N) int64 of features (B, N, d)."""
        codes: Tensor = self._guard.patch.encode(features)
        return codes

    def loss_through(self, pixels: Tensor, request: Tensor, estimator: Estimator) -> Tensor:
        """(B,) float32, see `QuantisedTarget.loss_through`."""
        nats, verdict = self.losses(pixels, request, self._through(estimator))
        loss = nats if verdict is None else nats + VERDICT_WEIGHT * verdict
        return loss.to(pixels.device)

    def answer_through(self, pixels: Tensor, request: Tensor, estimator: Estimator) -> Tensor:
        """(B,) float32 nats a token, see `QuantisedTarget.answer_through`."""
        nats, _ = self.losses(pixels, request, self._through(estimator), verdict=False)
        return nats.to(pixels.device)

    def answer_by_codes(self, codes: Tensor, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) what `answer_through` gives where the tokens have the codes (B, N) int64.

        The vision encoder runs once for all calls, because of a picture only the form of its codes
        is needed, and the codebook is searched for no candidate: the language model is given codes
        as in training. No gradient.
        """
        if self._coded is None:
            self._coded = visual_codes(self.model, pixel_values=self._pixel_values(pixels[:1]))
        written = VisualCodes.joined([replace(self._coded, tokens=[row]) for row in codes])
        with self, _reading_codes(self.model), training_codes(self.model, written):
            loss = self._missed(*self._opening_logits({}, request.cpu()))
        return loss.detach().to(pixels.device)

    def answer_loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) float32 nats a token of the opening."""
        path = crossing(self.model, self.gradient)
        nats, _ = self.losses(pixels, request, path, verdict=False)
        return nats.to(pixels.device)

    def verdict_loss(self, pixels: Tensor) -> Tensor:
        """(B,) float32, `verdict_term`; zeros without a safety map."""
        return self._of_verdict(pixels, _passing)

    def denial_loss(self, pixels: Tensor) -> Tensor:
        """(B,) float32, `denial_hinge` of the level that judges; zeros without a safety map."""
        return self._of_verdict(pixels, _denial)

    def verdict_distance(self, pixels: Tensor, *, flagged: bool) -> Tensor:
        """(B,) float32, how far it is from this verdict; zeros without a safety map."""
        return self._of_verdict(pixels, partial(_distance, wanted=flagged))

    def verdict_margin(self, pixels: Tensor) -> Tensor:
        """(B,) float32, positive exactly where a token's cell is flagged, up to ties."""
        return self._of_verdict(pixels, _depth)

    def guard_outputs(self, pixels: Tensor) -> list[GuardOutput]:
        """What the guard gives the language model for these pixels, as in use: no estimator."""
        request = torch.zeros(len(pixels), dtype=torch.int64)
        with self, torch.no_grad(), recording(self._guard) as outputs:
            self._opening_logits(self._shown(pixels), request)
        return outputs

    def succeeded_by_codes(self, codes: Tensor, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) bool: the judge accepts what is generated behind these codes (B, N).

        `pixels` are any that the guard lets pass: they stand where the codes are read.
        """
        words = self.codewords[codes]

        def written(features: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
            return words.reshape(features.shape).to(features)

        with use_estimator(self._guard.patch, written):
            texts = self.answers(pixels, request)
        accepted = self.judge(texts, request.tolist())
        return torch.tensor(accepted, dtype=torch.bool, device=pixels.device)

    @property
    def _guard(self) -> Any:
        return self.model.vqguard

    def _visual(self, pixels: Tensor) -> VisualFeatures:
        with self:
            return visual_features(self.model, pixel_values=self._pixel_values(pixels))

    @contextlib.contextmanager
    def _through(self, estimator: Estimator) -> Iterator[None]:
        with crossing(self.model, self.gradient), use_estimator(self._guard.patch, estimator):
            yield

    def _of_verdict(self, pixels: Tensor, term: _Term) -> Tensor:
        """(B,) float32 of the features that are judged; zeros without a safety map.

        Where the guard judges noisy copies it is the mean over those that it would judge itself.
        They are others for every iterate: an expectation over the noise on the whole.
        """
        guard = self._guard
        if guard.safety_map is None:
            return pixels.new_zeros(len(pixels))
        shown: Iterable[Tensor] = [self._pixel_values(pixels)]
        if guard.smooths:
            rounded = with_gradient_of(pixels, to_8_bit(pixels.detach()))
            given = {"pixel_values": self._pixel_values(rounded)}
            copies = noisy_copies(given, given, guard.config.smoothing)
            shown = (copy["pixel_values"] for copy in copies)
        terms = []
        for values in shown:
            with self:
                visual = visual_features(self.model, pixel_values=values)
            terms.append(self._term(self._seen(visual), term))
        return torch.stack(terms).mean(dim=0).to(pixels.device)

    def _term(self, seen: _Seen, term: _Term) -> Tensor:
        seen = seen.by_message(self.pictures)
        flagged = self._guard.safety_map.flagged(torch.arange(self._guard.cells)[:, None])
        return term(self._guard, seen, flagged.to(seen.features.device))

    def _seen(self, visual: VisualFeatures) -> _Seen:
        """What the level that judges sees."""
        judge = self._guard.regional
        if judge is None:
            return _Seen(visual.semantic.float(), visual.semantic_mask, None)
        with evidence_seen(self._guard):
            regions = judge.regions(visual.tokens, visual.layouts)
        alike = torch.stack(list(visual.tokens)).float()
        evidence = judge.projection.approximate(alike, visual.unit_layouts[0]).float()
        return _Seen(regions.tokens, regions.mask, evidence)


def _side_by_side(part: Tensor, pictures: int) -> Tensor:
    """(B pictures, S, ...) -> (B, pictures S, ...)."""
    return part.reshape(-1, pictures * part.shape[1], *part.shape[2:])


def _tokens(visual: VisualFeatures, batch: int) -> Tensor:
    """(B, N, d) float32."""
    tokens = torch.stack(list(visual.tokens)).float()
    return tokens.reshape(batch, -1, tokens.shape[-1])


def _passing(guard: Any, seen: _Seen, flagged: Tensor) -> Tensor:
    return verdict_term(guard, seen.features, flagged, seen.mask)


def _denial(guard: Any, seen: _Seen, flagged: Tensor) -> Tensor:
    return denial_hinge(seen.features, guard.judging.codebook.weight, flagged, mask=seen.mask)


def _depth(guard: Any, seen: _Seen, flagged: Tensor) -> Tensor:
    return verdict_depth(seen.features, guard.judging.codebook.weight, flagged, seen.mask)


def _distance(guard: Any, seen: _Seen, flagged: Tensor, *, wanted: bool) -> Tensor:
    """`distance_to`, and where regions are judged their evidence, by the loss it was learnt with.

    By codewords alone the regional judge looks far stronger than it is (docs/decisions, 0118).
    """
    words = guard.judging.codebook.weight
    term = distance_to(seen.features, words, flagged, seen.mask, wanted=wanted)
    if seen.evidence is None:
        return term
    learnt = seen.evidence[..., : len(guard.safety_map.categories)].flatten(1).logsumexp(dim=1)
    return term - learnt if wanted else term + learnt
