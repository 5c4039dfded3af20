"""Make the attempts of a plan, batch by batch, and judge each by two judges."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vqguard.adapters.attack_target import GenerationTarget
from vqguard.adapters.code_target import CodeTarget
from vqguard.adapters.later_turn_target import LaterTurnTarget
from vqguard.recipes.attacking.journal import Attempt, cell_of
from vqguard.recipes.attacking.messages import picture_prompt, turns_of
from vqguard.recipes.attacking.plan import Planned
from vqguard.recipes.attacking.subjects import StandIn
from vqguard.recipes.data.samples import AttackCase
from vqguard.recipes.evaluation.jailbreak import pixels_seen
from vqguard.recipes.evaluation.pictures import save_png
from vqguard.records import versions
from vqguard.redteam import (
    Goal,
    Judge,
    NoRefusal,
    StartsWith,
    ThreatModel,
    threat_of_gradient,
    to_8_bit,
)
from vqguard.redteam.attack_table import BENIGN
from vqguard.redteam.attacks.transferred.ensemble import Ensemble
from vqguard.redteam.facts import MadeOn, Message
from vqguard.redteam.gradients import STRAIGHT_THROUGH
from vqguard.redteam.pixels import strip

IMAGES = "images"
_CURVE = 100  # numbers of a curve that are kept
_NO_PICTURE = "code_search"


@dataclass(frozen=True)
class Ground:
    """What all attempts of a suite share."""

    suite: str
    split: str
    cases: Sequence[AttackCase]
    """Those of one picture each first, then those of universal pictures."""
    single: int
    """How many are of the first kind."""
    universal: int
    """How many of the others a universal picture is made for."""
    processor: Any
    folder: Path
    """Where pictures go, under `images/`."""
    judges: dict[str, Judge] = field(default_factory=dict)
    """More judges than `target_prefix` and `refusal_phrases`, by name; called with the requests'
    numbers in `cases`."""
    benign: Sequence[AttackCase] = ()
    """Harmless requests, each beside a clean picture; none: over-refusal is not measured."""
    toxic: Sequence[AttackCase] = ()
    """Pictures that shall be refused; none: evasion of the verdict is not measured."""
    stand_ins: Mapping[MadeOn, Sequence[StandIn]] = field(default_factory=dict)
    """Models that transferred pictures are made on."""

    def surrogates(self, plan: Planned) -> list[StandIn]:
        """Those that the plan's attack makes its pictures on; none: it is the victim."""
        wanted = () if plan.kind is None else plan.kind.made_on
        return [stand_in for kind in wanted for stand_in in self.stand_ins.get(kind, ())]


class Attempts:
    """The attempts of one plan.

    Args:
        ground: what all of the suite's attempts share.
        plan: what to do.
        done: numbers of the requests that are done.
    """

    def __init__(self, ground: Ground, plan: Planned, done: set[int]) -> None:
        self.ground = ground
        self.plan = plan
        self.done = done
        self.cases, single = ground.cases, ground.single
        if plan.entry.attack == BENIGN or plan.goal is Goal.EVASION:
            self.cases = ground.benign if plan.entry.attack == BENIGN else ground.toxic
            single = len(self.cases)
        self.count = min(plan.entry.requests or single, single)
        # the openings are few and the answers short: judges see all cases by their own numbers
        self.judges: dict[str, Judge] = {
            "target_prefix": StartsWith([case.opening for case in self.cases]),
            "refusal_phrases": NoRefusal(),
            # they know the attacked requests, and the harmless ones are nothing to them
            **({} if plan.entry.attack == BENIGN else ground.judges),
        }

    @property
    def cell(self) -> str:
        """What its attempts are attempts of: `Attempt.cell`."""
        return cell_of(self._facts())

    def batches(self, size: int) -> Iterator[Callable[[], list[Attempt]]]:
        """What is left to do, in pieces that are whole by themselves; each is done when called."""
        if self.plan.universal:
            if len(self.done) < len(self._held_out()):
                yield self._universal
            return
        left = [number for number in range(self.count) if number not in self.done]
        for at in range(0, len(left), size):
            yield partial(self._single, left[at : at + size])

    def _held_out(self) -> list[int]:
        first = self.ground.single + self.ground.universal
        return list(range(first, len(self.ground.cases)))

    def _single(self, numbers: list[int]) -> list[Attempt]:
        began = time.perf_counter()
        if self.plan.kind is None:
            target, pixels = self._victim(numbers, Message())
            found = _Found(pixels, None, [], torch.full((len(numbers),), -1), 0, ())
        else:
            texts = tuple(self.cases[number].request for number in numbers)
            attack = self.plan.attack(stand_in=self._stand_in(numbers), texts=texts)
            target, pixels = self._victim(numbers, attack.message)
            result: Any = attack.measure(target, pixels, torch.arange(0))
            found = _Found(
                result.adversarial,
                result.best_loss,
                result.curve,
                result.evaluations,
                result.masked,
                result.warnings,
                None if self._painted else result.success,
            )
        return self._attempts(numbers, pixels, target, found, time.perf_counter() - began)

    def _universal(self) -> list[Attempt]:
        began = time.perf_counter()
        numbers = list(range(self.ground.single, len(self.ground.cases)))
        target, pixels = self._victim(numbers, Message())
        held_out = torch.arange(self.ground.universal, len(numbers))
        attack = self.plan.attack(stand_in=self._stand_in(numbers))
        result: Any = attack.measure(target, pixels[:1], held_out)
        count = len(held_out)
        found = _Found(
            result.adversarial[None].expand(count, -1, -1, -1),
            None,
            result.curve,
            torch.full((count,), -1),
            result.masked,
            result.warnings,
        )
        clean = pixels[:1].expand(count, -1, -1, -1)
        judged, _ = self._victim(self._held_out(), Message())
        seconds = time.perf_counter() - began
        return self._attempts(self._held_out(), clean, judged, found, seconds)

    @property
    def _painted(self) -> bool:
        """Whether the attack makes pictures."""
        return self.plan.entry.attack != _NO_PICTURE

    def _victim(
        self, numbers: Sequence[int], message: Message
    ) -> tuple[GenerationTarget, torch.Tensor]:
        """The subject with these requests, numbered from 0 in this order, and their pictures."""
        subject, processor = self.plan.subject, self.ground.processor
        defense = subject.defense
        said = f"{defense.instruction} " if defense is not None and defense.instruction else ""
        cases = [self.cases[number] for number in numbers]
        words = [
            f"{said}{case.request if message.words is None else message.words}" for case in cases
        ]
        target: GenerationTarget
        if message.first is not None:
            usual = self._target(subject.model, processor, words, cases)
            pixels = self._pixels(numbers, usual, message)
            target = LaterTurnTarget(
                subject.model,
                processor,
                turns_of(processor, f"{said}{message.first}", words, [c.opening for c in cases]),
                pixels,
                **self._crossing(subject.model),
                defense=None if defense is None else defense.pixels,
            )
            target.aim = self.plan.entry.aim
            return target, pixels
        target = self._target(subject.model, processor, words, cases, message.pictures)
        target.defense = None if defense is None else defense.pixels
        return target, self._pixels(numbers, target, message)

    def _target(
        self,
        model: Any,
        processor: Any,
        words: Sequence[str],
        cases: Sequence[AttackCase],
        pictures: int = 1,
    ) -> GenerationTarget:
        """A model that is shown pictures and told these words."""
        kind = GenerationTarget if getattr(model, "vqguard", None) is None else CodeTarget
        target = kind(
            model,
            processor,
            [picture_prompt(processor, text, pictures) for text in words],
            [case.opening for case in cases],
            **self._crossing(model),
        )
        target.aim = self.plan.entry.aim
        return target

    def _crossing(self, model: Any) -> dict[str, Any]:
        """How a gradient crosses this model: the plan's way, and straight-through a surrogate."""
        guard = getattr(model, "vqguard", None)
        if guard is None:
            return {"gradient": "plain", "evade_verdict": False}
        mode = self.plan.mode if model is self.plan.subject.model else STRAIGHT_THROUGH
        return {"gradient": mode, "evade_verdict": mode.adaptive and guard.safety_map is not None}

    def _stand_in(self, numbers: Sequence[int]) -> Ensemble | None:
        """What the pictures are made on; None: the victim."""
        cases = [self.cases[number] for number in numbers]
        words = [case.request for case in cases]
        made_on = self.ground.surrogates(self.plan)
        if not made_on:
            return None
        return Ensemble([self._target(m.model, m.processor, words, cases) for m in made_on])

    def _pixels(
        self, numbers: Sequence[int], target: GenerationTarget, message: Message
    ) -> torch.Tensor:
        """Each request's picture; where a message has several, those of the next requests too."""
        cases = [
            self.cases[(number + more) % len(self.cases)]
            for number in numbers
            for more in range(message.pictures)
        ]
        seen = pixels_seen(self.ground.processor, cases, target.image_size)
        seen = seen.to(self.plan.subject.model.device)
        return strip(seen.unflatten(0, (len(numbers), message.pictures)))

    def _attempts(
        self,
        numbers: Sequence[int],
        clean: torch.Tensor,
        target: GenerationTarget,
        found: _Found,
        seconds: float,
    ) -> list[Attempt]:
        plan = self.plan
        own = torch.arange(len(numbers))
        flagged = target.refused(found.pixels).tolist()
        if plan.goal is Goal.ANSWER:
            answers = target.answers(found.pixels, own)
            said = {name: judge(answers, list(numbers)) for name, judge in self.judges.items()}
        else:  # the verdict is all that counts, and the guard's own judge says it
            answers = [""] * len(numbers)
            said = {plan.subject.model.vqguard.config.judge: [True] * len(numbers)}
        if found.bound is not None:  # nothing was painted: the bound is what the search says
            said = {name: found.bound.tolist() for name in said}
            flagged = [False] * len(numbers)
        wanted = plan.goal is Goal.DENIAL
        attempts = []
        for row, number in enumerate(numbers):
            case = self.cases[number]
            name = self._save(number, found.pixels[row]) if self._painted else None
            loss = None if found.loss is None else float(found.loss[row])
            passed = {
                judge: bool(each[row]) and flagged[row] == wanted for judge, each in said.items()
            }
            attempts.append(
                Attempt(
                    **self._facts(),
                    request=number,
                    text=case.request,
                    opening=case.opening,
                    answer=answers[row],
                    judges=passed,
                    flagged=flagged[row],
                    loss=loss if loss is not None and np.isfinite(loss) else None,
                    curve=_thinned(found.curve),
                    evaluations=int(found.evaluations[row]),
                    masked=found.masked > 0,
                    warnings=list(found.warnings),
                    image=name,
                    image_sha256=None if name is None else pixels_sha256(found.pixels[row]),
                    clean_sha256=pixels_sha256(clean[row]),
                    seconds=seconds / len(numbers),
                )
            )
        return attempts

    def _facts(self) -> dict[str, Any]:
        """What all attempts of the plan have in common."""
        plan, entry = self.plan, self.plan.entry
        attacked = plan.kind is not None
        return {
            "suite": self.ground.suite,
            "split": self.ground.split,
            "subject": plan.subject.name,
            "attack": entry.attack,
            "gradient": plan.mode.name,
            "eps_255": plan.eps_255 if attacked else 0.0,
            "steps": entry.steps if attacked else 0,
            "restarts": entry.restarts if attacked else 0,
            "seed": plan.seed,
            "aim": entry.aim,
            "settings": dict(entry.settings),
            "threat_model": self._threat().value,
            "model_sha256": plan.subject.model_sha256,
            "map_sha256": plan.subject.map_sha256,
            "guard": dict(plan.subject.health),
            "refusal_data": plan.subject.refusal_data,
            "versions": versions(),
            "surrogates": [made_on.sha256 for made_on in self.ground.surrogates(plan)],
        }

    def _threat(self) -> ThreatModel:
        """Whom the attack names, else who follows the gradient in this way.

        A clean picture's rate is what those of attacks are read against, so that it has theirs.
        """
        kind = self.plan.kind
        removed = self.plan.subject.name == "quantiser_removed"
        by_gradient = threat_of_gradient(self.plan.mode, quantiser_removed=removed)
        return by_gradient if kind is None or kind.threat is None else kind.threat

    def _save(self, number: int, pixels: torch.Tensor) -> str:
        plan = self.plan
        # one digest for what tells settings apart: a file name is no place for them
        told = f"{plan.entry.to_dict()}".encode()
        parts = [
            plan.subject.name,
            plan.entry.attack,
            plan.mode.name,
            f"eps{plan.eps_255:g}",
            f"seed{plan.seed}",
            hashlib.sha256(told).hexdigest()[:8],
            f"{number:04d}",
        ]
        name = f"{IMAGES}/{'-'.join(parts)}.png"
        save_png(Image.fromarray(_array(pixels)), self.ground.folder / name)
        return name


@dataclass(frozen=True)
class _Found:
    """What an attack found for so many requests."""

    pixels: torch.Tensor
    loss: torch.Tensor | None
    curve: Sequence[float]
    evaluations: torch.Tensor
    masked: int
    warnings: Sequence[str]
    bound: torch.Tensor | None = None
    """Success where no picture was made."""


def _array(pixels: torch.Tensor) -> Any:
    return to_8_bit(pixels.detach()).mul(255).round().byte().permute(1, 2, 0).cpu().numpy()


def pixels_sha256(pixels: torch.Tensor) -> str:
    """SHA-256 of an image (3, H, W) in [0, 1] as 8-bit RGB rows: of what its PNG holds."""
    return hashlib.sha256(np.ascontiguousarray(_array(pixels)).tobytes()).hexdigest()


def _thinned(curve: Sequence[float]) -> list[float]:
    kept = [float(value) for value in curve if np.isfinite(value)]
    if len(kept) <= _CURVE:
        return kept
    places = np.linspace(0, len(kept) - 1, _CURVE).round().astype(int)
    return [kept[place] for place in places]
