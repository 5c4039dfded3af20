"""Jailbreak by image: per-request and universal PGD on one subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch

from vqguard.adapters.attack_target import GenerationTarget
from vqguard.recipes.data.chat import prompt_text
from vqguard.recipes.data.samples import AttackCase
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.recipe import AttackRecipe
from vqguard.recipes.report.cells import budget
from vqguard.redteam import PGD, GradientMode, UniversalPGD, threat_of_gradient

JUDGE_EVERY = 10


@dataclass
class JailbreakFindings:
    """What the report shows of the attacks, besides their records."""

    losses: dict[str, list[float]] = field(default_factory=dict)
    adversarial: dict[str, torch.Tensor] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    """What makes results doubtful, each with the attacks that it holds for."""

    def warn(self, label: str, texts: Sequence[str]) -> None:
        """Note the warnings of one attack."""
        for text in texts:
            self.warnings.setdefault(text, []).append(label)

    @property
    def notes(self) -> list[str]:
        """One sentence a warning, with all the attacks that it holds for."""
        return [f"{'; '.join(labels)}: {text}" for text, labels in self.warnings.items()]


@dataclass(frozen=True)
class Jailbreak:
    """The attacks of one evaluation.

    Args:
        recipe: budgets, steps and counts.
        cases: images and requests; the first ``recipe.requests`` are attacked one by one, the
            universal image is optimised over the next and judged on those after them.
        processor: the models' processor.
        seed: of the attacks' random starts.
    """

    recipe: AttackRecipe
    cases: Sequence[AttackCase]
    processor: Any
    seed: int

    @staticmethod
    def cases_needed(recipe: AttackRecipe) -> int:
        """How many cases the recipe uses."""
        return recipe.requests + recipe.universal_requests + recipe.universal_held_out

    def measure(
        self,
        ledger: Ledger,
        subject: str,
        model: Any,
        gradient: GradientMode,
        findings: JailbreakFindings,
        *,
        universal: bool = True,
    ) -> None:
        """Attack ``model`` at every budget; one ``asr`` record an attack and budget.

        One more, ``attack: none`` at ε 0, says how many of the requests are granted beside their
        clean picture: no attack can do worse, and its rate is read against this one.
        """
        threat = threat_of_gradient(gradient, quantiser_removed=subject == "quantiser_removed")
        evade = gradient in ("straight_through", "softmax")
        singles = self.cases[: self.recipe.requests]
        target = self._target(model, singles, gradient, evade)
        pixels = self._pixels(singles, target)
        granted = target.succeeded(pixels, torch.arange(len(singles)))
        ledger.rate(
            "asr",
            subject,
            granted.tolist(),
            threat_model=threat.value,
            attack="none",
            gradient=gradient,
            eps_255=0,
        )
        for eps in self.recipe.eps_255:
            label = f"{subject}, {gradient}, {budget(eps)}"
            pgd = self._pgd(eps, gradient, self.recipe.steps)
            common = {"gradient": gradient, "eps_255": eps, "steps": pgd.steps}
            result = pgd(target, pixels)
            ledger.rate(
                "asr",
                subject,
                result.success.tolist(),
                threat_model=threat.value,
                attack="per_request",
                restarts=pgd.restarts,
                **common,
            )
            findings.losses[f"per request: {label}"] = _mean_curve(result.losses)
            findings.adversarial[label] = result.adversarial[0]
            findings.warn(f"per request: {label}", result.warnings)
            if universal:
                self._universal(ledger, subject, model, gradient, eps, findings)

    def _universal(
        self,
        ledger: Ledger,
        subject: str,
        model: Any,
        gradient: GradientMode,
        eps: int,
        findings: JailbreakFindings,
    ) -> None:
        recipe = self.recipe
        rest = self.cases[recipe.requests :]
        target = self._target(model, rest, gradient, gradient in ("straight_through", "softmax"))
        pgd = self._pgd(eps, gradient, recipe.universal_steps)
        held = torch.arange(recipe.universal_requests, len(rest))
        attack = UniversalPGD(pgd=pgd, requests_per_step=8)
        result = attack(target, self._pixels(rest[:1], target)[0], held_out=held)
        threat = threat_of_gradient(gradient, quantiser_removed=subject == "quantiser_removed")
        ledger.rate(
            "asr",
            subject,
            result.held_out_success.tolist(),
            threat_model=threat.value,
            attack="universal",
            gradient=gradient,
            eps_255=eps,
            steps=pgd.steps,
            restarts=pgd.restarts,
        )
        label = f"universal: {subject}, {gradient}, {budget(eps)}"
        findings.losses[label] = [float(v) for v in result.losses if v == v]
        findings.adversarial[label] = result.adversarial
        findings.warn(label, result.warnings)

    def _target(
        self, model: Any, cases: Sequence[AttackCase], gradient: GradientMode, evade: bool
    ) -> GenerationTarget:
        prompts = [prompt_text(self.processor, c.request, picture=True) for c in cases]
        openings = [c.opening for c in cases]
        return GenerationTarget(
            model, self.processor, prompts, openings, gradient=gradient, evade_verdict=evade
        )

    def _pixels(self, cases: Sequence[AttackCase], target: GenerationTarget) -> torch.Tensor:
        """The cases' images at the size that the model sees."""
        height, width = target.image_size
        if all(case.image.size == (width, height) for case in cases):
            return pixels_of(cases)
        seen = self.processor.image_processor(
            images=[case.image for case in cases], do_normalize=False, return_tensors="pt"
        )["pixel_values"]
        return cast(torch.Tensor, (seen * 255.0).round().clamp(0, 255) / 255.0)

    def _pgd(self, eps: int, gradient: GradientMode, steps: int) -> PGD:
        adaptive = gradient in ("straight_through", "softmax")
        return PGD(
            eps_255=float(eps),
            steps=self.recipe.adaptive_steps if adaptive else steps,
            restarts=self.recipe.adaptive_restarts if adaptive else self.recipe.restarts,
            seed=self.seed,
            judge_every=JUDGE_EVERY,
            step_255=step_size(eps),
            momentum=0.9,
            decay="cosine",
        )


def step_size(eps_255: int) -> float:
    """Step in 1/255: an eighth of the budget, at least 1 and at most 4."""
    return float(min(4.0, max(1.0, eps_255 / 8)))


def pixels_of(cases: Sequence[AttackCase]) -> torch.Tensor:
    """Images as float32 (B, 3, H, W) in [0, 1]."""
    arrays = np.stack([np.asarray(case.image) for case in cases])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255.0


def _mean_curve(losses: torch.Tensor) -> list[float]:
    # A finished image has no further loss: its last one stands, so the mean stays comparable.
    filled = losses.clone()
    for step in range(1, len(filled)):
        missing = filled[step].isnan()
        filled[step][missing] = filled[step - 1][missing]
    return [float(v) for v in filled.mean(dim=1) if v == v]
