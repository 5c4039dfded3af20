"""What neutral images are called, where a judge can call them unfamiliar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.safety_map import UNFAMILIAR, SafetyMap, Verdict


def record_names(
    ledger: Ledger, judged_by: SafetyMap | None, verdicts: Sequence[Verdict], **condition: Any
) -> None:
    """Enter how many neutral images are called unfamiliar, and how many flagged and called toxic.

    Nothing where the map calls no image unfamiliar: then all that is flagged is called toxic.
    """
    if judged_by is None or judged_by.judging.unfamiliar is None:
        return
    unfamiliar = [verdict.category == UNFAMILIAR for verdict in verdicts]
    called = [v.flagged and not strange for v, strange in zip(verdicts, unfamiliar, strict=True)]
    ledger.rate("unfamiliar", "guarded", unfamiliar, **condition)
    ledger.rate("called_toxic", "guarded", called, **condition)
