"""The checks of the conformance kit. Each takes an unguarded model in eval mode."""

from __future__ import annotations

from vqguard.adapters.proof.bypass_checks import arguments, codewords, probe
from vqguard.adapters.proof.conformance import Check
from vqguard.adapters.proof.model_checks import gradients, removal, storage, text
from vqguard.adapters.proof.verdict_checks import all_refused, batch, rows

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
