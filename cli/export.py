"""`vqguard export`: a run's guarded model, to share."""

from __future__ import annotations

from pathlib import Path

import click

from vqguard.cli.options import UserPath, adapter_module_option, debug_option, find_run
from vqguard.cli.output import say


@click.command(
    "export",
    epilog="""\b
Examples:
  vqguard export runs/llava-tiny --output llava-tiny-guarded
  vqguard export runs/llava-tiny --output llava-tiny-guard --guard-only
  vqguard export runs/llava-tiny --output llava-tiny-guard --guard-only --push OWNER/NAME
  vqguard export old-folder --output new-folder
""",
)
@click.argument("run", type=UserPath())
@click.option(
    "--output",
    required=True,
    type=UserPath(),
    help="The directory to write; it must be empty or missing.",
)
@click.option(
    "--guard-only",
    is_flag=True,
    help="Leave out what the base model has. Loading needs the same base, by its checksum.",
)
@click.option("--push", metavar="OWNER/NAME", help="Upload the directory to the model hub as well.")
@adapter_module_option
@debug_option
def command(*, run: Path, output: Path, guard_only: bool, push: str | None) -> None:
    """Write the guarded model of RUN with its processor and a model card that holds the
    report's figures, each with its threat model. `load_guarded` reads the directory; loaders that
    do not know vqguard refuse it. RUN may also be a guarded model's folder, of an earlier version
    perhaps: it is written anew as this version does.
    """
    run = find_run(run)

    from vqguard.recipes.export import export_run

    export_run(run, output, guard_only=guard_only)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    say("{}: {:.1f} MB", output, size / 1e6)
    if push is not None:
        from vqguard.adapters.storage.upload import upload_guarded

        say("{}", upload_guarded(output, push))
