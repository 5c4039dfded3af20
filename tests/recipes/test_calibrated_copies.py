"""`calibrate` on a guard that judges noisy copies: its budget is that of the majority."""

from __future__ import annotations

from typing import Any

import torch

from vqguard.adapters import build_guard, guard_model
from vqguard.judging.evidence import held_out_half
from vqguard.judging.rules import JudgeRules
from vqguard.recipes.calibrate import calibrate_model
from vqguard.recipes.image_batches import collect_features, copied_features, screen_images
from vqguard.recipes.tiny.weights import load_base
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.safety_map import NEUTRAL


def smoothing_model(images: list[tuple[str, Any]]) -> tuple[Any, Any]:
    model, processor = load_base()
    guard = build_guard(
        model,
        patch_codes=16,
        semantic_codes=24,
        judge="global",
        smoothing={"copies": 3, "noise": 0.5},
        search="torch",
    ).eval()
    guard_model(model, guard, processor)
    _, semantic = collect_features(model, processor, [image for _, image in images[::4]])
    guard.semantic.codebook.start_from(semantic, "sample")
    return model, processor


def test_the_copies_are_counted_and_the_one_in_the_middle_chooses_the_threshold() -> None:
    images = list(TinyWorld().calibration(6, 60))
    model, processor = smoothing_model(images)
    rules = JudgeRules(unfamiliar=0.1, unfamiliar_by="visual")
    result = calibrate_model(model, processor, iter(images), tau=None, fpr=0.2, rules=rules)
    neutral = torch.tensor([name == NEUTRAL for name, _ in images])
    held_out = held_out_half(neutral, seed=0).tolist()
    verdicts = screen_images(model, processor, [images[n][1] for n in held_out])
    measured = result.map.false_positives
    assert measured is not None
    assert (measured.flagged, measured.n) == (sum(v.flagged for v in verdicts), len(held_out))
    # what is counted is a copy of each image
    counted = [n for n in range(len(images)) if n not in held_out]
    first = next(copied_features(model, processor, [images[n][1] for n in counted]))
    codes = model.vqguard.encode_semantic(first.semantic).flatten()
    assert torch.equal(result.map.counts.sum(dim=1), codes.bincount(minlength=24))
    # and the distance is the median of the copies'
    known = result.map.judging.unfamiliar
    assert known is not None
    said = [
        v.reason is not None and "unfamiliar" in (v.category, *v.reason.also)
        for (name, _), v in zip(
            images, screen_images(model, processor, [image for _, image in images]), strict=True
        )
        if name == NEUTRAL
    ]
    assert (sum(said), len(said)) == (known.flagged, known.n)
