"""Families that are served on an older transformers than their whole proof asks for.

vLLM runs their language model; what has to hold here is what looks at pictures.
"""

from __future__ import annotations

import pytest

from vqguard.adapters.proof.conformance import check
from vqguard.adapters.proof.random_models.build import build_tiny
from vqguard.adapters.proof.random_models.inputs import make_inputs
from vqguard.adapters.vllm_engine.vision_alone import SERVED

# of the rest some say nothing about a family, such as the names of pixels that have only one
NEEDED = {"probe", "codewords", "rows", "batch", "pictures", "covered"}
VISUAL = ("probe", "codewords", "rows", "regional", "batch", "pictures", "covered", "names")


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(SERVED))
def test_the_visual_half_of_a_family_is_proven(kind: str) -> None:
    model = build_tiny(kind)
    report = check(model, make_inputs(model, (1, 2)), only=VISUAL)
    assert not report.failures, str(report)
    assert {result.name for result in report.results if result.status == "passed"} >= NEEDED
