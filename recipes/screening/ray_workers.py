"""Units judged by many processes, on one machine or on many: Ray Data hands them out.

Ray starts the workers, gives the units of a lost one to another and ends when all are done. It
reads no picture and writes no verdict: that is `bulk.Worker`'s, as in one process.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, WorkerCrashedError

from vqguard.errors import VQGuardError, first_line
from vqguard.recipes.screening.bulk import Job, Worker
from vqguard.recipes.screening.units import Unit

TRIES = 3
"""Times that a unit is begun again after its worker was lost; beyond, it is the unit that kills."""
_STORE = 128 * 2**20  # bytes that workers share; only numbers of units pass through


STARTS = 3
"""Times that Ray of this machine is started: it gives up soon where the processors are busy."""


class NotStartedError(VQGuardError):
    """Ray did not start, or its cluster was not reached."""


class LostWorkersError(VQGuardError):
    """Workers died, and others that took over."""


class WorkerFailedError(VQGuardError):
    """What a worker raised, in its words."""


class RayWorkers:
    """Hands units to workers, as `bulk.Distribute`.

    Args:
        workers: how many there are. Each has a model of its own, and its share of the GPUs.
        address: of a Ray cluster whose machines all see the run, the pictures and the output under
            the same paths; "auto" for the one that this machine belongs to. None: processes of this
            machine. Ray listens on the machine's own address then: RAY_AUTH_MODE=token, and a
            RAY_AUTH_TOKEN, keep others of the network out.
    """

    def __init__(self, workers: int, address: str | None = None) -> None:
        self.workers = workers
        self.address = address

    def __call__(self, job: Job, units: Sequence[Unit]) -> Iterator[Unit]:
        """Raises VQGuardError: what a worker raised, that one was lost too often, or no start."""
        with _started(self.workers, self.address):
            yield from self._handed_out(job, units)

    def _handed_out(self, job: Job, units: Sequence[Unit]) -> Iterator[Unit]:
        settings = ray.data.DataContext.get_current()
        settings.enable_progress_bars = False
        resources: Any = ray.cluster_resources  # published without types
        gpus = resources().get("GPU", 0.0)
        rows = [
            {"number": number, "unit": json.dumps(dataclasses.asdict(unit))}
            for number, unit in enumerate(units)
        ]
        numbered = ray.data.from_items(rows, override_num_blocks=len(rows))
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            # how often a unit is tried has no other name up to 2.63, the last that is taken
            warnings.simplefilter("ignore")
            done = numbered.map_batches(
                _UnitRows,
                fn_constructor_args=(job,),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=min(self.workers, len(units))),
                num_cpus=1,
                num_gpus=min(1.0, gpus / self.workers),
                ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": TRIES},
            )
        try:
            for row in done.iter_rows():
                if row["failed"]:
                    raise WorkerFailedError(row["failed"])
                yield units[row["number"]]
        except RayError as error:
            raise _lost(error) from error


class _UnitRows:
    """What Ray has in each of its workers."""

    def __init__(self, job: Job) -> None:
        self._worker: Worker | VQGuardError | OSError
        try:
            self._worker = Worker(job)
        except (VQGuardError, OSError) as error:
            self._worker = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        # an error goes back as a row: Ray would wrap it in accounts of its own
        try:
            if not isinstance(self._worker, Worker):
                raise self._worker
            for text in batch["unit"]:
                fields = json.loads(str(text))
                self._worker.judge(Unit(fields["kind"], tuple(fields["paths"]), fields["digest"]))
        except (VQGuardError, OSError) as error:
            return {"number": batch["number"], "failed": [str(error) or type(error).__name__]}
        return {"number": batch["number"], "failed": [""]}


@contextmanager
def _started(workers: int, address: str | None) -> Iterator[None]:
    """Ray, for as long as the block takes."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    # its workers would stand back behind whatever else runs, as one process does not
    os.environ.setdefault("RAY_worker_niceness", "0")
    own: dict[str, Any] = {
        "num_cpus": workers,
        "object_store_memory": _STORE,
    }
    for left in reversed(range(1 if address else STARTS)):
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                **({} if address else own),
            )
            break
        except Exception as error:  # it raises that class itself
            ray.shutdown()
            if not left:
                raise NotStartedError(
                    f"Ray did not start: {first_line(error)} Nothing was judged; try again, on a "
                    "less busy machine where it timed out, or leave --workers out"
                ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _lost(error: RayError) -> Exception:
    """What it means to us, where workers died; else the error itself."""
    # Typed here, since Ray's own classes are unknown where Ray is not installed.
    original: Exception = error
    seen: BaseException | None = original
    while seen is not None:
        if isinstance(seen, ActorDiedError | WorkerCrashedError | ActorUnavailableError):
            return LostWorkersError(
                f"workers were lost ({first_line(seen)}): what is judged is kept, and --resume "
                "goes on"
            )
        seen = getattr(seen, "cause", None) or seen.__cause__
    return original
