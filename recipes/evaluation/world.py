"""All measurements of a run whose data's world is known, in parts that need nothing of each other.

What is measured of the undefended model and of the control is measured in a process of its own
where there are two threads or more, beside the guarded model. Latency and memory are measured after
that, with all threads and nothing beside them.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from vqguard.recipes.beside import beside, threads_beside
from vqguard.recipes.data.samples import Question, World
from vqguard.recipes.evaluation import pictures
from vqguard.recipes.evaluation.codebooks import measure_codebooks
from vqguard.recipes.evaluation.jailbreak import Jailbreak, measure_guarded
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.overhead import measure_latency, measure_memory
from vqguard.recipes.evaluation.part import Part
from vqguard.recipes.evaluation.toxic import measure_toxic, measure_undefended
from vqguard.recipes.evaluation.utility import measure_utility
from vqguard.recipes.judging.both import read_global_map
from vqguard.recipes.models import base_model, control_model, has_control
from vqguard.recipes.placement import place
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.sources import world_of
from vqguard.redteam import ATTACKS, GRADIENTS

log = logging.getLogger("vqguard.recipes.evaluate")

CODEBOOK_IMAGES = 400
_BESIDE = ("base utility", "undefended", "control utility", "base attacks", "control attacks")
_ALONE = ("overhead",)


@dataclass
class WorldParts:
    """The parts of one evaluation, each of which fills its own `Part`."""

    run: Path
    recipe: RetrofitRecipe
    world: World
    processor: Any
    command: str
    """What the records say makes them again."""
    dtype: torch.dtype
    """Of the guarded model, and so of the undefended one."""
    guarded: Any = None
    """The guarded model, where its parts are measured."""
    roc: list[dict[str, float]] = field(default_factory=list)
    """The ROC of `measure_toxic`, once that is measured."""

    def measure(self) -> Part:
        """All parts, put together in the report's order."""
        parts = self._parts
        mine = [name for name in parts if name not in (*_BESIDE, *_ALONE)]
        if threads_beside() is None or not _only_own_attacks():
            found = self._measured(parts)
        else:
            request = {
                "run": str(self.run.resolve()),
                "recipe": self.recipe.to_dict(),
                "command": self.command,
                "dtype": str(self.dtype).removeprefix("torch."),
            }
            with tempfile.TemporaryDirectory() as folder:
                work = f"{__name__}:measure_beside"
                with beside(work, {**request, "folder": folder}, "the evaluation of the base"):
                    found = self._measured(mine)
                for name in _BESIDE:
                    found[name] = self._part().load(Path(folder) / name)
            found |= self._measured(_ALONE)
        whole = self._part()
        for name in parts:
            whole.add(found[name])
        return whole

    def save(self, names: Iterable[str], folder: Path) -> None:
        """Measure some parts, and write each into a folder of its name."""
        for name, part in self._measured(names).items():
            part.save(folder / name)

    def _measured(self, names: Iterable[str]) -> dict[str, Part]:
        found = {}
        for name in names:
            found[name] = self._part()
            self._parts[name](found[name])
        return found

    def _part(self) -> Part:
        return Part(Ledger(self.command, self.recipe.seed))

    @property
    def _parts(self) -> dict[str, Callable[[Part], None]]:
        """What measures each part, in the report's order."""
        return {
            "base utility": lambda part: self._utility(part, "base", self._base),
            "guarded utility": lambda part: self._utility(part, "guarded", self.guarded),
            "undefended": self._undefended,
            "toxic": self._toxic,
            "codebooks": self._codebooks,
            "overhead": self._overhead,
            "control utility": lambda part: self._utility(part, "finetuned_control", self._control),
            "base attacks": lambda part: self._attacks(part, "base", self._base),
            "guarded attacks": self._guarded_attacks,
            "control attacks": lambda part: self._attacks(part, "finetuned_control", self._control),
        }

    # -- what is measured on

    @cached_property
    def _base(self) -> Any:
        return place(base_model(self.recipe, self.dtype)[0]).eval()

    @cached_property
    def _control(self) -> Any:
        return place(control_model(self.run)) if has_control(self.run) else None

    @cached_property
    def _tasks(self) -> dict[str, list[Question]]:
        number = self.recipe.evaluation.utility
        return {task: list(self.world.questions(task, number)) for task in self.world.tasks}

    @cached_property
    def images(self) -> list[Any]:
        """Neutral scenes for the codebooks' figures and the report's pictures."""
        return list(self.world.neutral_images((1, 3), CODEBOOK_IMAGES))

    @property
    def _toxic_counts(self) -> tuple[int, int]:
        return self.recipe.evaluation.toxic_per_category, self.recipe.evaluation.neutral

    # -- the parts

    def _utility(self, part: Part, subject: str, model: Any) -> None:
        if model is not None:
            log.info("evaluation: utility, %s", subject)
            measure_utility(part.ledger, subject, model, self.processor, self._tasks)

    def _undefended(self, part: Part) -> None:
        log.info("evaluation: toxic scenes, base")
        counts = self._toxic_counts
        measure_undefended(part.ledger, self._base, self.processor, self.world, *counts)

    def _toxic(self, part: Part) -> None:
        log.info("evaluation: toxic scenes, guarded")
        counts = self._toxic_counts
        self.roc = measure_toxic(
            part.ledger,
            self.guarded,
            self.processor,
            self.world,
            *counts,
            read_global_map(self.run, self.guarded.vqguard),
        )

    def _codebooks(self, part: Part) -> None:
        log.info("evaluation: codebooks")
        measure_codebooks(part.ledger, self.guarded, self.processor, self.images)

    def _overhead(self, part: Part) -> None:
        log.info("evaluation: overhead")
        question = self._tasks[self.world.tasks[0]][0]
        rounds = self.recipe.evaluation.latency_rounds
        measure_latency(part.ledger, self.guarded, self.processor, question, rounds)
        measure_memory(part.ledger, self.run, pictures.save_scene(self.run, self.images[0]))

    def _attacks(self, part: Part, subject: str, model: Any) -> None:
        if model is not None:
            self._jailbreak.measure(part.ledger, subject, model, part.findings)

    def _guarded_attacks(self, part: Part) -> None:
        given = part.ledger, self.guarded, self.processor, part.findings
        measure_guarded(self._jailbreak, *given)

    @cached_property
    def _jailbreak(self) -> Jailbreak:
        recipe = self.recipe.evaluation.attack
        cases = self.world.attack_cases(Jailbreak.cases_needed(recipe))
        return Jailbreak(recipe, cases, self.processor, self.recipe.seed)


def measure_beside(request: dict[str, Any]) -> None:
    """Measure what `WorldParts.measure` leaves to another process."""
    recipe = RetrofitRecipe.from_dict(request["recipe"])
    world = world_of(recipe)
    if world is None:
        raise ValueError(f"{recipe.model} has no world of its own: there is nothing to measure")
    dtype = getattr(torch, request["dtype"])
    processor = base_model(recipe, dtype)[1]
    run = Path(request["run"])
    parts = WorldParts(run, recipe, world, processor, request["command"], dtype)
    parts.save(_BESIDE, Path(request["folder"]))


def _only_own_attacks() -> bool:
    """Whether another process knows all attacks and gradient modes: it has not those added here."""
    modules = [attack.__module__ for attack in ATTACKS]
    modules += [mode.estimator.__module__ for mode in GRADIENTS]
    return all(module.startswith("vqguard.") for module in modules)
