"""The nearest-codeword search against what people use: time, memory, correctness.

    python -m benchmarks.search time --kind encoder --threads 1      # ratios, natural and hostile
    python -m benchmarks.search memory --kind projected              # peak extra memory
    python -m benchmarks.search check --kind encoder --views 1736    # a million held-out tokens
    python -m benchmarks.search tunings --kind encoder               # can `auto` be slow?
    python -m benchmarks.search cuda                                 # on a GPU: `search_cuda.py`

Features are described in `features.py`. Codebooks are k-means on training photographs, or trained
with the commitment loss (`--trained`); queries come from held-out ones. Kept for later runs in
`--cache`. Needs `vqguard[cpu,bench]`; run from the root of the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import features
from benchmarks.peers import approximate_peers, exact_peers, hostile
from benchmarks.search_cuda import cuda
from benchmarks.timing import alternate, machine, shown
from vqguard.codebooks.codebook import Codebook
from vqguard.codebooks.losses import codebook_loss, commitment_loss
from vqguard.codebooks.quantizer import VectorQuantizer, straight_through
from vqguard.search import CodewordSearch, calibrate, make_search
from vqguard.search.dense import DenseSearch
from vqguard.search.plan import Plan
from vqguard.search.pruned import PrunedSearch
from vqguard.search.settle import settle

KINDS = click.Choice(list(features.WIDTHS))
_VIEWS = 80


def _data(
    kind: str, codes: int, trained: bool, cache: Path, iterations: int
) -> tuple[Tensor, Tensor]:
    """Codewords (codes, d), and 12 held-out views (12, 576, d) in their space."""
    cache.mkdir(parents=True, exist_ok=True)
    made = "trained" if trained else f"kmeans{iterations}" if iterations else "sample"
    path = cache / f"{kind}-{codes}-{made}.pt"
    if path.exists():
        words, queries = torch.load(path, weights_only=True)
        return words, queries
    source = "encoder" if trained else kind
    training = torch.cat(list(features.views(source, features.TRAINING, _VIEWS)))
    held_out = torch.stack(list(features.views(source, features.HELD_OUT, 12)))
    if trained:
        words, queries = _train(training, held_out, codes, features.WIDTHS[kind])
    else:
        book = Codebook(codes, training.shape[1])
        method: Literal["kmeans", "sample"] = "kmeans" if iterations else "sample"
        book.start_from(list(training.split(9216)), method, iterations=iterations)
        words, queries = book.weight.detach(), held_out
    torch.save((words, queries), path)
    return words, queries


def _train(training: Tensor, held_out: Tensor, codes: int, width: int) -> tuple[Tensor, Tensor]:
    """A projector and its codebook, trained with L_vq and reconstruction (VQ-VAE), 120 steps."""
    projector = features.Projector(training.shape[1], width)
    back = nn.Linear(width, training.shape[1])
    level = VectorQuantizer(codes, width)
    with torch.no_grad():
        level.codebook.start_from(
            projector(training[:: max(1, len(training) // (2 * codes))]), "sample"
        )
    # At the codebook's rate the projector runs away from its codewords: the loss grew fourfold.
    around = [*projector.parameters(), *back.parameters()]
    optimiser = torch.optim.AdamW(
        [{"params": level.parameters(), "lr": 1e-3}, {"params": around, "lr": 1e-4}]
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(120):
        batch = training[torch.randint(len(training), (576,), generator=generator)]
        hidden = projector(batch)
        with straight_through(level):
            found = level(hidden)
        loss = (back(found.output) - batch).square().mean()
        codewords = nn.functional.embedding(found.indices, level.codebook.weight)
        loss = loss + codebook_loss(hidden, codewords) + 0.25 * commitment_loss(hidden, codewords)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 20 == 0:
            click.echo(f"step {step}: loss {float(loss.detach()):.4f}", err=True)
    with torch.no_grad():
        return level.codebook.weight.detach(), torch.stack([projector(view) for view in held_out])


def _kind_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--kind", type=KINDS, default="projected", help="Which features."),
        click.option("--codes", default=16000, help="Codewords."),
        click.option("--trained", is_flag=True, help="Codebook trained with its commitment loss."),
        click.option("--cache", type=Path, default=Path("build/benchmarks"), help="Kept features."),
        click.option("--iterations", default=3, help="Iterations of k-means; 0: sampled tokens."),
        click.option("--threads", default=1, help="Threads of torch and faiss."),
    ):
        command = option(command)
    return command


def _threads(count: int) -> None:
    import faiss

    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)


@click.group()
def main() -> None:
    """Measure the nearest-codeword search."""


@main.command("time")
@_kind_options
@click.option("--rounds", default=7, help="Alternated rounds.")
@click.option("--approximate/--exact", default=True, help="Also HNSW and IVF (slow to build).")
@click.option("--worst/--natural", default=True, help="Also inputs meant to be slow.")
@torch.no_grad()
def time_command(
    kind: str, codes: int, trained: bool, cache: Path, iterations: int, threads: int,
    rounds: int, approximate: bool, worst: bool,
) -> None:  # fmt: skip
    """Ratios to the searches that people use, one image of 576 tokens at a time."""
    _threads(threads)
    with torch.enable_grad():
        words, queries = _data(kind, codes, trained, cache, iterations)
    start = time.perf_counter()
    calibration = calibrate(words, queries[-1])  # as a quantiser does on its first batch
    between = time.perf_counter()
    ours: dict[str, CodewordSearch] = {
        name: make_search(words, name, calibration) for name in ("pruned", "torch", "faiss")
    }
    taken = (between - start, time.perf_counter() - between)
    pruned = ours["pruned"]
    assert isinstance(pruned, PrunedSearch)
    click.echo(f"\n{machine()}\n{kind}{' trained' if trained else ''}, {tuple(words.shape)}")
    click.echo(f"auto chose {calibration.backend}, {pruned.plan}; calibration {taken[0]:.1f} s,")
    click.echo(f"preparation of the three {taken[1]:.1f} s")
    _report_distance(words, queries)
    peers = exact_peers(words) | (approximate_peers(words) if approximate else {})
    turn = iter(range(10**9))
    view = [queries[0]]
    ways = {
        name: partial(lambda search, at: search(at[0]), search, view)
        for name, search in (ours | peers).items()
    }

    def next_view() -> None:
        view[0] = queries[next(turn) % len(queries)].contiguous()

    seconds = alternate({"next": next_view, **ways}, rounds)
    click.echo("\n| peer | its time / pruned | recall |\n| --- | --- | --- |")
    truth = torch.cat([ours["torch"](one) for one in queries])
    for name in ways:
        if name != "pruned":
            peer = ours.get(name) or peers[name]
            recall = float(
                (torch.cat([peer(one) for one in queries[:4]]) == truth[: 4 * 576]).double().mean()
            )
            click.echo(f"| {name} | {shown(seconds[name], seconds['pruned'])} | {recall:.4f} |")
    middle = sorted(seconds["pruned"])[rounds // 2]
    click.echo(f"| pruned: {1e3 * middle:.1f} ms | 1 | 1 |")
    if worst:
        with torch.enable_grad():
            inputs = {"held out": queries[1], **hostile(words, queries.shape[1])}
        click.echo("\n| input | pruned / dense on it | dense on it / dense on held out | wrong |")
        click.echo("| --- | --- | --- | --- |")
        for name, x in inputs.items():
            tried = {
                "pruned": partial(pruned, x),
                "dense": partial(ours["torch"], x),
                "plain": partial(ours["torch"], queries[1]),
            }
            seconds = alternate(tried, max(3, rounds // 2))
            wrong = int((pruned(x) != brute_force(x, words)).sum())
            slow = shown(seconds["dense"], seconds["plain"])
            click.echo(
                f"| {name} | {shown(seconds['pruned'], seconds['dense'])} | {slow} | {wrong} |"
            )


@main.command()
@_kind_options
@click.option("--times", default=50, help="How often to tune.")
@click.option("--rounds", default=5, help="Alternated rounds of each different choice.")
@torch.no_grad()
def tunings(
    kind: str, codes: int, trained: bool, cache: Path, iterations: int, threads: int,
    times: int, rounds: int,
) -> None:  # fmt: skip
    """Tune many times, and time every different choice against the dense search and faiss."""
    _threads(threads)
    with torch.enable_grad():
        words, queries = _data(kind, codes, trained, cache, iterations)
    choices: dict[tuple[str, Plan | None], int] = {}
    for number in tqdm(range(times), desc="tunings", mininterval=10):
        made = calibrate(words, queries[number % len(queries)])
        plan = made.plan._replace(worth=round(made.plan.worth, -2) or 100.0)
        key = (made.backend, plan if made.backend == "pruned" else None)
        choices[key] = choices.get(key, 0) + 1
    x = queries[0].contiguous()
    click.echo(f"\n{machine()}\n{kind}, {tuple(words.shape)}, {times} tunings")
    click.echo(
        "\n| chosen | times | its time / the better of dense and faiss |\n| --- | --- | --- |"
    )
    simple = {name: make_search(words, name) for name in ("torch", "faiss")}
    for (backend, chosen), count in choices.items():
        search = PrunedSearch(words, chosen) if backend == "pruned" else simple[backend]
        ways = {name: partial(one, x) for name, one in simple.items()}
        seconds = alternate({"chosen": partial(search, x), **ways}, rounds)
        better = min(simple, key=lambda name: sorted(seconds[name])[rounds // 2])
        ratio = shown(seconds["chosen"], seconds[better])
        click.echo(f"| {backend} {chosen or ''} | {count} | {ratio} |")


def _report_distance(words: Tensor, queries: Tensor) -> None:
    flat = queries.flatten(0, 1)
    chosen = torch.cat([DenseSearch(words)(view) for view in queries])
    near = (flat - words[chosen]).square().sum(dim=1).mean()
    spread = (flat - flat.mean(dim=0)).square().sum(dim=1).mean()
    click.echo(
        f"held out: squared distance to the codeword {float(near / spread):.3f} of the variance"
    )


def brute_force(queries: Tensor, words: Tensor) -> Tensor:
    """The nearest of all: products of everything, and `settle` for all that may tie.

    Float32 products with four times the textbook margin (Higham 2002, section 3.1) where that
    leaves few; float64 ones and a margin of 1e-9 for the others.
    """
    found = torch.empty(len(queries), dtype=torch.int64)
    wide = 4.0 * (words.shape[1] + 32) * 2.0**-24
    for start in range(0, len(queries), 576):
        part, out = queries[start : start + 576], found[start : start + 576]
        near = _near(part, words, torch.float32, wide)
        if int(near.sum()) > 64 * len(part):
            near = _near(part, words, torch.float64, 1e-9)
        rows, columns = near.nonzero(as_tuple=True)
        settle(part, words, rows, columns, out)
    return found


def _near(x: Tensor, words: Tensor, dtype: torch.dtype, margin: float) -> Tensor:
    """(m, P) bool: codewords whose score is within twice the margin of the least."""
    w, y = words.to(dtype), x.to(dtype)
    norms = w.square().sum(dim=1)
    scores = torch.addmm(norms, y, w.T, alpha=-2.0)
    lengths = y.square().sum(dim=1, keepdim=True).sqrt()
    size = 2.0 * lengths * norms.max().sqrt() + norms.max()
    return scores <= scores.amin(dim=1, keepdim=True) + 2.0 * margin * size


@main.command()
@_kind_options
@click.option("--views", default=174, help="Held-out views of 576 tokens.")
@click.option("--hostile-views", default=25, help="Sets of hostile inputs, 7 x 576 tokens each.")
@click.option("--first", default=0, help="Number of the first view, to go on with a check.")
@torch.no_grad()
def check(
    kind: str, codes: int, trained: bool, cache: Path, iterations: int, threads: int,
    views: int, hostile_views: int, first: int,
) -> None:  # fmt: skip
    """Count answers that differ from float64 brute force, or with the batch they came in."""
    _threads(threads)
    words, _ = _data(kind, codes, trained, cache, iterations)
    search = PrunedSearch(words, calibrate(words).plan)
    click.echo(f"{machine()}\nplan {search.plan}")
    generator = torch.Generator().manual_seed(1)
    numbers = range(first, first + views)
    sets = range(first, first + hostile_views)
    for title, source in (
        ("natural", (features.tokens(kind, features.HELD_OUT, 1000 + n) for n in numbers)),
        ("hostile", (x for n in sets for x in _hostile(words, n))),
    ):
        wrong = moved = total = 0
        for number, x in enumerate(tqdm(source, desc=title, mininterval=10), start=1):
            truth = brute_force(x, words)
            found = search(x)
            wrong += int((found != truth).sum())
            order = torch.randperm(len(x), generator=generator)
            size = int(torch.randint(1, 100, (1,), generator=generator))
            again = torch.cat([search(x[part]) for part in order.split(size)])
            moved += int((again != found[order]).sum())
            total += len(x)
            if number % 100 == 0:  # a check that is cut short has counted too
                click.echo(_counted(kind, title, total, wrong, moved))
        click.echo(_counted(kind, title, total, wrong, moved))


def _counted(kind: str, title: str, total: int, wrong: int, moved: int) -> str:
    return f"{kind} {title}: {total} queries, {wrong} wrong, {moved} changed with the batch"


def _hostile(words: Tensor, seed: int) -> list[Tensor]:
    with torch.enable_grad():
        return list(hostile(words, 576, seed).values())


@main.command()
@_kind_options
def memory(
    kind: str, codes: int, trained: bool, cache: Path, iterations: int, threads: int
) -> None:
    """Peak extra memory of one search of 576 tokens, each in a process of its own (Linux)."""
    words, queries = _data(kind, codes, trained, cache, iterations)
    path = cache / "memory.pt"
    torch.save((words, queries[:2]), path)
    # without this, freed blocks stay with the process and hide what a search takes
    quiet = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": str(threads)}
    for backend in ("pruned", "torch", "faiss"):
        for noise in ("", "noise"):
            module = [sys.executable, "-m", "benchmarks.search"]
            subprocess.run([*module, "peak", str(path), backend, noise], env=quiet, check=True)


@main.command(hidden=True)
@click.argument("path", type=Path)
@click.argument("backend")
@click.argument("noise")
@torch.no_grad()
def peak(path: Path, backend: str, noise: str) -> None:
    """One measurement of `memory`."""
    words, queries = torch.load(path, weights_only=True)
    search = make_search(words, backend)
    x = queries[0].contiguous()
    search(x[:20])
    if noise:
        x = words.mean(dim=0) + words.std(dim=0) * torch.randn_like(x)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    search(x)
    click.echo(f"{backend}, {noise or 'held out'}: {(_status('VmHWM') - before) / 1024:.1f} MB")


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise SystemExit(f"/proc/self/status has no {name}")


main.add_command(cuda)


if __name__ == "__main__":
    main()
