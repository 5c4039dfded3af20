"""All measurements of a run whose data's world is known, in parts that need nothing of each other.

Where there are two threads or more, two processes share the parts out: each takes the next one that
is free. Which of them measured a part changes nothing in it. Latency and memory are measured after
that, with all threads and nothing beside them.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from vqguard.recipes.beside import beside, threads_beside
from vqguard.recipes.data.samples import Question, World
from vqguard.recipes.evaluation import pictures
from vqguard.recipes.evaluation.codebooks import measure_codebooks
from vqguard.recipes.evaluation.hard_sets import measure_hard_sets
from vqguard.recipes.evaluation.jailbreak import Jailbreak, measure_without_quantiser
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.overhead import measure_latency, measure_memory
from vqguard.recipes.evaluation.part import Part
from vqguard.recipes.evaluation.toxic import measure_toxic, measure_undefended
from vqguard.recipes.evaluation.utility import measure_utility
from vqguard.recipes.judging.both import read_global_map
from vqguard.recipes.models import base_model, control_model, has_control
from vqguard.recipes.placement import place
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.run import open_run
from vqguard.recipes.sources import world_of
from vqguard.redteam import ATTACKS, GRADIENTS, GradientMode

log = logging.getLogger("vqguard.recipes.evaluate")

CODEBOOK_IMAGES = 400
_ALONE = ("overhead",)
_ATTACKS = "attacks"
"""What the names of the attacks' parts begin with."""
_LONGEST = (*(f"{_ATTACKS}, guarded, {mode.name}" for mode in GRADIENTS if mode.adaptive), _ATTACKS)
"""What the names of the parts begin with that are taken first, so that none is begun last."""


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
    guarded: Any

    def measure(self) -> Part:
        """All parts, put together in the report's order."""
        parts = self._parts
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
                with beside(work, {**request, "folder": folder}, "the evaluation beside this one"):
                    found = self._measured(self._free(Path(folder)))
                for name in parts:
                    if name not in (*found, *_ALONE):
                        found[name] = self._part().load(Path(folder) / name)
            found |= self._measured(_ALONE)
        whole = self._part()
        for name in parts:
            whole.add(found[name])
        return whole

    def save(self, folder: Path) -> None:
        """Measure the parts that are free, and write each into a folder of its name."""
        for name in self._free(folder):
            self._measured([name])[name].save(folder / name)

    def _free(self, folder: Path) -> Iterator[str]:
        """The parts that no other process has taken, each one taken; the longest come first."""
        shared = [name for name in self._parts if name not in _ALONE]
        for name in sorted(shared, key=_turn):
            with suppress(FileExistsError):
                (folder / name).mkdir()
                yield name

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
            **({"hard sets": self._hard_sets} if self.recipe.evaluation.hard_sets else {}),
            "codebooks": self._codebooks,
            "overhead": self._overhead,
            "control utility": lambda part: self._utility(part, "finetuned_control", self._control),
            **{
                f"{_ATTACKS}, {against}, {number}": partial(attack, number)
                for against, attack in self._attacked.items()
                for number in range(max(1, len(self.recipe.evaluation.attack.eps_255)))
            },
        }

    @property
    def _attacked(self) -> dict[str, Callable[[int, Part], None]]:
        """What is attacked, in the report's order; each with a budget's number."""
        return {
            "base": lambda budget, part: self._attacks(budget, part, "base", self._base),
            **{f"guarded, {mode.name}": partial(self._guarded_attacks, mode) for mode in GRADIENTS},
            "quantiser removed": self._attacks_without_quantiser,
            "control": lambda budget, part: self._attacks(
                budget, part, "finetuned_control", self._control
            ),
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
        part.roc = measure_toxic(
            part.ledger,
            self.guarded,
            self.processor,
            self.world,
            *counts,
            read_global_map(self.run, self.guarded.vqguard),
        )

    def _hard_sets(self, part: Part) -> None:
        log.info("evaluation: hard sets, guarded")
        measure_hard_sets(
            part.ledger,
            self.guarded,
            self.processor,
            self.world,
            *self._toxic_counts,
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

    def _attacks(self, budget: int, part: Part, subject: str, model: Any) -> None:
        if model is not None:
            self._jailbreaks[budget].measure(part.ledger, subject, model, part.findings)

    def _guarded_attacks(self, mode: GradientMode, budget: int, part: Part) -> None:
        jailbreak = self._jailbreaks[budget]
        jailbreak.measure(part.ledger, "guarded", self.guarded, part.findings, [mode])

    def _attacks_without_quantiser(self, budget: int, part: Part) -> None:
        given = part.ledger, self.guarded, self.processor, part.findings
        measure_without_quantiser(self._jailbreaks[budget], *given)

    @cached_property
    def _jailbreaks(self) -> list[Jailbreak]:
        """One a budget."""
        recipe = self.recipe.evaluation.attack
        cases = self.world.attack_cases(Jailbreak.cases_needed(recipe))
        return Jailbreak.by_budget(recipe, cases, self.processor, self.recipe.seed)


def _turn(name: str) -> int:
    """When a part is taken; those of one turn are taken in the report's order."""
    begins = (number for number, longest in enumerate(_LONGEST) if name.startswith(longest))
    return next(begins, len(_LONGEST))


def measure_beside(request: dict[str, Any]) -> None:
    """Measure what `WorldParts.measure` leaves to another process."""
    recipe = RetrofitRecipe.from_dict(request["recipe"])
    world = world_of(recipe)
    if world is None:
        raise ValueError(f"{recipe.model} has no world of its own: there is nothing to measure")
    dtype = getattr(torch, request["dtype"])
    loaded = open_run(Path(request["run"]))
    given = loaded.processor, request["command"], dtype, loaded.model
    WorldParts(Path(request["run"]), recipe, world, *given).save(Path(request["folder"]))


def _only_own_attacks() -> bool:
    """Whether another process knows all attacks and gradient modes: it has not those added here."""
    modules = [attack.__module__ for attack in ATTACKS]
    modules += [mode.estimator.__module__ for mode in GRADIENTS]
    return all(module.startswith("vqguard.") for module in modules)
