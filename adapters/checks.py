"""The checks of the conformance kit. Each takes an unguarded model in eval mode."""

from __future__ import annotations

from vqguard.adapters.checks_bypass import arguments, codewords, probe
from vqguard.adapters.checks_model import gradients, removal, storage, text
from vqguard.adapters.checks_verdicts import all_refused, batch, rows
from vqguard.adapters.conformance import Check

CHECKS: dict[str, Check] = {
    "probe": probe,
    "codewords": codewords,
    "rows": rows,
    "all refused": all_refused,
    "batch": batch,
    "removal": removal,
    "storage": storage,
    "gradients": gradients,
    "text": text,
    "arguments": arguments,
}
