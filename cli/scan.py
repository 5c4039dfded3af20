"""`vqguard scan`: verdicts on image files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vqguard.cli.options import (
    DEFAULT_RUN,
    adapter_module_option,
    debug_option,
    find_run,
    skip_bad_option,
)
from vqguard.errors import ImageError, InputError

if TYPE_CHECKING:
    from PIL.Image import Image

    from vqguard.recipes.run import LoadedRun
    from vqguard.safety_map import Verdict

BATCH = 16
GO_ON = "With --skip-bad the others are judged without it."


@click.command("scan", epilog="\b\nExample:\n  vqguard scan photo.png holiday/*.jpg --json")
@click.argument(
    "images", nargs=-1, required=True, metavar="IMAGE...", type=click.Path(path_type=Path)
)
@click.option(
    "--run",
    type=click.Path(path_type=Path),
    envvar="VQGUARD_RUN",
    default=DEFAULT_RUN,
    show_default=True,
    show_envvar=True,
    help="The run whose guard judges.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line, one an image.")
@skip_bad_option
@adapter_module_option
@debug_option
@click.pass_context
def command(
    ctx: click.Context, *, images: tuple[Path, ...], run: Path, as_json: bool, skip_bad: bool
) -> None:
    """Judge each IMAGE by its semantic code; the language model does not run.

    A directory stands for the image files in it and below. The exit code is 0 if none is
    flagged, 1 if some are, 2 on a usage or input error (with --skip-bad: only if no image could
    be read).
    """
    run = find_run(run)
    missing = [path for path in images if not path.exists()]
    if missing and not skip_bad:
        names = ", ".join(map(str, missing))
        raise InputError(f"No such image: {names}. Check the path. {GO_ON}")

    from vqguard.images import iter_images

    paths = list(iter_images(images))
    if not paths:
        raise InputError(f"No image files in {', '.join(map(str, images))}: nothing was judged.")

    from vqguard.recipes.run import open_run

    loaded = open_run(run)
    flagged = judged = 0
    for path, verdict in _verdicts(loaded, paths, skip_bad):
        if isinstance(verdict, ImageError):
            _show_bad(path, verdict, as_json)
            continue
        judged += 1
        flagged += verdict.flagged
        _show(path, verdict, as_json)
    if judged == 0:
        raise InputError(f"None of the {len(paths)} images could be read: nothing was judged.")
    ctx.exit(1 if flagged else 0)


def _verdicts(
    run: LoadedRun, paths: Sequence[Path], skip_bad: bool
) -> Iterator[tuple[Path, Verdict | ImageError]]:
    """Each path with its verdict, in the order given; a bad image with what is wrong with it."""
    from tqdm import tqdm

    from vqguard.images import open_image

    for start in tqdm(range(0, len(paths), BATCH), unit="batch", disable=None, leave=False):
        batch = paths[start : start + BATCH]
        pictures: dict[Path, Image] = {}
        bad: dict[Path, ImageError] = {}
        for path in batch:
            try:
                pictures[path] = open_image(path)
            except ImageError as error:
                if not skip_bad:
                    raise ImageError(f"{error}. {GO_ON}") from error
                bad[path] = error
        judged = run.screen_images(list(pictures.values())) if pictures else []
        verdicts = dict(zip(pictures, judged, strict=True))
        for path in batch:
            yield path, bad[path] if path in bad else verdicts[path]


def _show(path: Path, verdict: Verdict, as_json: bool) -> None:
    word = "flagged" if verdict.flagged else "ok"
    if as_json:
        row = {
            "image": str(path),
            "verdict": word,
            "category": verdict.category,
            "probability": verdict.probability,
            "semantic_code": verdict.semantic_code,
        }
        click.echo(json.dumps(row))
        return
    click.echo(
        f"{click.format_filename(path)}: {word} ({verdict.category}, "
        f"probability {verdict.probability:.2f}, semantic code {verdict.semantic_code})"
    )


def _show_bad(path: Path, error: ImageError, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"image": str(path), "verdict": "unreadable", "error": str(error)}))
    click.echo(f"Skipped: {error}", err=True)
