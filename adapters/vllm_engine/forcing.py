"""Logits processors that have a request say what admission found that it must say.

vLLM has two model runners with an interface each, and one list of plugins for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import LogitsProcessor as FirstLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor.interface import (
    LogitsProcessor as SecondLogitsProcessor,
)

from vqguard.adapters.storage.manifest import read_manifest
from vqguard.adapters.vllm_engine.admission import STAMP
from vqguard.adapters.vllm_engine.configuration import folder_of, is_guarded


class ForcedAnswers(FirstLogitsProcessor, SecondLogitsProcessor):  # type: ignore[misc]
    """What vLLM finds by entry point; it makes the one that fits the model runner."""

    def __new__(cls, vllm_config: Any, *rest: Any) -> Any:
        """`rest`: (device, pinned) from the first runner, (request states,) from the second."""
        must_say = MustSay(vllm_config)
        return OfFirstRunner(must_say) if len(rest) == 2 else OfSecondRunner(must_say, *rest)


class MustSay:
    """What each request must say, by what vLLM's workers are told of it."""

    def __init__(self, vllm_config: Any) -> None:
        """Of a model without a guard nothing is asked."""
        model = vllm_config.model_config
        self.guarded = is_guarded(model)
        self._unstamped: tuple[int, ...] = ()
        if self.guarded:
            self._unstamped = read_manifest(folder_of(model)).refusal_ids

    def tokens(self, params: Any) -> Sequence[int]:
        """A request that nobody stamped refuses, as far as it goes."""
        if not self.guarded:
            return ()
        stamp = (params.extra_args or {}).get(STAMP)
        if stamp is None:
            end = params._eos_token_id
            ends = () if end is None else (end,)
            return (*self._unstamped, *ends * max(1, params.max_tokens or 1))
        return tuple(stamp)


class OfFirstRunner(FirstLogitsProcessor):  # type: ignore[misc]
    """Keyed by a request's place in the batch, which moves."""

    def __init__(self, must_say: MustSay) -> None:
        self._must_say = must_say
        self._said: dict[int, tuple[Sequence[int], list[int]]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self._said, batch_update, self._entry)

    def _entry(
        self, params: Any, prompt: list[int] | None, output: list[int]
    ) -> tuple[Sequence[int], list[int]] | None:
        tokens = self._must_say.tokens(params)
        return (tokens, output) if tokens else None

    def apply(self, logits: Tensor) -> Tensor:
        for row, (tokens, output) in self._said.items():
            if len(output) < len(tokens):
                _force(logits, row, tokens[len(output)])
        return logits


class OfSecondRunner(SecondLogitsProcessor):  # type: ignore[misc]
    """Keyed by a request's slot, which stays."""

    def __init__(self, must_say: MustSay, states: Any) -> None:
        self._must_say = must_say
        self._states = states
        self._said: dict[int, Sequence[int]] = {}

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        tokens = self._must_say.tokens(sampling_params)
        self._said.pop(req_idx, None)
        if tokens:
            self._said[req_idx] = tokens
        return bool(tokens)

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            tokens = self._said.get(slot)
            if tokens is None:
                continue
            # without speculative decoding a request has one row, and its length is exact
            step = int(ctx.seq_lens_upper_bound_np[row]) - int(self._states.prompt_len.np[slot])
            if 0 <= step < len(tokens):
                _force(logits, row, tokens[step])
        return logits


def _force(logits: Tensor, row: int, token: int) -> None:
    logits[row] = float("-inf")
    logits[row, token] = 0.0
