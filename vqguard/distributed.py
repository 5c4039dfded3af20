"""Rows that arrive in chunks, and statistics of data that several processes share.

Where `torch.distributed` is initialised, the functions with `shared` in their name are collective:
every process calls them in the same order, and all get the same result. Otherwise they return what
one process knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch import distributed as dist

from vqguard.errors import InputError, NonFiniteError

Chunks = Iterable[Tensor]
"""Chunks (n_i, d) of features, any float dtype; iterated anew for every pass over the data."""


_alone: ContextVar[bool] = ContextVar("_alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one: for work that it does while the others wait.

    They call no collective function meanwhile, so one called here would never return.
    """
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) without torch.distributed."""
    if not _alone.get() and dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def shared_sum(tensor: Tensor) -> Tensor:
    """The sum of `tensor` over all processes, as a new tensor."""
    total = tensor.clone()
    if rank_and_world()[1] > 1:
        dist.all_reduce(total)
    return total


def _shared_rows(rows: Tensor) -> Tensor:
    """The rows (n_i, d) of all processes, in the order of the processes."""
    world = rank_and_world()[1]
    if world == 1:
        return rows
    size = torch.tensor([rows.shape[0]], device=rows.device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    longest = int(max(int(number) for number in sizes))
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: int(n)] for part, n in zip(gathered, sizes, strict=True)])


def finite_chunks(chunks: Chunks, dim: int, device: torch.device) -> Iterator[Tensor]:
    """The chunks as float32 (n_i, d) on `device`, empty ones left out.

    Raises:
        InputError: for another shape.
        NonFiniteError: for NaN or infinity.
    """
    for number, chunk in enumerate(chunks):
        if chunk.dim() != 2 or chunk.shape[1] != dim or not chunk.is_floating_point():
            raise InputError(
                f"expected features of shape (n, {dim}) for a codebook of width {dim}, got"
                f" {tuple(chunk.shape)} {chunk.dtype} in chunk {number}"
            )
        points = chunk.detach().to(device, torch.float32).contiguous()
        if not bool(torch.isfinite(points).all()):
            raise NonFiniteError(
                f"the features for the codebook hold NaN or infinity (chunk {number})"
            )
        if points.shape[0]:
            yield points


class Best:
    """The `count` rows with the largest keys among all that were shown, over all processes.

    With random keys this is a uniform sample without replacement.
    """

    def __init__(self, count: int, dim: int, device: torch.device) -> None:
        self._count = count
        self._keys = torch.empty(0, dtype=torch.float64, device=device)
        self._rows = torch.empty(0, dim, device=device)

    def show(self, keys: Tensor, rows: Tensor) -> None:
        """`keys` (n,) float64 and their `rows` (n, d) float32."""
        if len(self._keys) == self._count and self._count:
            better = keys > self._keys[-1]  # most chunks bring little that is new
            keys, rows = keys[better], rows[better]
        self._keep(torch.cat([self._keys, keys]), torch.cat([self._rows, rows]))

    def shared(self) -> Tensor:
        """The rows (at most `count`, d), the largest key first."""
        self._keep(_shared_rows(self._keys), _shared_rows(self._rows))
        return self._rows

    def _keep(self, keys: Tensor, rows: Tensor) -> None:
        order = keys.argsort(descending=True, stable=True)[: self._count]
        self._keys, self._rows = keys[order], rows[order]


def shared_sample(
    chunks: Iterable[Tensor], count: int, generator: torch.Generator, like: Tensor
) -> Tensor:
    """A uniform sample (at most `count`, d) of all rows of all processes, on `like`'s device.

    `chunks` as `finite_chunks` gives them, `generator` a CPU generator with the same seed in every
    process.

    Raises:
        InputError: when there is no row at all.
    """
    rank, world = rank_and_world()
    best = Best(count, like.shape[1], like.device)
    seeds = torch.randint(2**62, (world,), generator=generator)
    own = torch.Generator().manual_seed(int(seeds[rank]))
    for points in chunks:
        keys = torch.rand(points.shape[0], dtype=torch.float64, generator=own)
        best.show(keys.to(points.device), points)
    rows = best.shared()
    if rows.shape[0] == 0:
        raise InputError("expected at least one row of features, got none")
    return rows


def shared_choice(
    chunks: Callable[[], Iterable[Tensor]], count: int, generator: torch.Generator, like: Tensor
) -> Tensor:
    """A uniform sample (at most `count`, d) of all rows, on `like`'s device.

    As `shared_sample`, but what is drawn depends on the rows in their order alone, process by
    process, and not on how they are cut into chunks or shared out. Each call of `chunks` gives them
    once more; they are read twice.

    Raises:
        InputError: when there is no row at all.
    """
    rank, world = rank_and_world()
    sizes = torch.zeros(world, dtype=torch.int64, device=like.device)
    sizes[rank] = sum(points.shape[0] for points in chunks())
    before = shared_sum(sizes).cumsum(0)
    total = int(before[-1])
    if total == 0:
        raise InputError("expected at least one row of features, got none")
    chosen = torch.randperm(total, generator=generator)[:count].to(like.device)
    drawn = torch.zeros(len(chosen), like.shape[1], device=like.device)
    start = int(before[rank - 1]) if rank else 0
    for points in chunks():
        here = (chosen >= start) & (chosen < start + points.shape[0])
        drawn[here] = points[chosen[here] - start]
        start += points.shape[0]
    return shared_sum(drawn)  # every row comes from one process, the others add zeros
