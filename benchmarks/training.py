"""A training step with a guard and without one, step by step in turn.

The guarded model's stage runs beside the same stage of an unguarded copy, under the trainer that a
retrofit uses: stage 1 beside fine-tuning the projector on the same captions, stage 2 beside
fine-tuning the language model on the same conversations, from the same start. Both trainers live in
one process and take their steps in turn, so that other work on the machine disturbs both alike. A
step is all between two steps' beginnings: encoding the samples, both passes, the optimiser. Wall
clock.

    python -m benchmarks.training [--config RECIPE.yaml] [--rounds 7] [--threads 1 --threads 2]

With `--features pixels` both sides run the vision encoder; with `kept` its outputs are kept for
both, as in a retrofit of llava-tiny, which makes the guard's share larger. The unguarded side's
features then enter by a guard with one codeword a level that lets them through. Codebooks start on
random features: the search of a frozen one is exact, and tuned in its first step, which is not
counted.
"""

from __future__ import annotations

import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from transformers import TrainerCallback

from benchmarks.stages import fresh, shortened
from benchmarks.timing import machine, shown
from vqguard.adapters import build_guard, guard_model, unguard_model
from vqguard.codebooks.quantizer import use_estimator
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.feature_cache import FeatureCache
from vqguard.recipes.data.samples import SampleSource
from vqguard.recipes.image_batches import collect_features
from vqguard.recipes.recipe import RetrofitRecipe, load_recipe
from vqguard.recipes.sources import source_of
from vqguard.recipes.training.stage1 import Stage1Trainer
from vqguard.recipes.training.stage2 import ProjectorTrainer, Stage2Trainer
from vqguard.redteam.gradients import plain_estimator

GUARDED, PLAIN = "guarded", "unguarded"
WARM_UP = 2
"""Steps of each side that are not counted."""
_START_IMAGES = 600


class Turns:
    """Several threads of which one runs at a time: each hands on when it calls `next_turn`."""

    def __init__(self, names: list[str]) -> None:
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self._waiting = threading.Condition()
        self._order = list(names)
        self._began: dict[str, float] = {}

    @contextmanager
    def taking_part(self, name: str) -> Iterator[None]:
        """Inside, the thread runs in its turns; afterwards the others go on without it."""
        self._wait_for(name)
        try:
            yield
        finally:
            with self._waiting:
                self._order.remove(name)
                self._waiting.notify_all()

    def next_turn(self, name: str) -> None:
        """Write down how long this turn took, and wait for the next one.

        The first call ends what came before the first turn, which is not written down.
        """
        now = time.perf_counter()
        if name in self._began:
            self.seconds[name].append(now - self._began[name])
        with self._waiting:
            self._order.append(self._order.pop(0))
            self._waiting.notify_all()
        self._wait_for(name)
        self._began[name] = time.perf_counter()

    def _wait_for(self, name: str) -> None:
        with self._waiting:
            self._waiting.wait_for(lambda: self._order[0] == name)


class _StepInTurn(TrainerCallback):
    def __init__(self, turns: Turns, name: str) -> None:
        self.turns = turns
        self.name = name

    def on_step_begin(self, *arguments: Any, **keywords: Any) -> None:
        self.turns.next_turn(self.name)


def in_turns(works: Mapping[str, Callable[[Turns], object]], threads: int) -> Turns:
    """Run every work in a thread of its own, in turns, with so many threads of torch.

    Raises:
        RuntimeError: one of them failed.
    """
    turns = Turns(list(works))
    failures: list[BaseException] = []

    def run(name: str, work: Callable[[Turns], object]) -> None:
        with turns.taking_part(name):
            try:
                torch.set_num_threads(threads)  # OpenMP keeps a number for every thread
                work(turns)
            except BaseException as error:
                failures.append(error)

    running = [threading.Thread(target=run, args=item) for item in works.items()]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if failures:
        raise RuntimeError("a training run failed") from failures[0]
    return turns


class _Side(NamedTuple):
    """A model and what trains it in each stage."""

    model: Any
    trainers: Mapping[int, Any]
    open_guard: Any = None
    """Lets kept features through; None where no feature enters by a guard."""


def step_seconds(
    recipe: RetrofitRecipe, stage: int, *, kept: bool, threads: int, folder: Path
) -> dict[str, list[float]]:
    """Seconds of each counted step of a stage, guarded and unguarded, taken in turn."""
    source = source_of(recipe)
    numbers: Any = recipe.stage1 if stage == 1 else recipe.stage2
    drawn = source.captions if stage == 1 else source.instructions
    samples = drawn(numbers.samples)
    torch.set_num_threads(threads)
    model, processor = fresh(recipe)
    _start_codebooks(model, processor, source)
    cache = FeatureCache.build(folder / "features", model, processor, samples) if kept else None
    sides = {
        GUARDED: _Side(model, {1: Stage1Trainer, 2: Stage2Trainer}),
        PLAIN: _unguarded(recipe, kept=kept),
    }

    def train(name: str, turns: Turns) -> None:
        side = sides[name]
        data = EncodedSamples(samples, processor, numbers.max_length, cache)
        kind = side.trainers[stage]
        trainer = kind(side.model, numbers, data, folder / name, seed=recipe.seed)
        trainer.add_callback(_StepInTurn(turns, name))
        opened = (
            nullcontext()
            if side.open_guard is None
            else use_estimator(side.open_guard, plain_estimator)
        )
        with opened:
            trainer.run(resume=False)

    works = {name: lambda turns, name=name: train(name, turns) for name in sides}
    turns = in_turns(works, threads)
    return {name: taken[WARM_UP:] for name, taken in turns.seconds.items()}


def _start_codebooks(model: Any, processor: Any, source: SampleSource) -> None:
    samples = source.captions(_START_IMAGES)
    pictures = [opener() for sample in samples for opener in sample.images]
    guard = model.vqguard
    for level, features in zip(
        (guard.patch, guard.semantic), collect_features(model, processor, pictures), strict=True
    ):
        level.codebook.start_from(features, method="sample")


def _unguarded(recipe: RetrofitRecipe, *, kept: bool) -> _Side:
    model, processor = fresh(recipe)
    model = unguard_model(model)
    trainers = {1: ProjectorTrainer, 2: Stage2Trainer}
    if not kept:
        return _Side(model, trainers)
    guard = build_guard(model, site=recipe.guard.site, patch_codes=1, semantic_codes=1)
    guard_model(model, guard, processor)
    return _Side(model, trainers, guard)


@click.command()
@click.option("--config", default="llava-tiny", help="A recipe's name or YAML file.")
@click.option("--rounds", default=7, help="Counted steps of each side.")
@click.option("--threads", multiple=True, default=(1, 2), help="Threads of torch; can be repeated.")
@click.option(
    "--features", type=click.Choice(["pixels", "kept"]), default="pixels", help="What is read."
)
def main(config: str, rounds: int, threads: tuple[int, ...], features: str) -> None:
    """Print the ratio of guarded to unguarded steps."""
    # a turn ends where the next step begins, so the last step is not counted
    recipe = shortened(load_recipe(config), rounds + WARM_UP + 1)
    lines = []
    for count in threads:
        for stage in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                taken = step_seconds(
                    recipe, stage, kept=features == "kept", threads=count, folder=Path(folder)
                )
            medians = [1e3 * statistics.median(taken[name]) for name in (GUARDED, PLAIN)]
            ratio = shown(taken[GUARDED], taken[PLAIN])
            lines.append(f"| {stage} | {count} | {medians[0]:.0f} | {medians[1]:.0f} | {ratio} |")
    click.echo(f"{machine()}\n{config}, features from {features}, {rounds} rounds\n")
    click.echo("| stage | threads | guarded, ms | unguarded, ms | guarded / unguarded |")
    click.echo("| --- | --- | --- | --- | --- |")
    click.echo("\n".join(lines))


if __name__ == "__main__":
    main()
