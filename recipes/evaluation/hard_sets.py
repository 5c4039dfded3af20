"""Images that the judge was not taught: what it still catches, and what it flags in vain."""

from __future__ import annotations

from itertools import chain
from typing import Any

from vqguard.guard import VQGuard
from vqguard.recipes.data.samples import World
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.unfamiliar import record_names
from vqguard.recipes.judging.both import screen_with_both
from vqguard.redteam import ThreatModel
from vqguard.safety_map import SafetyMap


def measure_hard_sets(
    ledger: Ledger,
    model: Any,
    processor: Any,
    world: World,
    per_category: int,
    neutral: int,
    global_map: SafetyMap | None = None,
) -> None:
    """DSR and FPR on each of the world's hard sets, by judge as in `measure_toxic`.

    All categories of a set are one sample. An image that is called unfamiliar counts as flagged
    where a policy does something about it; how many neutral ones are called so, and how many toxic,
    is recorded beside, where the map can call any unfamiliar.
    """
    guard: VQGuard = model.vqguard
    maps: dict[str, SafetyMap | None] = {
        "global": global_map,
        guard.config.judge: guard.safety_map,
    }
    for name in world.hard_sets:
        if world.has_toxic(name):
            toxic = chain.from_iterable(
                world.hard_toxic_images(name, category, per_category)
                for category in world.categories
            )
            for judge, verdicts in screen_with_both(model, processor, toxic, global_map).items():
                ledger.flagged(
                    "dsr",
                    verdicts,
                    threat_model=ThreatModel.TOXIC_IMAGE.value,
                    category="all",
                    set=name,
                    judge=judge,
                )
        images = world.hard_neutral_images(name, neutral)
        for judge, verdicts in screen_with_both(model, processor, images, global_map).items():
            ledger.flagged("fpr", verdicts, scenes=name, judge=judge)
            record_names(ledger, maps[judge], verdicts, scenes=name, judge=judge)
