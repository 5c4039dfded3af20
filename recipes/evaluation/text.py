"""Text ability: the language model's perplexity on a fixed text, without any picture."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from vqguard.errors import InputError
from vqguard.recipes.evaluation.ledger import Ledger

WINDOW = 256


@torch.no_grad()
def text_perplexity(
    model: Any, tokenizer: Any, text: str, window: int = WINDOW
) -> tuple[float, int]:
    """The perplexity of a text, exp of the mean cross-entropy (nats), and how many tokens it had.

    The text is cut into windows that do not overlap; the first token of each is not scored.

    Raises:
        InputError: a text of fewer than two tokens.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    model.eval()
    nats, scored = 0.0, 0
    for part in torch.split(ids, window):
        if len(part) < 2:
            continue
        given = part[None].to(model.device)
        logits = model(input_ids=given, use_cache=False).logits[0, :-1].float()
        nats += float(F.cross_entropy(logits, given[0, 1:], reduction="sum"))
        scored += len(part) - 1
    if not scored:
        raise InputError("expected a text of at least two tokens")
    return math.exp(nats / scored), scored


def measure_text(ledger: Ledger, subject: str, model: Any, processor: Any, text: str) -> None:
    """`text_perplexity`; n is the number of scored tokens."""
    value, scored = text_perplexity(model, processor.tokenizer, text)
    ledger.value("text_perplexity", subject, value, scored, window=WINDOW)
