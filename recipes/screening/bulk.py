"""A scan of more pictures than anybody reads verdicts of: resumable, in one process or in many."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.errors import ConfigError, ImageError
from vqguard.recipes.extensions import import_extension
from vqguard.recipes.judging.map_changes import read_map
from vqguard.recipes.run import model_checksum, open_run
from vqguard.recipes.screening.counts import UNKNOWN, UNREADABLE, Counts
from vqguard.recipes.screening.judging import PictureJudge
from vqguard.recipes.screening.reading import IMAGE, AnyFile, NotPicture, files_of
from vqguard.recipes.screening.units import Unit
from vqguard.recipes.screening.verdict_files import (
    ScanFile,
    claim,
    count,
    place_of,
    remove_others,
    write_rows,
)


@dataclass(frozen=True)
class Job:
    """What a worker needs to know to judge a unit. Paths hold on every machine that has one."""

    run: Path
    output: Path
    scan: ScanFile
    base: str | None = None
    extensions: tuple[str, ...] = ()
    """Modules to import first, as `--adapter-module` does."""

    @classmethod
    def of_run(
        cls,
        run: Path,
        output: Path,
        *,
        ambiguous: str,
        image_column: str = IMAGE,
        base: str | None = None,
        extensions: Sequence[str] = (),
    ) -> Job:
        """The job of judging by a run's guard as it is now.

        Raises:
            ArtefactError: there is no guarded model.
            ConfigError: its guard has no map.
        """
        scan = ScanFile(1, read_map(run).version, model_checksum(run), ambiguous, image_column)
        return cls(run.resolve(), output.resolve(), scan, base, tuple(extensions))


Distribute = Callable[[Job, Sequence[Unit]], Iterator[Unit]]
"""Has units judged, each by a `Worker`; gives them back as they are done."""


class Worker:
    """Judges units in this process.

    Raises:
        ConfigError: the run has another map or model by now than the job's.
    """

    def __init__(self, job: Job) -> None:
        for module in job.extensions:
            import_extension(module)
        self.job = job
        loaded = open_run(job.run, base=job.base)
        safety_map = loaded.model.vqguard.safety_map
        now = ("" if safety_map is None else safety_map.version, model_checksum(job.run))
        if now != (job.scan.map_version, job.scan.model):
            raise ConfigError(
                f"{job.run} was changed while its guard judged: scan again, with another --output"
            )
        self._judge: PictureJudge[AnyFile] = PictureJudge(loaded, job.scan.ambiguous)

    def judge(self, unit: Unit) -> None:
        """Write a unit's verdicts, if they are not there already. Raises OSError."""
        place = place_of(self.job.output, unit)
        if not place.is_file():
            write_rows(place, self._rows(unit))

    def _rows(self, unit: Unit) -> Iterator[dict[str, Any]]:
        """A row for each of the unit's files, in their order but for those that are no pictures."""
        strangers: list[NotPicture] = []
        files = _pictures(files_of(unit, self.job.scan.image_column), strangers)
        for file, result in self._judge(files):
            if isinstance(result, ImageError):
                yield {"image": file.name, "verdict": UNREADABLE, "error": str(result)}
            elif result.verdict is None:
                yield {"image": file.name, "verdict": result.word, "ambiguous": result.ambiguous}
            else:
                yield {"image": file.name, "quantised": True, **result.to_row()}
        for name, reason in strangers:
            yield {"image": name, "verdict": UNKNOWN, "error": reason}


def judge_here(job: Job, units: Sequence[Unit]) -> Iterator[Unit]:
    """Judge units one after another in this process. Raises as `Worker`."""
    worker = Worker(job)
    for unit in units:
        worker.judge(unit)
        yield unit


def scan_units(
    job: Job, units: Sequence[Unit], distribute: Distribute = judge_here, *, resume: bool = False
) -> Counts:
    """Have every unit judged once, and count what came of all files.

    What a kill leaves is whole units; with `resume` the others are judged. Units whose files have
    changed since are judged again.

    Raises:
        ConfigError: the output holds something else, verdicts of another map, or another process
            writes there.
        VQGuardError: as `Worker`; what was done stays, to be resumed.
    """
    with only_writer(job.output):
        claim(job.output, job.scan, resume=resume)
        remove_others(job.output, units)
        left = [unit for unit in units if not place_of(job.output, unit).is_file()]
        with tqdm(total=len(units), unit="unit", disable=None, leave=False) as shown:
            shown.update(len(units) - len(left))
            for _ in distribute(job, left) if left else ():
                shown.update()
        return count(job.output, units)


def _pictures(
    files: Iterator[AnyFile | NotPicture], strangers: list[NotPicture]
) -> Iterator[AnyFile]:
    for file in files:
        if isinstance(file, tuple):
            strangers.append(file)
        else:
            yield file
