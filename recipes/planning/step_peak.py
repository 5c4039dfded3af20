"""Peak memory of one training step, read off the step itself on the meta device.

Nothing is computed and nothing is allocated: tensors on the meta device have shapes only. The step
runs its real modules, and a mode counts the bytes of every storage while it lives. What autograd
saves, what checkpointing saves not and which copies the loss makes are therefore found, not
assumed; a formula of one's own would have to be kept true for every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vqguard.adapters.base import Adapter
from vqguard.codebooks.losses import semantic_loss
from vqguard.codebooks.quantizer import straight_through
from vqguard.guard import VQGuard
from vqguard.recipes.planning.heap import Event
from vqguard.recipes.planning.layers import alike_layers, deep_peak, few_layers
from vqguard.recipes.planning.live_bytes import LiveBytes


@contextmanager
def fused_attention() -> Iterator[None]:
    """Inside, attention is what the fused kernels do: inputs, output, one float32 a row are saved.

    On the meta device torch would take the kernel that writes the (T, T) scores down. The function
    is exchanged, as modes do not reach what checkpointing recomputes in the backward pass.
    """
    functional: Any = torch.nn.functional
    before = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = _fused
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = before


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, scale=scale
    )[0]
    return result


@contextmanager
def without_search(guard: VQGuard) -> Iterator[None]:
    """Inside, codes are shapes only: which codeword is nearest does not matter to memory."""
    levels = [guard.patch, guard.semantic, *guard.deep]

    def encode(x: Tensor) -> Tensor:
        return torch.empty(x.shape[:-1], dtype=torch.int64, device=x.device)

    for level in levels:
        held: Any = level
        held.encode = encode
        held.codebook.count = lambda indices: None
    try:
        yield
    finally:
        for level in levels:
            held = level
            del held.encode, held.codebook.count


class StepShape:
    """What a device holds at a time: `samples` of `tokens` each, `visual` of them visual."""

    def __init__(self, samples: int, tokens: int, visual: int) -> None:
        self.samples = samples
        self.tokens = tokens
        self.visual = min(visual, tokens)


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass adds to what is held all the time, in bytes.

    `events` are its blocks in their order, where they were asked for; gradients that are left at
    its end are not freed.
    """

    peak: int
    events: tuple[Event, ...] = ()


def step_peak(
    model: nn.Module,
    adapter: Adapter,
    shape: StepShape,
    *,
    stage: int,
    accumulate: bool,
    history: bool = True,
) -> Step:
    """One forward and backward pass.

    Gradients of parameters are part of it unless `accumulate`, where they are held already. The
    frozen vision encoder is not: it has given its memory back before the language model runs.
    Without `history` a few of many layers are run where that gives the same peak.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter) if accumulate else None
    layers = None if history else alike_layers(model, adapter.language_model(model))
    try:
        if layers is not None:
            live = LiveBytes()
            with few_layers(layers, lambda: len(live.events)) as marks:
                _run(live, model, adapter, shape, stage)
            peak = deep_peak(live.events, marks, len(layers[2]))
            if peak is not None:
                return Step(peak)
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter) if accumulate else None
        live = LiveBytes()
        _run(live, model, adapter, shape, stage)
        return Step(live.peak, tuple(live.events) if history else ())
    finally:
        for parameter in trained:
            parameter.grad = None


def _run(live: LiveBytes, model: nn.Module, adapter: Adapter, shape: StepShape, stage: int) -> None:
    with live, fused_attention():
        loss = _stage1(model, adapter, shape) if stage == 1 else _stage2(model, adapter, shape)
        loss.backward()


def _stage1(model: nn.Module, adapter: Adapter, shape: StepShape) -> Tensor:
    held: Any = model
    guard: VQGuard = held.vqguard
    dtype = next(adapter.language_model(model).parameters()).dtype
    width, site = guard.config.patch_dim, guard.config.site
    tokens = _floats(shape.samples, shape.visual, width, dtype=dtype).requires_grad_()
    semantic = _floats(shape.samples, 1, guard.config.semantic_dim, dtype=dtype).requires_grad_()
    tokens, semantic = tokens * 1, semantic * 1  # the projector's output, which is no leaf
    deep = [tokens for _ in guard.deep]
    with without_search(guard), straight_through(guard):
        output = guard(tokens, semantic, deep)
    visual: Tensor = output.tokens
    if site == "encoder":
        visual = _floats(shape.samples, shape.visual, _text_width(model), dtype=dtype)
        visual = visual.requires_grad_() * 1
    loss = _language(model, adapter, shape, visual)
    if output.losses is not None:
        loss = loss + output.losses.total()
    if site == "projected":
        # The caption's states come from a pass without gradients, which is over by now.
        caption = _floats(shape.samples, guard.config.semantic_dim, dtype=dtype)
        loss = loss + semantic_loss(output.semantic_tokens.mean(1), caption)
    return loss


def _stage2(model: nn.Module, adapter: Adapter, shape: StepShape) -> Tensor:
    dtype = next(adapter.language_model(model).parameters()).dtype
    visual = _floats(shape.samples, shape.visual, _text_width(model), dtype=dtype)
    return _language(model, adapter, shape, visual)


def _language(model: nn.Module, adapter: Adapter, shape: StepShape, visual: Tensor) -> Tensor:
    """The language model's loss with `visual` in the first positions."""
    held: Any = model
    language: Any = adapter.language_model(model)
    ids = _ids(shape.samples, shape.tokens)
    embedded: Tensor = language.get_input_embeddings()(ids)
    mask = torch.empty(shape.samples, shape.tokens, 1, dtype=torch.bool, device="meta")
    embedded = embedded.masked_scatter(mask.expand_as(embedded), visual.to(embedded.dtype))
    seen = torch.empty(
        shape.samples, 1, shape.tokens, shape.tokens, dtype=torch.bool, device="meta"
    )
    output = language(inputs_embeds=embedded, attention_mask=seen, use_cache=False)
    logits = getattr(output, "logits", None)
    if logits is None:
        logits = held.get_output_embeddings()(output.last_hidden_state)
    vocabulary = int(held.config.get_text_config().vocab_size)
    loss: Callable[..., Tensor] = held.loss_function
    return loss(logits=logits, labels=ids, vocab_size=vocabulary)


def _text_width(model: nn.Module) -> int:
    held: Any = model
    return int(held.config.get_text_config().hidden_size)


def _ids(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _floats(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
