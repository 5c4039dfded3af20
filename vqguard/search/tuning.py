"""A short measurement that chooses the back end and the pruned search's plan: speed alone.

All back ends give the same answers, so a calibration of another machine, or a wrong one, costs time
and nothing else. It is kept with the guard as plain JSON and measured again where the processor or
the number of threads differs.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqguard.search.base import CodewordSearch
from vqguard.search.dense import DenseSearch
from vqguard.search.plan import Plan, has_bfloat16
from vqguard.search.table import backend_choices, backends_on
from vqguard.search.timing import seconds

_log = logging.getLogger("vqguard.search")
_TOKENS = 64


class Calibration(NamedTuple):
    """Which back end is fastest for one codebook on one machine."""

    backend: str
    """Its name in the table of back ends."""
    plan: Plan
    """For the pruned back end."""
    codes: int
    dim: int
    machine: str
    """`machine()` where it was measured."""

    def fits(self, codewords: Tensor) -> bool:
        """Whether it was measured for this shape on this machine, and can run here."""
        if tuple(codewords.shape) != (self.codes, self.dim) or self.machine != machine():
            return False
        return self.backend in {backend.name for backend in _usable()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**self._asdict(), "plan": dict(self.plan._asdict())}

    @classmethod
    def from_dict(cls, values: Any) -> Calibration | None:
        """The calibration in `values`, or None for anything else: it is then measured again."""
        try:
            plan = Plan(**values["plan"])
            found = cls(**{**values, "plan": plan})
        except (TypeError, KeyError):
            return None
        texts = isinstance(found.machine, str) and found.backend in backend_choices()[1:]
        numbers = all(type(n) is int and n >= 1 for n in (plan.rank, found.codes, found.dim))
        worth = isinstance(plan.worth, float) and 1.0 <= plan.worth <= 1e9
        dtype = plan.dtype in ("float32", "bfloat16", "int8")
        return found if texts and numbers and worth and dtype else None


def machine() -> str:
    """What the speed of the back ends depends on, as far as torch can tell."""
    kind = "bfloat16" if has_bfloat16() else "float32"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability}, {kind} products, {torch.get_num_threads()} threads"


def _usable() -> list[type[CodewordSearch]]:
    """The CPU's back ends that run here and may be taken unasked."""
    automatic = (backend for backend in backends_on("cpu") if backend.automatic)
    return [backend for backend in automatic if backend.problem() is None]


def calibrate(codewords: Tensor, queries: Tensor | None = None) -> Calibration:
    """Measure the back ends on `codewords` (P, d) on the CPU, any float dtype.

    `queries` (M, d): 64 or more real features make the choice of the plan better. Without them,
    codewords displaced by 0.7 of the difference of two others stand in: about as far from an entry
    as the mean is, which is pessimistic. Takes about as long as ten images by the dense search.
    """
    with torch.no_grad():
        words = codewords.detach().to("cpu", torch.float32).contiguous()
        codes, dim = words.shape
        sample = _stand_ins(words) if queries is None else _spread(queries, _TOKENS)
        if not bool(torch.isfinite(sample).all()):  # for the search itself to refuse, by its row
            sample = _stand_ins(words)
        dense = DenseSearch(words)
        batch = sample.repeat(4, 1)
        dense_time = seconds(lambda: dense(batch)) / len(batch)
        times = {dense.name: dense_time}
        plan = Plan(dim, "float32", 1.0)
        for backend in _usable():
            if backend is DenseSearch:
                continue
            trials = backend.candidates(words, sample, dense_time)
            taken = [seconds(lambda trial=trial: trial(batch)) / len(batch) for trial in trials]  # type: ignore[misc]
            quickest = min(range(len(trials)), key=taken.__getitem__)
            times[backend.name] = taken[quickest]
            plan = trials[quickest].plan or plan
        fastest = min(times, key=times.__getitem__)
        shown = ", ".join(f"{name} {1e6 * taken:.0f} us" for name, taken in times.items())
        _log.info("nearest of %d codewords of width %d, a token: %s", codes, dim, shown)
        return Calibration(fastest, plan, codes, dim, machine())


def _spread(rows: Tensor, count: int) -> Tensor:
    chosen = torch.linspace(0, len(rows) - 1, count).round().long()
    return rows[chosen].detach().to("cpu", torch.float32).contiguous()


def _stand_ins(words: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(words.shape[0], (3, _TOKENS), generator=generator)
    return words[picked[0]] + 0.7 * (words[picked[1]] - words[picked[2]])
