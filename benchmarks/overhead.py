"""The guard's share of a prefill at the true layer shapes of three models.

Weights are random. One layer of the vision tower and one of the language model are timed, and
multiplied by their number: the models themselves do not fit a small machine. Everything is timed
alternately in one process. The peers are the unguarded models.

- `projected`: the guard quantises what the projector returns, on top of everything.
- `encoder`: the guard quantises what the vision tower returns; the projected codewords are a table,
  made once, so that the projector does not run.

Features are Gaussian with variances falling as 1/i, tokens lie at half the codebook's variance from
a codeword; `search.py` has natural ones. Qwen2.5-VL's `encoder` site is taken after its 2 x 2 merge
(5120 numbers), InstructBLIP's after its Q-Former (768), whose cross-attention is left out of the
base: both make the guard's share look larger, not smaller.

    python -m benchmarks.overhead --model llava-1.5-7b --batch 1 --dtype bfloat16 --threads 2
"""

from __future__ import annotations

from typing import NamedTuple

import click
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from benchmarks.features import Projector
from benchmarks.timing import alternate, machine
from vqguard.codebooks.quantizer import VectorQuantizer


class Shape(NamedTuple):
    """Layer shapes of one model, for one image and 64 tokens of text."""

    vision: tuple[int, int, int, int, int]
    """Width, heads, MLP width, layers that run, tokens."""
    between: tuple[int, int, int, int, int]
    """The same of a Q-Former; zero layers: none."""
    projector: tuple[int, int, int]
    """Widths of the projector: in, hidden (0: one layer), out."""
    visual: int
    """Visual tokens of the language model."""
    language: tuple[int, int, int, int, int]
    """Width, heads, key-value heads, MLP width, layers."""


_VICUNA = (4096, 32, 32, 11008, 32)
SHAPES = {
    "llava-1.5-7b": Shape((1024, 16, 4096, 23, 577), (0,) * 5, (1024, 4096, 4096), 576, _VICUNA),
    "qwen2.5-vl-7b": Shape(
        (1280, 16, 3420, 32, 1024), (0,) * 5, (5120, 5120, 3584), 256, (3584, 28, 4, 18944, 28)
    ),
    "instructblip-7b": Shape(
        (1408, 16, 6144, 39, 257), (768, 12, 3072, 12, 32), (768, 0, 4096), 32, _VICUNA
    ),
}
TEXT = 64


def _block(width: int, heads: int, mlp: int) -> nn.Module:
    return nn.TransformerEncoderLayer(width, heads, mlp, 0.0, "gelu", batch_first=True).eval()


def spectral_features(codes: int, dim: int, tokens: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    scale = torch.arange(1, dim + 1).float().rsqrt()
    words = torch.randn(codes, dim, generator=g) * scale
    noise = torch.randn(tokens, dim, generator=g) * scale
    return words, words[torch.randint(codes, (tokens,), generator=g)] + 0.7 * noise


def _level(codes: int, dim: int, tokens: int, dtype: torch.dtype) -> tuple[VectorQuantizer, Tensor]:
    words, queries = spectral_features(codes, dim, tokens)
    level = VectorQuantizer(codes, dim).eval()
    level.codebook.weight.data.copy_(words)
    level.refresh()
    return level, queries.to(dtype)


@click.command()
@click.option("--model", type=click.Choice(list(SHAPES)), default="llava-1.5-7b", help="Shapes.")
@click.option("--batch", default=1, help="Images at once.")
@click.option("--codes", default=16000, help="Entries of the patch codebook.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16")
@click.option("--rounds", default=7, help="Alternated rounds.")
@click.option("--threads", default=1, help="Threads of torch.")
@torch.no_grad()
def main(model: str, batch: int, codes: int, dtype: str, rounds: int, threads: int) -> None:
    """Time the parts of a prefill with and without the guard."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    shape, kind = SHAPES[model], getattr(torch, dtype)
    width, heads, mlp, vision_layers, seen = shape.vision
    hidden, lm_heads, kv_heads, lm_mlp, lm_layers = shape.language
    into, middle, out = shape.projector
    tower = _block(width, heads, mlp).to(kind)
    pixels = torch.randn(batch, seen, width, dtype=kind)
    config = LlamaConfig(
        vocab_size=8, hidden_size=hidden, intermediate_size=lm_mlp, num_hidden_layers=1,
        num_attention_heads=lm_heads, num_key_value_heads=kv_heads,
    )  # fmt: skip
    decoder = LlamaModel(config).eval().to(kind)
    prompt = torch.randn(batch, shape.visual + TEXT, hidden, dtype=kind)
    projector: nn.Module = nn.Linear(into, out) if not middle else _projector(into, middle, out)
    projector = projector.eval().to(kind)
    tokens = batch * shape.visual
    before = torch.randn(tokens, into, dtype=kind)
    projected, late = _level(codes, out, tokens, kind)
    encoder, early = _level(codes, into, tokens, kind)
    table = torch.cat([projector(part.to(kind)) for part in encoder.codebook.weight.split(2000)])
    projected(late), encoder(early)  # prepares and calibrates
    ways = {
        "vision": lambda: tower(pixels),
        "language": lambda: decoder(inputs_embeds=prompt, use_cache=False),
        "projector": lambda: projector(before),
        "projected": lambda: projected(late).output,
        "encoder": lambda: table[encoder.encode(early)],
    }
    if shape.between[3]:
        middle_block = _block(*shape.between[:3]).to(kind)
        queries = torch.randn(batch, shape.between[4], shape.between[0], dtype=kind)
        ways["between"] = lambda: middle_block(queries)
    seconds = alternate(ways, rounds)
    click.echo(f"\n{machine()}\n{model}, batch {batch}, {dtype}, {codes} codewords")
    searches = {
        name: level.calibration for name, level in (("projected", projected), ("encoder", encoder))
    }
    click.echo(
        "; ".join(f"{name}: {one.backend if one else 'torch'}" for name, one in searches.items())
    )
    rows = zip(*(seconds.get(name, [0.0] * rounds) for name in (*ways, "between")), strict=True)
    names = [*ways, "between"]
    change: dict[str, list[float]] = {"projected": [], "encoder": []}
    total = 0.0
    for row in rows:
        took = dict(zip(names, row, strict=True))
        base = took["vision"] * vision_layers + took["language"] * lm_layers + took["projector"]
        base += took["between"] * shape.between[3]
        total += base / rounds
        change["projected"].append(100 * took["projected"] / base)
        change["encoder"].append(100 * (took["encoder"] - took["projector"]) / base)
    click.echo(f"unguarded prefill, extrapolated: {total:.2f} s")
    for site, values in change.items():
        values.sort()
        low, high = values[rounds // 4], values[-1 - rounds // 4]
        click.echo(f"| {site} | {values[rounds // 2]:+.2f} % ({low:+.2f} to {high:+.2f}) |")
    for name, taken in seconds.items():
        click.echo(f"  {name}: median {1e3 * sorted(taken)[rounds // 2]:.1f} ms")


def _projector(into: int, middle: int, out: int) -> nn.Module:
    if middle == out:
        return Projector(into, out)
    return nn.Sequential(nn.Linear(into, middle), nn.GELU(), nn.Linear(middle, out))


if __name__ == "__main__":
    main()
