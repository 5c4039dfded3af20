"""The processes of one run: who is first, who waits for whom, and how all of them end.

A launcher (`torchrun`, `accelerate launch`) starts the same program several times and says in its
environment how often. Everything here does nothing where there is one process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from vqguard.distributed import alone, rank_and_world
from vqguard.errors import ConfigError, TrainingError

_PATIENCE = timedelta(days=7)  # the first process alone: features of a large set take hours
_LOST = ("closed by peer", "reset by peer", "broken pipe", "gloo", "nccl", "connectfullmesh")


_OWN_MODULES = "import sys; sys.path[:] = [place for place in sys.path if place]\n"
"""Python looks in the working directory first, where files of anybody may lie."""


def python_command(program: str, *arguments: str) -> list[str]:
    """The command that runs the source text `program`, no module of the working directory in it.

    It finds `arguments` in `sys.argv[1:]`.
    """
    return [sys.executable, "-c", _OWN_MODULES + program, *arguments]


def launched() -> int:
    """How many processes the launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_first() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank_and_world()[0] == 0


def device() -> torch.device:
    """Where this process computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


@contextmanager
def together() -> Iterator[None]:
    """Inside, the launched processes are one group of torch.distributed.

    gloo carries CPU tensors, NCCL those on GPUs. The group is taken apart on every way out: a
    process that ends without doing so aborts, and its own error is lost.

    Raises:
        TrainingError: where another process was lost.
        ConfigError: for a launcher's setting that leaves all but the first process without weights.
    """
    if launched() < 2 or dist.is_initialized():
        yield
        return
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() in ("1", "true"):
        raise ConfigError(
            "fsdp_cpu_ram_efficient_loading would leave every process but the first without "
            "weights, and codes are computed in all of them: set it to false"
        )
    _join()
    try:
        yield
    except RuntimeError as error:
        if is_loss(error):
            raise TrainingError(
                "another process of this run has ended, so it cannot go on: see what that one "
                f"said. Put it right and go on with --resume. (Here: {str(error).splitlines()[0]})"
            ) from error
        raise
    finally:
        _leave()


def is_loss(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _LOST)


def _join() -> None:
    global _waiting
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _waiting = dist.new_group(backend="gloo", timeout=_PATIENCE)


def _leave() -> None:
    global _waiting
    _waiting = None
    dist.destroy_process_group()


_waiting: Any = None
"""Where processes wait for the first one. gloo notices a lost process, so it may take long."""


def first_alone(work: Callable[[], object]) -> None:
    """Run `work` in the first process while the others wait for it; there it is by itself.

    What it raises is raised there; the others raise TrainingError.
    """
    rank, world = rank_and_world()
    if world == 1:
        work()
        return
    failed = torch.zeros(1)
    try:
        if rank == 0:
            with alone():
                work()
    except BaseException:
        failed += 1
        raise
    finally:
        dist.broadcast(failed, src=0, group=_waiting)
    if failed.item():
        raise TrainingError("the first process of this run ended with an error: see what it said")


def wait() -> None:
    """Go on when all processes are here."""
    if rank_and_world()[1] > 1:
        dist.barrier(group=_waiting)
