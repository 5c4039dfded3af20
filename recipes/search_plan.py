"""How the codebooks of a run are searched on this machine, and why."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vqguard.adapters.storage.bound_files import GUARD_FOLDER
from vqguard.artefact import JSON_NAME
from vqguard.codebooks.quantizer import VectorQuantizer
from vqguard.errors import ArtefactError
from vqguard.guard import VQGuard
from vqguard.recipes.run import MODEL
from vqguard.search.choose import Choice, choose


class LevelPlan(NamedTuple):
    """One codebook and the search chosen for it."""

    level: str
    codes: int
    dim: int
    choice: Choice


def search_plans(run: Path) -> list[LevelPlan]:
    """The search of each codebook of the guard in a run, a saved model's folder or a guard's own.

    A measurement that was kept is used where it is of this machine; else there is a new one, on
    codewords, which takes from seconds to a minute. Nothing is written.

    Raises:
        ArtefactError: there is no guard, or it cannot be read.
    """
    places = (run / MODEL / GUARD_FOLDER, run / GUARD_FOLDER, run)
    folder = next((place for place in places if (place / JSON_NAME).is_file()), None)
    if folder is None:
        raise ArtefactError(
            f"{run}: no guard here (no {JSON_NAME}). Name a run, a guarded model or a guard."
        )
    guard = VQGuard.from_pretrained(folder)
    levels = [
        (name, module)
        for name, module in guard.named_modules()
        if isinstance(module, VectorQuantizer)
    ]
    plans = []
    for name, level in levels:
        weight = level.codebook.weight.detach()
        choice = choose(weight, level.backend, level.calibration)
        plans.append(LevelPlan(name, weight.shape[0], weight.shape[1], choice))
    return plans
