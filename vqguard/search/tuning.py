"""A short measurement that chooses the back end and the pruned search's plan: speed alone.

All back ends give the same answers, so a calibration of another machine, or a wrong one, costs time
and nothing else. It is kept with the guard as plain JSON and measured again where the processor or
the number of threads differs.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqguard.search.base import CodewordSearch
from vqguard.search.bound import UNIT, gamma, principal_axes
from vqguard.search.dense import DenseSearch
from vqguard.search.precision import full_precision
from vqguard.search.pruned import MOST, Plan, PrunedSearch, has_bfloat16, pruned_problem

_log = logging.getLogger("vqguard.search")
_TOKENS = 64
_FASTEST, _SLOWEST = 12.0, 64.0  # a distance alone, in distances of a matrix product
_AXES_FROM = 1536  # rows that the trial axes are taken from


class Calibration(NamedTuple):
    """Which back end is fastest for one codebook on one machine."""

    backend: str
    """torch, pruned or faiss."""
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
        return self.backend == "torch" or not _problem(self.backend)

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
        texts = isinstance(found.machine, str) and found.backend in ("torch", "pruned", "faiss")
        numbers = all(type(n) is int and n >= 1 for n in (plan.rank, found.codes, found.dim))
        worth = isinstance(plan.worth, float) and 1.0 <= plan.worth <= 1e9
        dtype = plan.dtype in ("float32", "bfloat16")
        return found if texts and numbers and worth and dtype else None


def machine() -> str:
    """What the speed of the back ends depends on, as far as torch can tell."""
    kind = "bfloat16" if has_bfloat16() else "float32"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability}, {kind} products, {torch.get_num_threads()} threads"


def _problem(backend: str) -> str:
    """Why a CPU back end cannot run here; empty when it can."""
    if backend == "pruned":
        return pruned_problem()
    if importlib.util.find_spec("faiss") is None:
        return "faiss is not installed"
    if sys.platform == "darwin":
        return "torch and faiss bring two OpenMP runtimes on macOS"
    return ""


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
        dense_time = _seconds(lambda: dense(batch)) / len(batch)
        times: dict[str, float] = {"torch": dense_time}
        plan = Plan(dim, "float32", 1.0)
        if not _problem("pruned"):
            plan, times["pruned"] = _best_plan(words, sample, dense_time)
        if not _problem("faiss"):
            from vqguard.search.faiss_index import FaissSearch

            faiss: CodewordSearch = FaissSearch(words)
            times["faiss"] = _seconds(lambda: faiss(batch)) / len(batch)
        backend = min(times, key=lambda name: times[name])
        shown = ", ".join(f"{name} {1e6 * taken:.0f} us" for name, taken in times.items())
        _log.info("nearest of %d codewords of width %d, a token: %s", codes, dim, shown)
        return Calibration(backend, plan, codes, dim, machine())


def _spread(rows: Tensor, count: int) -> Tensor:
    chosen = torch.linspace(0, len(rows) - 1, count).round().long()
    return rows[chosen].detach().to("cpu", torch.float32).contiguous()


def _stand_ins(words: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    picked = torch.randint(words.shape[0], (3, _TOKENS), generator=generator)
    return words[picked[0]] + 0.7 * (words[picked[1]] - words[picked[2]])


def _best_plan(words: Tensor, sample: Tensor, dense_time: float) -> tuple[Plan, float]:
    """The plan with the least time a token, and that time.

    A model names one rank: product with the coordinates + rotation + one look at every bound +
    distances, the products measured, the distances counted for the sample. The search with that
    rank is then timed against the one without a rotation, which depends on the features least.
    """
    codes, dim = words.shape
    dtype = torch.bfloat16 if has_bfloat16() else torch.float32
    one = _distance_time(words, sample)
    # what the budget of the slowest input rests on: a measurement that went wrong may not move it
    worth = max(1.0, codes / _SLOWEST, min(codes / _FASTEST, dense_time / one))
    fractions = (0.0625, 0.125, 0.1875, 0.25)
    ranks = sorted({max(16, int(dim * part) // 16 * 16) for part in fractions if dim > 128})
    axes = _trial_axes(words, ranks[-1]) if ranks else None
    counts = _survivors(words, sample, axes, [*ranks, dim], dtype)
    best = (float("inf"), dim)
    rows = sample.to(dtype).repeat(4, 1)
    most = MOST * worth * one
    for rank, count in zip([*ranks, dim], counts, strict=True):
        narrow = words[:, :rank].to(dtype)
        part = rows[:, :rank].contiguous()
        taken = _seconds(lambda a=part, b=narrow: a @ b.T)  # type: ignore[misc]
        if rank < dim:
            turn = torch.zeros(dim, rank, dtype=dtype)
            taken += _seconds(lambda w=turn: rows @ w)  # type: ignore[misc]
        # a token with too many candidates is left to the dense search
        each = torch.where(one * count < most, one * (1.0 + count), dense_time)
        taken = taken / len(rows) + float(each.mean()) + codes * 3e-10
        best = min(best, (taken, rank))
    name = str(dtype).removeprefix("torch.")
    batch = sample.repeat(4, 1)
    timed = []
    for rank in {best[1], dim}:
        search = PrunedSearch(words, Plan(rank, name, worth))
        timed.append((_seconds(lambda s=search: s(batch)) / len(batch), search.plan))  # type: ignore[misc]
    taken, plan = min(timed)
    return plan, taken


def _trial_axes(words: Tensor, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(words.shape[0], generator=generator)[: max(rank, _AXES_FROM)]
    return principal_axes(words[rows], rank)


def _distance_time(words: Tensor, sample: Tensor) -> float:
    """Seconds of one compiled distance to a codeword that is not in the processor's cache."""
    from vqguard.search import kernels

    generator = torch.Generator().manual_seed(1)
    order = torch.randperm(words.shape[0], generator=generator)[:2000].numpy()
    x, e = sample[0].numpy(), words.numpy()
    return _seconds(lambda: kernels.distances(x, e, order)) / len(order)


def _survivors(
    words: Tensor, sample: Tensor, axes: Tensor | None, ranks: list[int], dtype: torch.dtype
) -> list[Tensor]:
    """Number (64,) of codewords whose bound is under the least distance, for each rank."""
    centre = words.mean(dim=0)
    z, y = words - centre, sample - centre
    zz, yy = z.square().sum(dim=1), y.square().sum(dim=1)
    with full_precision(words.device):
        products = y @ z.T
        coordinates = (y, z) if axes is None else (y @ axes, z @ axes)
    least = (zz - 2.0 * products).amin(dim=1)
    lengths = yy.sqrt()[:, None] * zz.sqrt()
    unit = UNIT[dtype] if dtype == torch.bfloat16 else 0.0
    found = []
    for rank in ranks:
        if rank == z.shape[1]:
            inner, slack = products, lengths * (1.9 * unit + gamma(rank))
        else:
            a, b = coordinates[0][:, :rank], coordinates[1][:, :rank]
            rest_y = (yy - a.square().sum(dim=1)).clamp_min(0).sqrt()
            rest_z = (zz - b.square().sum(dim=1)).clamp_min(0).sqrt()
            inner = a @ b.T
            slack = lengths * (2.9 * unit + gamma(z.shape[1]) * rank**0.5)
            slack += rest_y[:, None] * rest_z
        bounds = zz - 2.0 * (inner + slack)
        found.append((bounds <= least[:, None]).sum(dim=1).double())
    return found


def _seconds(work: Callable[[], Any]) -> float:
    """The better of two runs, after one that warms up, in CPU time of the process.

    On a machine that is busy with other work, wall time would measure that work.
    """
    taken = []
    for _ in range(3):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken[1:])
