"""A short measurement that chooses the back end and the pruned search's plan: speed alone.

All back ends give the same answers, so a calibration of another machine, or a wrong one, costs time
and nothing else. It is kept with the guard as plain JSON and measured again where the processor or
the number of threads differs.

Searches are timed alternately, and one that is kept is left only for one that is clearly faster: in
three rounds of four by `_CLEAR` or more. A busy machine therefore costs a gain, not time.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from functools import cache, lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor

from vqguard.search.backend_table import backend_choices, backends_on
from vqguard.search.base import CodewordSearch
from vqguard.search.dense import DenseSearch
from vqguard.search.plan import Plan, default_plan, has_bfloat16, has_int8
from vqguard.search.timing import alternated, quartiles, seconds

_log = logging.getLogger("vqguard.search")
_TOKENS = {"cpu": 128, "cuda": 576}
"""Timed at once: on a GPU as many as an image has, fewer would measure the starting of kernels."""
_CLEAR = 0.95
"""Share of the time of what is kept that another may take at most to replace it."""


class Calibration(NamedTuple):
    """Which back end is fastest for one codebook on one machine."""

    backend: str
    """Its name in the table of back ends."""
    plan: Plan
    """For the pruned back end."""
    codes: Annotated[int, Field(ge=1)]
    dim: Annotated[int, Field(ge=1)]
    machine: str
    """`machine()` where it was measured."""
    times: dict[str, float] = {}  # noqa: RUF012 (a default of a named tuple, never changed)
    """Median microseconds a token of all that was timed, by name and plan."""
    reason: str = ""
    """Why it is this one, in a sentence."""

    def fits(self, codewords: Tensor) -> bool:
        """Whether it was measured for this shape on this machine, and can run here."""
        home = _home(codewords)
        if tuple(codewords.shape) != (self.codes, self.dim) or self.machine != machine(home):
            return False
        return self.backend in {backend.name for backend in usable(home.type)}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self._asdict(), "plan": dict(self.plan._asdict())}

    @classmethod
    def from_dict(cls, values: Any) -> Calibration | None:
        """The calibration in `values`, or None for anything else: it is then measured again."""
        try:
            read = _reader().validate_python(values)
        except ValidationError:
            return None
        return read if read.backend in backend_choices()[1:] else None


@cache
def _reader() -> TypeAdapter[Calibration]:
    return TypeAdapter(Calibration, config=ConfigDict(strict=True, allow_inf_nan=False))


def _home(codewords: Tensor) -> torch.device:
    """Where codewords are searched when the back ends are measured: their GPU, or the CPU."""
    return codewords.device if codewords.device.type == "cuda" else torch.device("cpu")


def machine(device: torch.device | None = None) -> str:
    """What the speed of the back ends depends on, as far as torch and Python can tell.

    On `device`, the CPU if it is None.
    """
    if device is not None and device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}: CUDA {torch.version.cuda}"
    kinds = [name for name, has in (("int8", has_int8()), ("bfloat16", has_bfloat16())) if has]
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return (
        f"{_processor()}: {capability}, {' and '.join([*kinds, 'float32'])} products,"
        f" {threads} thread{'s' if threads > 1 else ''}"
    )


@lru_cache(maxsize=1)
def _processor() -> str:
    cpus = Path("/proc/cpuinfo")
    if cpus.is_file():
        for line in cpus.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def usable(device: str) -> list[type[CodewordSearch]]:
    """The back ends for "cpu" or "cuda" tensors that run here and may be taken unasked."""
    automatic = (backend for backend in backends_on(device) if backend.automatic)
    return [backend for backend in automatic if backend.problem() is None]


def calibrate(codewords: Tensor, queries: Tensor | None = None) -> Calibration:
    """Measure the back ends on `codewords` (P, d), any float dtype, on their GPU or on the CPU.

    `queries` (M, d): 64 or more real features make the choice of the plan better. Without them,
    codewords displaced by 0.7 of the difference of two others stand in: about as far from an entry
    as the mean is, which is pessimistic. Takes about as long as ten images by the dense search.
    """
    return tuned_search(codewords, queries)[1]


def tuned_search(
    codewords: Tensor, queries: Tensor | None = None
) -> tuple[CodewordSearch, Calibration]:
    """The search that `calibrate` finds to be the fastest, which it has made, and the calibration.

    The search is over `codewords` themselves where they are on the CPU, float32 and contiguous.
    """
    with torch.no_grad():
        home = _home(codewords)
        words = codewords.detach().to(home, torch.float32).contiguous()
        codes, dim = words.shape
        sample = _stand_ins(words) if queries is None else _spread(queries, home)
        if not bool(torch.isfinite(sample).all()):  # for the search itself to refuse, by its row
            sample = _stand_ins(words)
        searches = _searches(words, sample)
        ways = {name: partial(search, sample) for name, search in searches.items()}
        taken = alternated(ways, _is_settled, home)
        chosen, reason = choose_clear(taken)
        times = {name: 1e6 * median(rounds) / len(sample) for name, rounds in taken.items()}
        plans = [(times[name], search.plan) for name, search in searches.items() if search.plan]
        plan = min(plans)[1] if plans else default_plan(codes, dim)
        shown = ", ".join(f"{name} {micro:.0f} us" for name, micro in times.items())
        _log.info("nearest of %d codewords of width %d, a token: %s", codes, dim, shown)
        backend = searches[chosen].name
        made = Calibration(backend, plan, codes, dim, machine(home), times, reason)
        return searches[chosen], made


def _searches(words: Tensor, sample: Tensor) -> dict[str, CodewordSearch]:
    """What is to be timed, the dense search first; each with its plan in its name."""
    dense = DenseSearch(words)
    dense_time = seconds(lambda: dense(sample), words.device) / len(sample)
    searches: dict[str, CodewordSearch] = {dense.name: dense}
    for backend in usable(words.device.type):
        if backend is not DenseSearch:
            for search in backend.candidates(words, sample, dense_time):
                plan = search.plan
                label = f" ({plan.dtype}, {plan.rank} of {words.shape[1]} axes)" if plan else ""
                searches[f"{search.name}{label}"] = search
    return searches


def choose_clear(taken: Mapping[str, list[float]]) -> tuple[str, str]:
    """The way to keep, of seconds by round, and why in a sentence; the first one is the default.

    From the slowest to the fastest, each replaces the one kept so far only where it is clearly
    faster.
    """
    names = list(taken)
    kept = names[0]
    for name in sorted(names[1:], key=lambda other: -median(taken[other])):
        if quartiles(taken[name], taken[kept])[2] <= _CLEAR:
            kept = name
    if len(names) == 1:
        return kept, "fastest where it was measured: nothing else runs here"
    quickest = min((name for name in names if name != kept), key=lambda o: median(taken[o]))
    low, middle, high = quartiles(taken[kept], taken[quickest])
    ratio = f"{middle:.2f} ({low:.2f} to {high:.2f}) of the time of {quickest}"
    if middle <= 1.0:
        rounds = len(taken[kept])
        return kept, f"fastest where it was measured: {ratio}, the next best, in {rounds} rounds"
    return kept, (
        f"not clearly beaten where it was measured: {ratio}, which would have to take"
        f" {_CLEAR:.2f} of its time or less in three rounds of four"
    )


def _is_settled(taken: Mapping[str, list[float]]) -> bool:
    """Whether what is chosen is also the fastest by the median, so that more rounds say nothing."""
    kept, _ = choose_clear(taken)
    return median(taken[kept]) == min(median(rounds) for rounds in taken.values())


def _spread(rows: Tensor, home: torch.device) -> Tensor:
    chosen = torch.linspace(0, len(rows) - 1, _TOKENS[home.type]).round().long()
    return rows[chosen].detach().to(home, torch.float32).contiguous()


def _stand_ins(words: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    count = _TOKENS[words.device.type]
    picked = torch.randint(words.shape[0], (3, count), generator=generator).to(words.device)
    return words[picked[0]] + 0.7 * (words[picked[1]] - words[picked[2]])
