"""Scans whose verdicts are written to files: their options, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from vqguard.cli.options import UserPath
from vqguard.cli.output import say
from vqguard.errors import InputError
from vqguard.recipes.screening.counts import Counts

F = TypeVar("F", bound=Callable[..., Any])
INSTALL = "pip install 'vqguard[ray]'"


@dataclass(frozen=True)
class BulkOptions:
    """Where verdicts are written, and by whom."""

    output: Path | None
    resume: bool
    workers: int | None
    ray: str | None
    image_column: str | None

    def check(self) -> None:
        """Refuse what means nothing without --output. Raises UsageError."""
        names = {
            "--resume": self.resume,
            "--workers": self.workers,
            "--ray": self.ray,
            "--image-column": self.image_column,
        }
        without = [name for name, given in names.items() if given]
        if self.output is None and without:
            raise click.UsageError(f"{without[0]} needs --output DIR.")
        if self.ray and not self.workers:
            raise click.UsageError("--ray needs --workers N: how many judge there.")


def bulk_options(function: F) -> F:
    """`--output` and what goes with it; the command is given a `BulkOptions` as `bulk`."""

    def called(
        *args: Any,
        output: Path | None,
        resume: bool,
        workers: int | None,
        ray: str | None,
        image_column: str | None,
        **kwargs: Any,
    ) -> Any:
        bulk = BulkOptions(output, resume, workers, ray, image_column)
        return function(*args, bulk=bulk, **kwargs)

    called.__doc__ = function.__doc__
    made: Any = called
    for option in reversed(_OPTIONS):
        made = option(made)
    made.__click_params__ += getattr(function, "__click_params__", [])
    return made  # type: ignore[no-any-return]


_OPTIONS = (
    click.option(
        "--output",
        type=UserPath(),
        metavar="DIR",
        help="Write the verdicts into DIR as parquet, and print the closing line alone. .tar "
        "(WebDataset) and .parquet are opened then. For any number of pictures.",
    ),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on with the scan in --output: what has its verdicts and has not changed since is "
        "not judged again.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        metavar="N",
        help="Judge in N processes, which Ray starts and replaces when they die. One that is lost "
        "costs what it was about to write.",
    ),
    click.option(
        "--ray",
        metavar="ADDRESS",
        help="Have the workers on this Ray cluster (auto: the one that this machine belongs to), "
        "whose machines see run, pictures and output under the same paths.",
    ),
    click.option(
        "--image-column",
        metavar="NAME",
        help="The column of parquet files that holds the pictures. [default: image]",
    ),
)


def scan_into_files(
    output: Path,
    named: Sequence[Path],
    run: Path,
    bulk: BulkOptions,
    *,
    base: str | None,
    ambiguous: str,
    extensions: Sequence[str],
) -> Counts:
    """Judge what is named into the folder `output`, and say where the verdicts are.

    Raises:
        UsageError: a package is missing.
        InputError: there is nothing to judge.
        VQGuardError: as `vqguard.recipes.screening.bulk.scan_units`.
    """
    assert bulk.output is not None
    try:
        from vqguard.recipes.screening.bulk import Job, judge_here, scan_units
        from vqguard.recipes.screening.reading import IMAGE
        from vqguard.recipes.screening.units import refuse_inside, units_of

        distribute = judge_here
        if bulk.workers is not None:
            from vqguard.recipes.screening.ray_workers import RayWorkers

            distribute = RayWorkers(bulk.workers, bulk.ray)
    except ImportError as error:
        raise click.UsageError(f"{error.name} is not installed: {INSTALL}") from error
    refuse_inside(output, named)
    units = units_of(named, lambda path, why: say("Searched once: {}: {}", path, why, err=True))
    if not units:
        raise InputError(f"No files in {', '.join(map(str, named[:5]))}: nothing was judged.")
    job = Job.of_run(
        run,
        output,
        ambiguous=ambiguous,
        image_column=bulk.image_column or IMAGE,
        base=base,
        extensions=extensions,
    )
    counts = scan_units(job, units, distribute, resume=bulk.resume)
    say("Verdicts: {}", output, err=True)
    return counts
