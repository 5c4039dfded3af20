"""A guarded model as a folder to share: merged or without its base, with its card."""

from __future__ import annotations

from pathlib import Path

from vqguard.adapters import save_guard_only
from vqguard.adapters.storage.card import CARD, model_card
from vqguard.adapters.storage.manifest import holds_manifest, is_guard_only, read_manifest
from vqguard.adapters.storage.rewriting import rewrite
from vqguard.errors import InputError
from vqguard.files import require_empty
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.report.card import run_card
from vqguard.recipes.run import RECIPE, open_run


def export_run(run: Path, output: Path, *, guard_only: bool = False) -> Path:
    """Write the guarded model of `run`, its processor and its model card into `output`.

    Args:
        run: a run's directory; or a guarded model's folder, which is written anew in its own form,
            as this version writes it.
        output: must be empty or missing.
        guard_only: leave out what the run's base has; the base is named with its checksum.

    Raises:
        ConfigError: ``output`` holds something.
        InputError: ``run`` is neither, or ``guard_only`` is asked of a whole model without its run.
        ArtefactError: the run has no guarded model.
    """
    require_empty(output, "Name another --output.")
    if not (run / RECIPE).is_file():
        return _export_folder(run, output, guard_only)
    base = RetrofitRecipe.from_yaml(run / RECIPE).model
    loaded = open_run(run)
    output.mkdir(parents=True, exist_ok=True)
    if guard_only:
        save_guard_only(loaded.model, output, base, processor=loaded.processor)
    else:
        loaded.model.save_pretrained(output, processor=loaded.processor)
    (output / CARD).write_text(run_card(run, output), encoding="utf-8")
    return output


def _export_folder(folder: Path, output: Path, guard_only: bool) -> Path:
    if not holds_manifest(folder):
        raise InputError(
            f"{folder / RECIPE} is missing: expected a directory that a retrofit wrote, or a "
            "guarded model's folder."
        )
    if guard_only and not is_guard_only(read_manifest(folder)):
        raise InputError(
            f"{folder} is a whole model and does not say what it was made from. Name the run, or "
            "use vqguard.save_guard_only."
        )
    rewrite(folder, output)
    (output / CARD).write_text(model_card(output), encoding="utf-8")
    return output
