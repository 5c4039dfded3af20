"""`vqguard scan`: verdicts on image files, and a word on every file that has none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from vqguard.cli.file_lists import read_list
from vqguard.cli.group import Session
from vqguard.cli.options import (
    DEFAULT_RUN,
    UserPath,
    adapter_module_option,
    base_option,
    debug_option,
    find_run,
    skip_bad_option,
)
from vqguard.cli.output import say
from vqguard.cli.scanning.bulk import BulkOptions, bulk_options, scan_into_files
from vqguard.cli.scanning.tally import Tally
from vqguard.errors import ConfigError, ImageError, InputError
from vqguard.files import require_empty
from vqguard.recipes.screening.ambiguity import CHOICES, REFUSE

if TYPE_CHECKING:
    from vqguard.recipes.report.explain import Explanations
    from vqguard.recipes.run import LoadedRun

SHOWN = 5  # names in a message that would list all of them
OTHER_FOLDER = "Name another one for --explain."


@click.command(
    "scan",
    epilog="""\b
Examples:
  vqguard scan photo.png holiday/*.jpg --json
  vqguard scan uploads --skip-unknown --explain why
  find uploads -type f -print0 | vqguard scan --files-from -
  vqguard scan shards --output verdicts --workers 8
""",
)
@click.argument("images", nargs=-1, metavar="[IMAGE...]", type=UserPath())
@click.option(
    "--files-from",
    "lists",
    multiple=True,
    metavar="FILE",
    type=UserPath(),
    help="Judge the files that FILE names as well, one a line or ended by NUL; - is standard "
    "input. Repeatable.",
)
@click.option(
    "--run",
    type=UserPath(),
    envvar="VQGUARD_RUN",
    default=DEFAULT_RUN,
    show_default=True,
    show_envvar=True,
    help="The run whose guard judges.",
)
@click.option(
    "--ambiguous",
    type=click.Choice(CHOICES),
    default=REFUSE,
    show_default=True,
    help="A file that shows different pictures to different readers (transparency, orientation, "
    "deep greys): refuse flags it; report judges all of them and takes the worst verdict; ignore "
    "judges the picture that open_image gives.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, one a file.")
@click.option(
    "--explain",
    type=UserPath(),
    metavar="DIR",
    help="Write a page into DIR, which must be new or empty: every flagged picture with the region "
    "that decided outlined, its code and its scores; the same in DIR/explain.json.",
)
@click.option("--explain-all", is_flag=True, help="With --explain: pictures that pass as well.")
@click.option(
    "--skip-unknown",
    is_flag=True,
    help="Files in a directory that are no images do not count against the exit code.",
)
@skip_bad_option
@bulk_options
@base_option
@adapter_module_option
@debug_option
@click.pass_context
def command(
    ctx: click.Context,
    *,
    images: tuple[Path, ...],
    lists: tuple[Path, ...],
    run: Path,
    base: str | None,
    ambiguous: str,
    as_json: bool,
    explain: Path | None,
    explain_all: bool,
    skip_unknown: bool,
    skip_bad: bool,
    bulk: BulkOptions,
) -> None:
    """Judge each IMAGE by its semantic code; the language model does not run.

    A directory stands for the image files in it and below, linked directories too: whatever begins
    like an image is one, whatever it is called. Every file that gets no verdict is named, and a
    closing line on stderr counts them: judged, flagged, skipped.

    The exit code is 0 if every file was judged and none is flagged, 1 if some are, 2 on a usage or
    input error or if a file was not judged (flagged ones or not), 141 if the reader of the output
    went away. With --skip-bad and --skip-unknown what they skip does not count, but something must
    be judged. Let a file through only on 0, or on a line of its own that says ok, or reported: what
    the policy of its category only reports does not count as flagged.

    With --output the verdicts are rows of parquet files, one for each picture, unreadable and
    unknown file; a scan that was killed goes on with --resume.
    """
    if not images and not lists:
        raise click.UsageError("Give an IMAGE, a directory or --files-from FILE.")
    if explain_all and explain is None:
        raise click.UsageError("--explain-all needs --explain DIR.")
    if explain is not None and bulk.output is not None:
        raise click.UsageError("--explain shows what is printed: leave --output away.")
    bulk.check()
    if explain is not None:
        require_empty(explain, OTHER_FOLDER)
    run = find_run(run)
    named = [*images, *(path for source in lists for path in read_list(source))]
    missing = [path for path in named if not _is_there(path)]
    if missing and not skip_bad:
        names = ", ".join(map(str, missing[:SHOWN]))
        more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise InputError(
            f"No such image: {names}{more}. Check the path. With --skip-bad the others are judged "
            "without it."
        )

    tally = Tally(as_json)
    if bulk.output is not None:
        tally.counts = scan_into_files(
            bulk.output,
            named,
            run,
            bulk,
            base=base,
            ambiguous=ambiguous,
            extensions=ctx.ensure_object(Session).extensions,
        )
        ctx.exit(tally.exit_code(skip_bad=skip_bad, skip_unknown=skip_unknown))

    from vqguard.images.image_files import LINKED_AGAIN, OTHER_FORMAT, iter_images

    def left_out(path: Path, reason: str) -> None:
        if reason.startswith(LINKED_AGAIN):
            say("Searched once: {}: {}", path, reason, err=True)
        elif reason == OTHER_FORMAT:  # --skip-unknown is about files that show nothing
            tally.file(path, ImageError(f"{path}: {reason}"))
        else:
            tally.unknown_file(path, reason)

    paths = list(iter_images(named, left_out))
    if not paths:
        tally.close()
        where = ", ".join(map(str, named[:SHOWN])) or "the list"
        raise InputError(f"No image files in {where}: nothing was judged.")

    from tqdm import tqdm

    from vqguard.recipes.run import open_run
    from vqguard.recipes.screening.judging import DiskFile, PictureJudge

    loaded = open_run(run, base=base)
    page = None if explain is None else _explanations(explain, run, loaded)
    shown = tqdm(paths, unit="image", disable=None, leave=False)
    judge: PictureJudge[DiskFile] = PictureJudge(loaded, ambiguous)
    for file, result in judge(map(DiskFile, shown)):
        tally.file(file.path, result)
        if page is None or isinstance(result, ImageError):
            continue
        if explain_all or result.flagged:
            page.add(file.path, result.word, result.verdict, result.picture, result.ambiguous)
    if page is not None:
        say("Explained: {}", page.close(), err=True)
    ctx.exit(tally.exit_code(skip_bad=skip_bad, skip_unknown=skip_unknown))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # opening it says what is wrong with it
        return True


def _explanations(folder: Path, run: Path, loaded: LoadedRun) -> Explanations:
    """Where flagged pictures are explained.

    Raises:
        ConfigError: for a guard that judges nothing.
        ArtefactError: the examples that the run keeps are damaged.
    """
    from vqguard.recipes.judging.examples import read_examples
    from vqguard.recipes.report.explain import Explanations

    safety_map = loaded.model.vqguard.safety_map
    if safety_map is None:
        raise ConfigError("this run's guard has no safety map: `vqguard calibrate` gives it one")
    examples = read_examples(run, safety_map)
    return Explanations(folder, safety_map, loaded.image_processor, examples)
