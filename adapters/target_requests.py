"""The requests of an attack's target as tokens: prompts, and the openings that are aimed at."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vqguard.errors import ConfigError, InputError


class OpeningTokens(NamedTuple):
    """A batch of prompts with their openings behind them, right-padded."""

    ids: Tensor
    """(B, L) int64."""
    mask: Tensor
    """(B, L) int64, 1 at tokens."""
    positions: Tensor
    """(B, T) int64, whose logits predict the opening; its padding repeats the last one."""
    wanted: Tensor
    """(B, T) int64, the opening."""
    real: Tensor
    """(B, T) float32, 1 at the opening's own tokens."""


class EncodedRequests:
    """R prompts with an opening each, tokenised once.

    Args:
        processor: called with `images` and `text`, with a `tokenizer`.
        prompts: as the model reads them.
        openings: what each answer shall begin with.
        probe: a picture of the size that the model takes.
        known: names of the arguments of the model's forward.
        pictures: how many each prompt shows.

    Raises:
        InputError: a prompt with another number of pictures, or an opening without a token.
        ConfigError: a processor that makes more than tokens and pixels.
    """

    def __init__(
        self,
        processor: Any,
        prompts: Sequence[str],
        openings: Sequence[str],
        probe: Image.Image,
        known: Collection[str],
        pictures: int = 1,
    ) -> None:
        self._processor = processor
        self._probe = probe
        self._known = set(known)
        self._pictures = pictures
        tokenizer = processor.tokenizer
        pad = tokenizer.pad_token_id
        self.pad = int(pad if pad is not None else tokenizer.eos_token_id or 0)
        self._prompts = [self.tokens(text, f"prompt {n}") for n, text in enumerate(prompts)]
        # by itself: tokenised with the prompt it could merge over the boundary, while generation
        # starts from the prompt's own tokens
        self._openings = [
            list(tokenizer(opening, add_special_tokens=False)["input_ids"]) for opening in openings
        ]
        for number, tokens in enumerate(self._openings):
            if not tokens:
                raise InputError(
                    f"opening {number} ({openings[number]!r}) has no token; give some text"
                )

    def __len__(self) -> int:
        return len(self._prompts)

    @property
    def longest_opening(self) -> int:
        """In tokens."""
        return max(map(len, self._openings))

    def with_openings(self, rows: Tensor) -> OpeningTokens:
        """Requests (B,) int64 for the loss: no position depends on the batch."""
        pairs = [(self._prompts[row], self._openings[row]) for row in rows.tolist()]
        width = max(len(prompt) + len(opening) for prompt, opening in pairs)
        longest = max(len(opening) for _, opening in pairs)
        ids = torch.full((len(pairs), width), self.pad)
        mask = torch.zeros(len(pairs), width, dtype=torch.long)
        positions = torch.zeros(len(pairs), longest, dtype=torch.long)
        wanted = torch.zeros(len(pairs), longest, dtype=torch.long)
        real = torch.zeros(len(pairs), longest)
        for row, (prompt, opening) in enumerate(pairs):
            end = len(prompt) + len(opening)
            ids[row, :end] = torch.tensor(prompt + opening)
            mask[row, :end] = 1
            # logits at position p predict token p + 1
            own = torch.arange(longest).clamp_max(len(opening) - 1)
            positions[row] = len(prompt) - 1 + own
            wanted[row, : len(opening)] = torch.tensor(opening)
            real[row, : len(opening)] = 1.0
        return OpeningTokens(ids, mask, positions, wanted, real)

    def prompts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, L) int64 of requests (B,) int64, left-padded for generation."""
        return self.left_padded([self._prompts[row] for row in rows.tolist()])

    def left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask (B, L) int64 of token lists."""
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, tokens in enumerate(prompts):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        return ids, mask

    def tokens(self, text: str, name: str) -> list[int]:
        """A prompt's tokens, the pictures' own among them; `name`: what a message calls it."""
        token = getattr(self._processor, "image_token", None)
        if token is not None and text.count(token) != self._pictures:
            wanted = "one" if self._pictures == 1 else str(self._pictures)
            raise InputError(
                f"{name} has {text.count(token)} image tokens {token!r}, expected {wanted}; "
                "write it where the image belongs, or apply the chat template with an image"
            )
        shown = self._probe if self._pictures == 1 else [self._probe] * self._pictures
        out = self._processor(images=shown, text=text, return_tensors="pt")
        extra = (set(out) - {"input_ids", "attention_mask", "pixel_values"}) & self._known
        if extra:
            raise ConfigError(
                f"the processor also makes {sorted(extra)}, which this target does not "
                "differentiate; write a target for this family (loss and succeeded)"
            )
        ids: list[int] = out["input_ids"][0].tolist()
        return ids
