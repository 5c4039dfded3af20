"""A run's guarded model as a folder to share: merged or without its base, with its card."""

from __future__ import annotations

from pathlib import Path

from vqguard.adapters import save_guard_only
from vqguard.adapters.storage.card import CARD
from vqguard.errors import InputError
from vqguard.files import require_empty
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.report.card import run_card
from vqguard.recipes.run import RECIPE, open_run


def export_run(run: Path, output: Path, *, guard_only: bool = False) -> Path:
    """Write the guarded model of `run`, its processor and its model card into `output`.

    Args:
        output: must be empty or missing.
        guard_only: leave out what the run's base has; the base is named with its checksum.

    Raises:
        ConfigError: `output` holds something.
        InputError: `run` is no run's directory.
        ArtefactError: the run has no guarded model.
    """
    require_empty(output, "Name another --output.")
    if not (run / RECIPE).is_file():
        raise InputError(f"{run / RECIPE} is missing: expected a directory that a retrofit wrote.")
    base = RetrofitRecipe.from_yaml(run / RECIPE).model
    loaded = open_run(run)
    output.mkdir(parents=True, exist_ok=True)
    if guard_only:
        save_guard_only(loaded.model, output, base, processor=loaded.processor)
    else:
        loaded.model.save_pretrained(output)
        loaded.processor.save_pretrained(output)
    (output / CARD).write_text(run_card(run, output), encoding="utf-8")
    return output
