"""Jailbreak by image: every attack of the table on one subject."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch

from vqguard.adapters import guard_model, unguard_model
from vqguard.adapters.attack_target import GenerationTarget
from vqguard.recipes.data.chat import prompt_text
from vqguard.recipes.data.samples import AttackCase
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.recipe import AttackRecipe
from vqguard.recipes.report.cells import budget
from vqguard.redteam import (
    ATTACKS,
    GRADIENTS,
    Budget,
    GradientMode,
    MeasuredAttack,
    Scope,
    measured_modes,
    threat_of_gradient,
)
from vqguard.redteam.attack_table import CLEAN

log = logging.getLogger(__name__)

JUDGE_EVERY = 10
CONTROLS = ("quantiser_removed", "finetuned_control")


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
class _Subject:
    """The model that is attacked, and what it is in the report."""

    name: str
    model: Any

    @property
    def guarded(self) -> bool:
        """Whether a gradient has a quantiser to cross."""
        return self.name == "guarded"


@dataclass(frozen=True)
class _Share:
    """What the recipe gives the attacks of one scope."""

    cases: Sequence[AttackCase]
    """Those whose requests the target has."""
    pictures: Sequence[AttackCase]
    """Those whose pictures are attacked."""
    attacked: int
    """How many of the requests are attacked; those after them are held out."""
    steps: int


@dataclass(frozen=True)
class _Ground:
    """A scope's share on one subject: what an attack is let loose on."""

    target: GenerationTarget
    pixels: torch.Tensor
    held_out: torch.Tensor
    steps: int


@dataclass(frozen=True)
class Jailbreak:
    """The attacks of one evaluation."""

    recipe: AttackRecipe
    """Budgets, steps and counts."""
    cases: Sequence[AttackCase]
    """Images and requests; the first `recipe.requests` are attacked one by one, the universal
    image is optimised over the next and judged on those after them; with none left to judge on, the
    universal attacks are left out with a warning."""
    processor: Any
    """The models' processor."""
    seed: int
    """Of the attacks' random starts."""
    clean: bool = True
    """Whether the rate beside clean pictures is measured too."""

    def __post_init__(self) -> None:
        recipe = self.recipe
        if self.clean and recipe.universal_requests and not self._universal:
            log.warning(
                "the universal attacks are left out: they need at least %d cases, got %d; add some "
                "or lower evaluation.attack.requests or universal_requests",
                recipe.requests + recipe.universal_requests + 1,
                len(self.cases),
            )

    @property
    def _universal(self) -> bool:
        """Whether there are requests for a universal picture, and others to judge it on."""
        recipe = self.recipe
        return 0 < recipe.universal_requests < len(self.cases) - recipe.requests

    @classmethod
    def by_budget(
        cls, recipe: AttackRecipe, cases: Sequence[AttackCase], processor: Any, seed: int
    ) -> list[Jailbreak]:
        """The same in pieces of one budget each; the first has the clean pictures."""
        budgets: list[tuple[int, ...]] = [(eps,) for eps in recipe.eps_255] or [()]
        return [
            cls(replace(recipe, eps_255=own), cases, processor, seed, clean=number == 0)
            for number, own in enumerate(budgets)
        ]

    @staticmethod
    def cases_needed(recipe: AttackRecipe) -> int:
        """How many cases the recipe uses."""
        return recipe.requests + recipe.universal_requests + recipe.universal_held_out

    def measure(
        self,
        ledger: Ledger,
        subject: str,
        model: Any,
        findings: JailbreakFindings,
        modes: Iterable[GradientMode] = GRADIENTS,
    ) -> None:
        """Attack `model` with every attack that fits it, and enter one `asr` record each.

        Each is run in every one of `modes` that fits, at every budget.

        One more a mode, `attack: none` at ε 0 (`clean`), says how many of the requests are granted
        beside their clean picture: no attack can do worse, and its rate is read against this one.
        """
        victim = _Subject(subject, model)
        for mode in modes:
            attacks = [attack for attack in ATTACKS if self._runs(attack, victim, mode)]
            if attacks:
                budgets = ", ".join(map(budget, self.recipe.eps_255))
                log.info("evaluation: attacks on %s, gradient %s, %s", subject, mode.name, budgets)
                self._measure(ledger, victim, mode, attacks, findings)

    def _runs(self, attack: type[MeasuredAttack], subject: _Subject, mode: GradientMode) -> bool:
        if not attack.measured or (attack.scope is Scope.UNIVERSAL and not self._universal):
            return False
        if subject.name in CONTROLS and not attack.on_controls:
            return False
        if attack.gradients:
            return mode.name in attack.gradients and (subject.guarded or not mode.needs_quantiser)
        return mode in measured_modes(quantised=subject.guarded)

    def _measure(
        self,
        ledger: Ledger,
        subject: _Subject,
        mode: GradientMode,
        attacks: Sequence[type[MeasuredAttack]],
        findings: JailbreakFindings,
    ) -> None:
        removed = subject.name == "quantiser_removed"
        threat = threat_of_gradient(mode, quantiser_removed=removed).value
        scopes = dict.fromkeys([Scope.PER_REQUEST, *(attack.scope for attack in attacks)])
        grounds = {scope: self._ground(subject, mode, scope) for scope in scopes}
        if self.clean:
            asked = grounds[Scope.PER_REQUEST]
            granted = asked.target.succeeded(asked.pixels, torch.arange(len(asked.pixels)))
            ledger.rate(
                "asr",
                subject.name,
                granted.tolist(),
                threat_model=threat,
                attack=CLEAN,
                gradient=mode.name,
                eps_255=0,
            )
        for eps in self.recipe.eps_255:
            circumstances = f"{subject.name}, {mode.name}, {budget(eps)}"
            for attack in attacks:
                ground = grounds[attack.scope]
                spent = self._budget(eps, mode, ground.steps)
                result = attack.within(spent).measure(ground.target, ground.pixels, ground.held_out)
                ledger.rate(
                    "asr",
                    subject.name,
                    result.scored.tolist(),
                    threat_model=threat if attack.threat is None else attack.threat.value,
                    **attack.condition(spent, mode.name),
                )
                heading = attack.heading(circumstances)
                findings.losses[heading] = result.curve
                findings.adversarial[attack.caption(circumstances)] = result.example
                findings.warn(heading, result.warnings)

    def _share(self, scope: Scope) -> _Share:
        recipe = self.recipe
        if scope is Scope.PER_REQUEST:
            cases = self.cases[: recipe.requests]
            return _Share(cases, cases, len(cases), recipe.steps)
        cases = self.cases[recipe.requests :]
        return _Share(cases, cases[:1], recipe.universal_requests, recipe.universal_steps)

    def _ground(self, subject: _Subject, mode: GradientMode, scope: Scope) -> _Ground:
        share = self._share(scope)
        target = GenerationTarget(
            subject.model,
            self.processor,
            [prompt_text(self.processor, case.request, picture=True) for case in share.cases],
            [case.opening for case in share.cases],
            gradient=mode,
            evade_verdict=mode.adaptive and subject.guarded,
        )
        held_out = torch.arange(share.attacked, len(share.cases))
        pixels = pixels_seen(self.processor, share.pictures, target.image_size)
        return _Ground(target, pixels, held_out, share.steps)

    def _budget(self, eps: int, mode: GradientMode, steps: int) -> Budget:
        recipe = self.recipe
        return Budget(
            eps_255=eps,
            steps=recipe.adaptive_steps if mode.adaptive else steps,
            restarts=recipe.adaptive_restarts if mode.adaptive else recipe.restarts,
            seed=self.seed,
            judge_every=JUDGE_EVERY,
        )


def measure_guarded(
    jailbreak: Jailbreak, ledger: Ledger, model: Any, processor: Any, findings: JailbreakFindings
) -> None:
    """Attack a guarded model, and the same one with its quantiser removed."""
    jailbreak.measure(ledger, "guarded", model, findings)
    measure_without_quantiser(jailbreak, ledger, model, processor, findings)


def measure_without_quantiser(
    jailbreak: Jailbreak, ledger: Ledger, model: Any, processor: Any, findings: JailbreakFindings
) -> None:
    """Attack a guarded model with its quantiser removed, which it has again afterwards."""
    guard = model.vqguard
    unguard_model(model)
    jailbreak.measure(ledger, "quantiser_removed", model, findings)
    guard_model(model, guard, processor)


def pixels_seen(processor: Any, cases: Sequence[AttackCase], size: tuple[int, int]) -> torch.Tensor:
    """The cases' images at the (height, width) that the model sees: float32 (B, 3, H, W), 8-bit."""
    height, width = size
    if all(case.image.size == (width, height) for case in cases):
        return pixels_of(cases)
    seen = processor.image_processor(
        images=[case.image for case in cases], do_normalize=False, return_tensors="pt"
    )["pixel_values"]
    return cast(torch.Tensor, (seen * 255.0).round().clamp(0, 255) / 255.0)


def pixels_of(cases: Sequence[AttackCase]) -> torch.Tensor:
    """Images as float32 (B, 3, H, W) in [0, 1]."""
    arrays = np.stack([np.asarray(case.image) for case in cases])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255.0
