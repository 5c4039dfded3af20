"""The last layer is computed where its logits are read, and gives there what it always gave."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from vqguard.adapters.passes.where_read import only_where_read

IDS = torch.arange(24).remainder(50).reshape(2, 12)
READ = torch.zeros(2, 12, dtype=torch.bool)
READ[0, 3:6] = READ[1, 8:] = True
MASK = torch.ones_like(IDS)
MASK[0, 9:] = 0


def step(model: Any, *, short: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a loss that reads them at `READ`."""
    model.zero_grad()
    with only_where_read(model, READ) if short else nullcontext():
        logits = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    logits[READ].float().log_softmax(-1)[:, 7].sum().backward()
    slopes = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), slopes


def rows_seen(module: nn.Module, call: Callable[[], object]) -> list[int]:
    seen: list[int] = []
    hook = module.register_forward_hook(
        lambda _, args, __: seen.append(args[0].numel() // args[0].shape[-1])
    )
    call()
    hook.remove()
    return seen


def test_logits_and_gradients_are_those_of_the_whole_pass(make_llava: Callable[..., Any]) -> None:
    model = make_llava()
    whole, slopes = step(model, short=False)
    short, same = step(model, short=True)
    assert torch.allclose(short[READ], whole[READ], atol=1e-5 * float(whole.abs().max()))
    assert not short[~READ].any()
    assert same.keys() == slopes.keys()
    for name, slope in slopes.items():
        assert torch.allclose(same[name], slope, rtol=1e-4, atol=1e-6 * float(slope.abs().max())), (
            name
        )


def test_the_last_layer_alone_sees_fewer_positions_and_only_inside(
    make_llava: Callable[..., Any],
) -> None:
    model = make_llava()
    first, last = model.model.language_model.layers
    for layer, wanted in ((first, READ.numel()), (last, int(READ.sum()))):
        product = layer.mlp.down_proj
        assert rows_seen(product, lambda: step(model, short=True)) == [wanted]
    keys = last.self_attn.k_proj
    assert rows_seen(keys, lambda: step(model, short=True)) == [READ.numel()]
    assert rows_seen(last.mlp.down_proj, lambda: step(model, short=False)) == [READ.numel()]


def test_other_lengths_and_other_decoders_are_computed_as_ever(
    make_llava: Callable[..., Any],
) -> None:
    model = make_llava()
    with torch.no_grad():
        whole = model(input_ids=IDS[:, :5]).logits
        with only_where_read(model, READ):
            assert torch.equal(model(input_ids=IDS[:, :5]).logits, whole)
    torch.manual_seed(0)
    other: Any = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50)).eval()
    with torch.no_grad(), only_where_read(other, READ):
        assert other(input_ids=IDS).logits[~READ].any()


@pytest.mark.parametrize("reads", [True, False])
def test_reading_nothing_is_no_error(make_llava: Callable[..., Any], reads: bool) -> None:
    model = make_llava()
    read = torch.zeros_like(READ) if not reads else torch.ones_like(READ)
    with torch.no_grad(), only_where_read(model, read):
        logits = model(input_ids=IDS).logits
    assert bool(logits.any()) == reads
