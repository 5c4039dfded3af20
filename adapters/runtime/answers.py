"""Answers that are fixed before the model runs: refusals, and how an answer begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessor
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

_DEFAULT_NEW_TOKENS = 20  # what generate uses when no length is set anywhere


@dataclass(frozen=True)
class Settings:
    """The generation settings that a refusal depends on."""

    expand: int
    beams: int
    new_tokens: int
    eos: int | None
    pad: int | None
    as_dict: bool
    scores: bool
    streamer: Any

    @classmethod
    def read(cls, model: Any, call: Mapping[str, Any], prompt_length: int) -> Settings:
        """As `generate` resolves them: the call, then its config, then the `model`'s config."""
        sources = [call.get("generation_config"), model]

        def setting(name: str, default: Any = None) -> Any:
            if call.get(name) is not None:
                return call[name]
            values = (getattr(source, name, None) for source in sources if source is not None)
            return next((value for value in values if value is not None), default)

        new_tokens = setting("max_new_tokens")
        if new_tokens is None:
            total = setting("max_length")
            new_tokens = _DEFAULT_NEW_TOKENS if total is None else max(total - prompt_length, 0)
        eos, pad = _first(setting("eos_token_id")), _first(setting("pad_token_id"))
        beams = int(setting("num_beams", 1))
        return cls(
            expand=int(setting("num_return_sequences", 1)),
            beams=beams,
            new_tokens=int(new_tokens),
            eos=eos,
            pad=eos if pad is None else pad,
            as_dict=bool(setting("return_dict_in_generate", False)),
            scores=bool(setting("output_scores", False)),
            streamer=call.get("streamer"),
        )


def _first(token: Any) -> int | None:
    if isinstance(token, Tensor):
        token = token.flatten().tolist()
    if isinstance(token, (list, tuple)):
        token = token[0] if token else None
    return None if token is None else int(token)


class ForcedTokens(LogitsProcessor):
    """Forces what rows say, whatever the decoding strategy: a refusal, or how an answer begins."""

    def __init__(self, batch: int, forced: Mapping[int, Sequence[int]]) -> None:
        """`forced`: by row, its tokens; after them, and in other rows, the model goes on."""
        self.batch = batch
        self.forced = forced
        self.start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.start is None:
            self.start = input_ids.shape[1]
        step, beams = input_ids.shape[1] - self.start, len(input_ids) // self.batch
        rows = {row: said[step] for row, said in self.forced.items() if step < len(said)}
        if not rows:
            return scores
        scores = scores.clone()
        for row, token in rows.items():
            beam = slice(row * beams, (row + 1) * beams)
            scores[beam] = float("-inf")
            scores[beam, token] = 0.0
        return scores


def refusal_output(
    model: Any, prompt: Tensor, refusals: list[list[int]], settings: Settings
) -> Any:
    """What `generate` returns when every row refuses: prompts, each followed by its refusal.

    `refusals`: one a row, all of one length.
    """
    sequences = prompt.repeat_interleave(settings.expand, dim=0)
    answer = sequences.new_tensor(refusals).repeat_interleave(settings.expand, dim=0)
    if settings.streamer is not None:
        settings.streamer.put(sequences.cpu())
        for column in answer.T:
            settings.streamer.put(column.cpu())
        settings.streamer.end()
    sequences = torch.cat([sequences, answer], dim=1)
    if not settings.as_dict:
        return sequences
    scores = None
    if settings.scores:
        width = model.config.get_text_config().vocab_size
        times = max(settings.expand, settings.beams)
        forced = torch.tensor(refusals, device=prompt.device).repeat_interleave(times, dim=0)
        scores = tuple(_forced(column, width) for column in forced.T)
    output: dict[str, Any] = {"sequences": sequences, "scores": scores}
    if settings.beams == 1:
        return GenerateDecoderOnlyOutput(**output)
    if settings.scores:
        output["sequences_scores"] = torch.zeros(len(sequences), device=prompt.device)
    return GenerateBeamDecoderOnlyOutput(**output)


def _forced(tokens: Tensor, width: int) -> Tensor:
    scores = torch.full((len(tokens), width), float("-inf"), device=tokens.device)
    return scores.scatter_(1, tokens[:, None], 0.0)
