"""The search on a GPU: against a plain product, and as a share of a prefill on the same card.

    python -m benchmarks.search_cuda            # a minute or two, 16 GB
    python -m benchmarks.search_cuda --rounds 50 --no-prefill

The prefill is that of LLaVA-1.5-7B's language model, in bfloat16 with random weights: 32 layers,
576 visual tokens and 64 of text. Its vision tower is left out, so that the search's share looks
larger. Times are medians of alternated rounds, between events in the stream of the card. Features
are Gaussian: those of `overhead.py`, with variances falling as 1/i, and white ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from benchmarks.overhead import SHAPES, TEXT, spectral_features
from benchmarks.timing import shown
from vqguard.search import CodewordSearch, calibrate, make_search
from vqguard.search.settle import squared_norms
from vqguard.search.tensor_cores import TensorCoreSearch
from vqguard.search.timing import seconds_of
from vqguard.search.tuning import machine, usable

_WARM = 3
PLAIN = "product and argmin"
PREFILL = "prefill"


class Sizes(NamedTuple):
    """What is searched and what is prefilled."""

    language: tuple[int, int, int, int, int] = SHAPES["llava-1.5-7b"].language
    """Width, heads, key-value heads, MLP width, layers."""
    visual: int = SHAPES["llava-1.5-7b"].visual
    text: int = TEXT
    codes: int = 16000
    dims: tuple[int, ...] = (1024, 4096)
    """Widths of the codewords: of the vision tower and of the language model."""


def prefill(sizes: Sizes, device: torch.device) -> Callable[[], Any]:
    """One prefill of the language model with random bfloat16 weights, for one image and a text."""
    width, heads, kv_heads, mlp, layers = sizes.language
    config = LlamaConfig(
        vocab_size=8, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, dtype=torch.bfloat16,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaModel(config).eval()
    finally:
        torch.set_default_dtype(before)
    prompt = torch.randn(1, sizes.visual + sizes.text, width, dtype=torch.bfloat16, device=device)
    return lambda: model(inputs_embeds=prompt, use_cache=True).last_hidden_state


def searches(words: Tensor, queries: Tensor) -> dict[str, CodewordSearch]:
    """Every back end that runs on the device of `words`, by its name."""
    kinds = [kind for kind in usable(words.device.type) if kind.devices != ("cpu",)]
    made = {kind.name: kind(words) for kind in kinds}
    made["auto"] = make_search(words, "auto", calibrate(words, queries.float()))
    return made


def plain(words: Tensor) -> Callable[[Tensor], Tensor]:
    """What is written without a library: float32 scores of all codewords, and the least of them."""
    norms = squared_norms(words).float()
    return lambda x: torch.addmm(norms, x.float(), words.T, alpha=-2.0).argmin(dim=1)


def alternate_on(
    device: torch.device, ways: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each way in each of `rounds` rounds on `device`, after three that warm up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + _WARM):
        for name, way in ways.items():
            passed = seconds_of(way, device)
            if number >= _WARM:
                taken[name].append(passed)
    return taken


def features(kind: str, codes: int, dim: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Codewords (codes, dim) and tokens (tokens, dim) of this kind."""
    if kind == "falling":
        return spectral_features(codes, dim, tokens)
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(codes, dim, generator=generator)
    return words, torch.randn(tokens, dim, generator=generator)


def table(
    kind: str,
    dim: int,
    sizes: Sizes,
    model: Callable[[], Any] | None,
    rounds: int,
    device: torch.device,
) -> list[str]:
    """Lines of a table: each search by name, its time, ratio, share and differing answers."""
    words, queries = (part.to(device) for part in features(kind, sizes.codes, dim, sizes.visual))
    x = queries.to(torch.bfloat16)
    made = searches(words, x)
    ways: dict[str, Callable[[], Any]] = {name: partial(one, x) for name, one in made.items()}
    ways[PLAIN] = partial(plain(words), x)
    if model is not None:
        ways[PREFILL] = model
    taken = alternate_on(device, ways, rounds)
    truth = made["torch"](x)
    lines = [
        f"\n{kind}, d {dim}, {sizes.codes} codewords, {sizes.visual} tokens",
        f"auto is {made['auto'].name}{_decided(made, x)}\n",
        "| search | ms | time / product and argmin | % of the prefill | differ from torch |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in (*made, PLAIN):
        answers = made[name](x) if name in made else ways[name]()
        share = f"{_share(taken[name], taken[PREFILL]):.2f}" if model else "not measured"
        lines.append(
            f"| {name} | {1e3 * statistics.median(taken[name]):.3f}"
            f" | {shown(taken[name], taken[PLAIN])} | {share} | {int((answers != truth).sum())} |"
        )
    if model:
        lines.append(f"| prefill | {1e3 * statistics.median(taken[PREFILL]):.3f} | | 100 | |")
    return lines


def _share(search: list[float], whole: list[float]) -> float:
    return 100.0 * statistics.median(a / b for a, b in zip(search, whole, strict=True))


def _decided(made: Mapping[str, CodewordSearch], x: Tensor) -> str:
    search = made.get(TensorCoreSearch.name)
    if not isinstance(search, TensorCoreSearch):
        return ""
    one, few, left = search.decided(x)
    return f"; tokens with one candidate {one}, with a few {few}, left to the dense search {left}"


@click.command()
@click.option("--rounds", default=20, help="Alternated rounds.")
@click.option("--with-prefill/--no-prefill", default=True, help="Needs 14 GB of GPU memory.")
@torch.no_grad()
def cuda(rounds: int, with_prefill: bool) -> None:
    """The search on a GPU, and its share of LLaVA-1.5-7B's prefill."""
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible; nothing was measured")
    device = torch.device("cuda", torch.cuda.current_device())
    click.echo(f"{machine(device)}, torch {torch.__version__}")
    torch.manual_seed(0)
    sizes = Sizes()
    model = prefill(sizes, device) if with_prefill else None
    for dim in sizes.dims:
        for kind in ("falling", "white"):
            for line in table(kind, dim, sizes, model, rounds, device):
                click.echo(line)


if __name__ == "__main__":
    cuda()
