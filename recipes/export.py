"""A guarded model as a folder to share: merged or without its base, with its card."""

from __future__ import annotations

import shutil
from pathlib import Path

from vqguard.adapters import save_guard_only
from vqguard.adapters.encoders.stored import holds_encoder
from vqguard.adapters.storage.card import CARD, model_card
from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.adapters.storage.manifest import holds_manifest, is_guard_only, read_manifest
from vqguard.adapters.storage.rewriting import rewrite
from vqguard.errors import InputError
from vqguard.files import LOCK, replace_text, require_empty
from vqguard.recipes.report.card import run_base, run_card
from vqguard.recipes.run import JUDGE, RECIPE, model_folder, open_run


def export_run(run: Path, output: Path, *, guard_only: bool = False) -> Path:
    """Write the guarded model of `run`, its processor and its model card into `output`.

    Args:
        run: a run's directory; or a guarded model's folder, which is written anew in its own form,
            as this version writes it.
        output: must be empty or missing.
        guard_only: leave out what the run's base has; the base is named with its checksum.

    Raises:
        ConfigError: `output` holds something, or another process writes into it.
        InputError: `run` is neither, or `guard_only` is asked of a whole model without its run.
        ArtefactError: the run has no guarded model.
    """
    require_empty(output, "Name another --output.")
    with only_writer(output):
        require_empty(output, "Name another --output.")  # now nobody else begins to fill it
        if holds_encoder(model_folder(run)):
            raise InputError(
                f"{run} judges behind a vision encoder: there is no model to export. Share the run "
                "as it is, or its folder `model`"
            )
        made = (run / RECIPE).is_file() or (run / JUDGE).is_file()
        write = _export_run if made else _export_folder
        try:
            replace_text(output / CARD, write(run, output, guard_only))
        except Exception:  # who is killed cleans nothing up
            _empty(output)  # on a full disk: so that the same command can be tried again
            raise
    return output


def _empty(folder: Path) -> None:
    """Take away what was written, but not the lock of who writes."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif not entry.name.startswith(LOCK):
            entry.unlink(missing_ok=True)


def _export_run(run: Path, output: Path, guard_only: bool) -> str:
    base = run_base(run)
    loaded = open_run(run)
    if guard_only:
        save_guard_only(loaded.model, output, base, processor=loaded.processor)
    else:
        loaded.model.save_pretrained(output, processor=loaded.processor)
    return run_card(run, output)


def _export_folder(folder: Path, output: Path, guard_only: bool) -> str:
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
    return model_card(output)
