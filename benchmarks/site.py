"""What quantising before the projector saves at inference: site `encoder` against `projected`.

One image at LLaVA-1.5-7B's shapes (576 tokens, encoder width 1024, language-model width 4096, two
projector layers, 16000 codewords), random weights: from the vision encoder's features to the tokens
that the language model reads. The peer is the unguarded projector. All three are timed alternately
in one process; the table gives medians of ratios with quartiles.

    python benchmarks/site.py --rounds 7 --threads 2
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import click
import torch
from torch import nn

from vqguard.quantizer import VectorQuantizer


class Projector(nn.Module):
    """Two linear layers with a GELU between them, as LLaVA-1.5's."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, out), nn.Linear(out, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear_2(nn.functional.gelu(self.linear_1(x)))
        return out


@click.command()
@click.option("--tokens", default=576, help="Visual tokens an image.")
@click.option("--codes", default=16000, help="Entries of the patch codebook.")
@click.option("--width", default=1024, help="Width before the projector.")
@click.option("--out", default=4096, help="Width of the language model.")
@click.option("--rounds", default=7, help="Alternated rounds.")
@click.option("--threads", default=2, help="Threads of torch.")
@click.option("--backend", default="auto", help="Back end of the search.")
@torch.no_grad()
def main(
    tokens: int, codes: int, width: int, out: int, rounds: int, threads: int, backend: str
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    projector = Projector(width, out).eval()
    features = torch.randn(1, tokens, width)
    projected = VectorQuantizer(codes, out, search=backend).eval()
    encoder = VectorQuantizer(codes, width, search=backend).eval()
    table = torch.cat([projector(part) for part in encoder.codebook.weight.split(2000)])
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "unguarded": lambda: projector(features),
        "projected": lambda: projected(projector(features)).output,
        "encoder": lambda: table[encoder.encode(features)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if number >= 2:  # the first rounds warm up
                seconds[name].append(time.perf_counter() - start)
    pairs = (("projected", "unguarded"), ("encoder", "unguarded"), ("encoder", "projected"))
    click.echo(f"{tokens} tokens, {codes} codewords, {width} -> {out}, {threads} threads")
    click.echo("| ratio | median | quartiles |\n| --- | --- | --- |")
    for above, below in pairs:
        ratios = [a / b for a, b in zip(seconds[above], seconds[below], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        click.echo(f"| {above} / {below} | {middle:.2f} | {low:.2f}–{high:.2f} |")
    for name, taken in seconds.items():
        click.echo(f"{name}: median {statistics.median(taken):.3f} s")


if __name__ == "__main__":
    main()
