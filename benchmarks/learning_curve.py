"""How many images a judge alone needs: its DSR on llava-tiny by images a category.

    python -m benchmarks.learning_curve --plot docs/images/learning-curve.svg

Judges are made as `vqguard retrofit --levels semantic` makes them, from n images of each of the
seven categories and the same number of neutral ones throughout, and measured on scenes that are
held out. Prints the table of docs/judge.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

from vqguard.guard import VQGuard
from vqguard.intervals import wilson
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.judge_alone.images import JudgeImages, LabelledImage, parts_of
from vqguard.recipes.judge_alone.judged_model import judged_model
from vqguard.recipes.judging.recipe import JudgeRecipe
from vqguard.recipes.judging.regional import LabelledFeatures, read_features, teach
from vqguard.recipes.report.plots import COLOURS
from vqguard.recipes.run import LoadedRun
from vqguard.recipes.tiny.scenes import NEUTRAL_SCENES
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.records import write_records
from vqguard.redteam.threat import ThreatModel
from vqguard.safety_map import NEUTRAL

SIZES, DISTRACTORS = (5, 10, 20, 50, 100, 200), (0, 1, 2)
_NEUTRAL = 1000
_ONE = 1e-6  # share that leaves one image a category out: these judges are measured on other scenes


@dataclass(frozen=True)
class Scenes:
    """Held-out scenes as features: toxic ones by distractors, neutral ones by kind."""

    toxic: dict[int, LabelledFeatures]
    neutral: dict[str, LabelledFeatures]

    @classmethod
    def read(cls, loaded: LoadedRun, world: TinyWorld, per_category: int, neutral: int) -> Scenes:
        """The scenes of `world`'s split."""

        def features(pairs: Iterable[tuple[str, Image.Image]]) -> LabelledFeatures:
            return read_features(loaded.model, loaded.processor, pairs)

        toxic = {
            beside: features(
                (category, image)
                for category in world.categories
                for image in world.toxic_images(category, beside, per_category)
            )
            for beside in DISTRACTORS
        }
        kinds = {
            kind: features((NEUTRAL, image) for image in world.neutral_images(objects, neutral))
            for kind, objects in NEUTRAL_SCENES.items()
        }
        return cls(toxic, kinds)


def flags(guard: VQGuard, features: LabelledFeatures) -> list[bool]:
    """Which of the scenes a guard flags."""
    if guard.safety_map is None:
        raise ValueError("expected a guard with a safety map")
    judged = features.judged(guard, torch.arange(len(features.labels)))
    flagged: list[bool] = guard.safety_map.flagged(judged.codes, judged.mask).tolist()
    return flagged


def chosen(labels: Sequence[tuple[str, ...]], size: int, seed: int) -> list[int]:
    """The numbers of `size` images of each category and of all neutral ones, by the seed."""
    generator = torch.Generator().manual_seed(seed)
    numbers: list[int] = []
    for category in sorted({names[0] for names in labels}):
        mine = torch.tensor([n for n, names in enumerate(labels) if names[0] == category])
        drawn = mine[torch.randperm(len(mine), generator=generator)].tolist()
        numbers += drawn if category == NEUTRAL else drawn[:size]
    return numbers


def judge_of(
    loaded: LoadedRun, pool: LabelledFeatures, numbers: Sequence[int], recipe: JudgeRecipe
) -> VQGuard:
    """The model's guard, made anew from these images of the pool."""
    features = LabelledFeatures(
        [pool.tokens[n] for n in numbers],
        [pool.semantic[n] for n in numbers],
        [pool.layouts[n] for n in numbers],
        [pool.labels[n] for n in numbers],
    )
    images = [LabelledImage(str(n), pool.labels[n], Image.Image) for n in numbers]
    shares = parts_of(JudgeImages(images), recipe, JudgeRules()).shares
    guard: VQGuard = loaded.model.vqguard
    teach(guard, features, shares, recipe.regional, seed=recipe.seed)
    return guard


def measure(ledger: Ledger, guard: VQGuard, scenes: Scenes, size: int, seed: int) -> None:
    """Records of one judge."""
    of: dict[str, Any] = {"images": size, "drawn": seed, "judge": "regional"}
    for beside, features in scenes.toxic.items():
        ledger.rate(
            "dsr",
            "guarded",
            flags(guard, features),
            threat_model=ThreatModel.TOXIC_IMAGE.value,
            category="all",
            distractors=beside,
            **of,
        )
    for kind, features in scenes.neutral.items():
        ledger.rate("fpr", "guarded", flags(guard, features), scenes=kind, **of)


def pooled(ledger: Ledger, metric: str, **condition: Any) -> tuple[float, float, float]:
    """Rate over all seeds, with its 95 % interval."""
    mine = [
        r for r in ledger.records if r.metric == metric and condition.items() <= r.condition.items()
    ]
    hits, n = sum(round(r.value * r.n) for r in mine), sum(r.n for r in mine)
    return hits / n, *wilson(hits, n)


def table(ledger: Ledger) -> str:
    """Markdown: DSR by images a category and distractors, and the FPR."""
    heads = ["images a category", *(f"DSR, {d} distractors" for d in DISTRACTORS)]
    heads += [f"FPR, {kind}" for kind in NEUTRAL_SCENES]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for size in dict.fromkeys(r.condition["images"] for r in ledger.records):
        rates = [pooled(ledger, "dsr", images=size, distractors=d) for d in DISTRACTORS]
        rates += [pooled(ledger, "fpr", images=size, scenes=kind) for kind in NEUTRAL_SCENES]
        shown = [f"{100 * v:.1f} % ({100 * lo:.1f}–{100 * hi:.1f})" for v, lo, hi in rates]
        lines.append(f"| {size} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plot(ledger: Ledger, path: Path) -> None:
    """The curve: a line for each number of distractors, a point for each draw of images."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    sizes = list(dict.fromkeys(int(r.condition["images"]) for r in ledger.records))
    for beside in DISTRACTORS:
        colour = COLOURS[beside]
        values = [pooled(ledger, "dsr", images=n, distractors=beside)[0] for n in sizes]
        name = {0: "alone", 1: "beside one other thing"}.get(beside, f"beside {beside} others")
        axes.plot(sizes, values, color=colour, label=name)
        for record in ledger.records:
            if record.condition.get("distractors") == beside:
                axes.plot(record.condition["images"], record.value, ".", color=colour, alpha=0.5)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_xlabel("Images a category")
    axes.set_ylabel("Toxic scenes flagged (DSR)")
    axes.grid(color="#e6e6e6")
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", choices=["test", "validation"], default="test")
    parser.add_argument("--scenes", type=int, default=60, help="toxic ones a category and column")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path, help="the records as JSON")
    given = parser.parse_args()
    recipe = replace(JudgeRecipe.of_model("llava-tiny"), held_out=_ONE)
    loaded = judged_model(recipe, recipe.guard.semantic_codes)
    world = TinyWorld(0, given.split)
    pool = read_features(
        loaded.model, loaded.processor, world.judge_images(max(given.sizes), _NEUTRAL)
    )
    scenes = Scenes.read(loaded, world, given.scenes, 10 * given.scenes)
    ledger = Ledger("python -m benchmarks.learning_curve", 0)
    for size in given.sizes:
        for seed in range(given.seeds):
            numbers = chosen(pool.labels, size, seed)
            guard = judge_of(loaded, pool, numbers, replace(recipe, seed=seed))
            measure(ledger, guard, scenes, size, seed)
            print(size, seed, [f"{r.value:.3f}" for r in ledger.records[-6:]], flush=True)
    print(table(ledger))
    if given.plot is not None:
        plot(ledger, given.plot)
    if given.output is not None:
        write_records(given.output, ledger.records, {"title": "Learning curve"}, {})


if __name__ == "__main__":
    main()
