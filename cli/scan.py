"""`vqguard scan`: verdicts on image files, and a word on every file that has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vqguard.cli.file_lists import read_list
from vqguard.cli.options import (
    DEFAULT_RUN,
    UserPath,
    adapter_module_option,
    base_option,
    debug_option,
    find_run,
    skip_bad_option,
)
from vqguard.cli.output import field, say, say_json
from vqguard.errors import ConfigError, ImageError, InputError
from vqguard.files import require_empty

if TYPE_CHECKING:
    from PIL.Image import Image

    from vqguard.images import Readings
    from vqguard.recipes.report.explain import Explanations
    from vqguard.recipes.run import LoadedRun
    from vqguard.safety_map import Verdict

BATCH = 16
SHOWN = 5  # names in a message that would list all of them
OTHER_FOLDER = "Name another one for --explain."
REFUSE, REPORT, IGNORE = "refuse", "report", "ignore"

CLEAN, FLAGGED, NOT_ALL = 0, 1, 2


@click.command(
    "scan",
    epilog="""\b
Examples:
  vqguard scan photo.png holiday/*.jpg --json
  vqguard scan uploads --skip-unknown --explain why
  find uploads -type f -print0 | vqguard scan --files-from -
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
    type=click.Choice([REFUSE, REPORT, IGNORE]),
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
    """
    if not images and not lists:
        raise click.UsageError("Give an IMAGE, a directory or --files-from FILE.")
    if explain_all and explain is None:
        raise click.UsageError("--explain-all needs --explain DIR.")
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

    from vqguard.images.image_files import LINKED_AGAIN, OTHER_FORMAT, iter_images

    tally = Tally(as_json)

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

    from vqguard.recipes.run import open_run

    loaded = open_run(run, base=base)
    page = None if explain is None else _explanations(explain, loaded)
    for path, result in _results(loaded, paths, ambiguous):
        tally.file(path, result)
        if page is not None and isinstance(result, Judged) and (explain_all or result.flagged):
            page.add(path, result.word, result.verdict, result.picture, result.ambiguous)
    if page is not None:
        say("Explained: {}", page.close(), err=True)
    not_judged = []
    if tally.bad and not skip_bad:
        not_judged.append(f"{tally.bad} unusable (--skip-bad goes on without them)")
    if tally.unknown and not skip_unknown:
        not_judged.append(f"{tally.unknown} no images (--skip-unknown lets them be)")
    if not_judged:
        say("Not everything was judged: {}.", ", ".join(not_judged), err=True)
    tally.close()
    if tally.judged == 0:
        raise InputError(f"None of the {len(paths)} images could be read: nothing was judged.")
    if not_judged:
        ctx.exit(NOT_ALL)
    ctx.exit(FLAGGED if tally.flagged else CLEAN)


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # opening it says what is wrong with it
        return True


@dataclass(frozen=True)
class Judged:
    """What is known of a file.

    That is the verdict on its picture, or on the worst of its readings where all were judged; none
    where it was refused as ambiguous.
    """

    verdict: Verdict | None
    picture: Image
    """The one that the verdict is about; the file's first reading where there is none."""
    ambiguous: str = ""

    @property
    def flagged(self) -> bool:
        return self.verdict is None or self.verdict.flagged

    @property
    def word(self) -> str:
        """`reported`: a threshold was exceeded, and the policy is to report that."""
        if self.verdict is None:
            return "ambiguous"
        if self.verdict.flagged:
            return "flagged"
        return "ok" if self.verdict.reason is None else "reported"


@dataclass
class Tally:
    """Prints what came of each file, and counts."""

    as_json: bool
    judged: int = 0
    flagged: int = 0
    ambiguous: int = 0
    bad: int = 0
    unknown: int = 0

    def file(self, path: Path, result: Judged | ImageError) -> None:
        if isinstance(result, ImageError):
            self.bad += 1
            self._without_verdict(path, "unreadable", str(result))
            say("Skipped: {}", result, err=True)
            return
        self.judged += 1
        self.flagged += result.flagged
        self.ambiguous += bool(result.ambiguous)
        if self.as_json:
            say_json({"image": str(path), **_row(result)})
        else:
            _say_verdict(path, result)

    def unknown_file(self, path: Path, reason: str) -> None:
        self.unknown += 1
        self._without_verdict(path, "unknown", reason)
        say("Skipped: {}: {}", path, reason, err=True)

    def close(self) -> None:
        """Print the closing line."""
        counts = {
            "judged": self.judged,
            "flagged": self.flagged,
            "ambiguous": self.ambiguous,
            "skipped": self.bad + self.unknown,
            "unreadable": self.bad,
            "unknown": self.unknown,
        }
        if self.as_json:
            say_json(counts, err=True)
            return
        say(
            "{} judged, {} flagged ({} ambiguous), {} skipped ({} unusable, {} no images)",
            *counts.values(),
            err=True,
        )

    def _without_verdict(self, path: Path, word: str, error: str) -> None:
        if self.as_json:
            say_json({"image": str(path), "verdict": word, "error": error})


def _row(result: Judged) -> dict[str, Any]:
    verdict = result.verdict
    if verdict is None:
        return {"verdict": result.word, "reason": result.ambiguous}
    row: dict[str, Any] = {
        "verdict": result.word,
        "category": verdict.category,
        "probability": verdict.probability,
        "semantic_code": verdict.semantic_code,
    }
    if not verdict.quantised:
        row["quantised"] = False  # a judge alone: what passes is not bounded by a codebook
    if verdict.reason is not None:
        row["reason"] = dataclasses.asdict(verdict.reason)
    return {**row, "ambiguous": result.ambiguous} if result.ambiguous else row


def _say_verdict(path: Path, result: Judged) -> None:
    verdict = result.verdict
    if verdict is None:
        say("{}: ambiguous ({})", field(path), result.ambiguous)
        return
    say(
        "{}: {} ({}, probability {:.2f}, semantic code {}){}",
        field(path),
        result.word,
        field(verdict.category),
        verdict.probability,
        verdict.semantic_code,
        f"; {result.ambiguous}" if result.ambiguous else "",
    )


def _results(
    run: LoadedRun, paths: Sequence[Path], ambiguous: str
) -> Iterator[tuple[Path, Judged | ImageError]]:
    """What is found of each path, in the order given."""
    from tqdm import tqdm

    from vqguard.recipes.image_batches import batches

    shown = tqdm(paths, unit="image", disable=None, leave=False)
    each = ((path, _open(path, ambiguous, run.converts_to_rgb)) for path in shown)
    for opened in batches(each, lambda item: _pixels(item[1]), BATCH):
        pictures = [
            picture
            for _, readings in opened
            if not isinstance(readings, ImageError) and not _is_refused(readings, ambiguous)
            for picture in _pictures(readings)
        ]
        verdicts = iter(_screen(run, pictures))
        for path, readings in opened:
            if isinstance(readings, ImageError):
                yield path, readings
            elif _is_refused(readings, ambiguous):
                yield path, Judged(None, readings.picture, readings.ambiguous)
            else:
                mine = list(islice(verdicts, 1 + len(readings.others)))
                verdict, picture = _worst(zip(mine, _pictures(readings), strict=True))
                yield path, Judged(verdict, picture, readings.ambiguous)


def _open(path: Path, ambiguous: str, converted: bool) -> Readings | ImageError:
    from vqguard.images import Readings, open_image, open_readings

    try:
        if ambiguous == IGNORE:
            return Readings(open_image(path))
        return open_readings(path, converted=converted)
    except ImageError as error:
        return error


def _pixels(readings: Readings | ImageError) -> int:
    if isinstance(readings, ImageError):
        return 0
    return sum(picture.width * picture.height for picture in _pictures(readings))


def _is_refused(readings: Readings, ambiguous: str) -> bool:
    return ambiguous == REFUSE and bool(readings.others)


def _pictures(readings: Readings) -> list[Image]:
    return [readings.picture, *(picture for _, picture in readings.others)]


def _screen(run: LoadedRun, pictures: Sequence[Any]) -> list[Verdict]:
    """One verdict a picture, or an error: a missing verdict never passes for one."""
    verdicts: list[Verdict] = []
    for start in range(0, len(pictures), BATCH):
        part = list(pictures[start : start + BATCH])
        verdicts += (verdict for verdict, _ in zip(run.screen_images(part), part, strict=True))
    return verdicts


def _worst(judged: Iterable[tuple[Verdict, Image]]) -> tuple[Verdict, Image]:
    """The first flagged one with the highest probability, else the first reported one, else the
    first of all; with its picture.
    """

    def badness(pair: tuple[Verdict, Image]) -> tuple[bool, bool, float]:
        verdict, _ = pair
        return (
            verdict.flagged,
            verdict.reason is not None,
            verdict.probability if verdict.flagged else 0.0,
        )

    return max(judged, key=badness)


def _explanations(folder: Path, run: LoadedRun) -> Explanations:
    """Where flagged pictures are explained.

    Raises:
        ConfigError: for a guard that judges nothing.
    """
    from vqguard.recipes.report.explain import Explanations

    safety_map = run.model.vqguard.safety_map
    if safety_map is None:
        raise ConfigError("this run's guard has no safety map: `vqguard calibrate` gives it one")
    return Explanations(folder, safety_map, run.image_processor)
