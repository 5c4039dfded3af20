"""A decoder's last layer computed only where its answer is read.

Behind the keys and values of the last layer no position looks at another: queries, the two products
behind attention and the head are needed where a loss reads the logits, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaModel

from vqguard.adapters.runtime.taps import tapping


@contextmanager
def only_where_read(model: nn.Module, read: Tensor) -> Iterator[None]:
    """Inside, in this thread, the logits of `model` count only where `read` (B, L) bool is True.

    There they are the same as outside, and so are gradients but for the order of sums. Elsewhere
    they are zeros, and what the last layer gives is meaningless. Only decoders that are known to be
    so have a shorter way (Llama's); others, and inputs of another length, are computed as ever. The
    backward pass may run after the block, unless it computes activations again.
    """
    rows = read.flatten().nonzero().flatten()

    def shortened(
        original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        states = args[0] if args else None
        if not isinstance(states, Tensor) or states.shape[:-1] != read.shape:
            return original(*args, **kwargs)
        answer = original(states.flatten(0, 1).index_select(0, rows), *args[1:], **kwargs)
        whole = answer.new_zeros(read.numel(), answer.shape[-1])
        return whole.index_copy(0, rows, answer).unflatten(0, read.shape)

    with tapping(dict.fromkeys(_by_position(model), shortened)):
        yield


def _by_position(model: nn.Module) -> list[nn.Module]:
    """Modules of the last layer and behind it, each of which takes every position by itself."""
    decoders = [module for module in model.modules() if isinstance(module, LlamaModel)]
    if len(decoders) != 1:
        return []
    last: Any = decoders[0].layers[-1]
    head = model.get_output_embeddings()  # type: ignore[operator]
    own = [last.self_attn.q_proj, last.self_attn.o_proj, last.mlp]
    return [*own, head] if isinstance(head, nn.Module) else own
