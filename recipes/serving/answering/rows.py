"""One request's row of a batch: how its tokens are chosen, and when it has ended.

A row is what it would be alone. Its randomness is its own, its length and its stops too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from vqguard.safety_map import Verdict

End = Literal["stop", "length"]


@dataclass(frozen=True)
class Choosing:
    """How a request's tokens are chosen, and where its answer ends."""

    new_tokens: int
    temperature: float = 0.0
    """0: the likeliest token."""
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends."""


@dataclass(eq=False)
class Row:
    """A request that is being answered."""

    choosing: Choosing
    deadline: float
    """By `time.monotonic`."""
    decode: Callable[[Sequence[int]], str]
    cancelled: bool = False
    """Nobody waits for the answer."""
    tokens: list[int] = field(default_factory=list)
    """The answer until now, without its end."""
    end: End | None = None
    verdicts: list[Verdict] = field(default_factory=list)
    map_version: str = ""

    def add(self, token: int, ends: frozenset[int]) -> bool:
        """Take the next token; whether it belongs to the answer."""
        if token in ends:
            self.end = "stop"
            return False
        self.tokens.append(token)
        if self.choosing.stop and cut_at(self.decode(self.tokens), self.choosing.stop)[1]:
            self.end = "stop"
        elif len(self.tokens) >= self.choosing.new_tokens or time.monotonic() > self.deadline:
            self.end = "length"
        return True

    @property
    def open(self) -> bool:
        """Whether it takes tokens."""
        return self.end is None and not self.cancelled

    @property
    def refused(self) -> bool:
        """Whether the answer is a refusal."""
        return any(verdict.action == "refuse" for verdict in self.verdicts)

    def text(self) -> str:
        """The whole answer."""
        return cut_at(self.decode(self.tokens), self.choosing.stop)[0]


def cut_at(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of `stops` in it, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class OwnChoices(LogitsProcessor):
    """Leaves each sampling row the token that its own randomness chooses, for greedy decoding.

    The Gumbel-max trick: the largest of logits plus Gumbel noise is a sample of their softmax.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows
        self._random = {
            number: _generator(row.choosing.seed)
            for number, row in enumerate(rows)
            if row.choosing.temperature > 0
        }

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self._random:
            return scores
        scores = scores.clone()
        for number, generator in self._random.items():
            choosing = self.rows[number].choosing
            logits = scores[number].double().cpu() / choosing.temperature
            kept = nucleus(logits, choosing.top_p)
            noise = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
            drawn = logits - torch.log(-torch.log(noise.clamp_min(1e-300)))
            token = int(drawn.masked_fill(~kept, -torch.inf).argmax())
            scores[number] = -torch.inf
            scores[number, token] = 0.0
        return scores


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Bool (V,): the fewest likeliest tokens that have `top_p` of the probability together."""
    if top_p >= 1:
        return torch.ones_like(logits, dtype=torch.bool)
    ordered, places = logits.softmax(-1).sort(descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept[places[before < top_p]] = True
    return kept


class RowEnds(StoppingCriteria):
    """Hands each row its tokens, and ends it where it has ended."""

    def __init__(
        self,
        rows: Sequence[Row],
        ends: frozenset[int],
        told: Callable[[Row, int | None], None],
        begins: Callable[[], None],
    ) -> None:
        """`told(row, token)` is called for each token of an answer, and with None at its end.

        `begins()` is called once, before the first token is handed on.
        """
        self.rows = rows
        self.ends = ends
        self.told = told
        self.begins = begins
        self.begun = False

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if not self.begun:
            self.begins()
            self.begun = True
        for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True):
            take(row, token, self.ends, self.told)
        done = [not row.open for row in self.rows]
        return torch.tensor(done, device=input_ids.device)


def take(
    row: Row, token: int, ends: frozenset[int], told: Callable[[Row, int | None], None]
) -> None:
    """Give a row that has not ended its next token."""
    if not row.open:
        return
    if row.add(token, ends):
        told(row, token)
    if row.end is not None:
        told(row, None)


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed % 2**63)
    return generator
