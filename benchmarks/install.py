"""What installing the guard costs on a 7B-shaped LLaVA-1.5 on the meta device.

    python -m benchmarks.install

Prints the seconds of `guard_model` (median of five installs, the guard built before), and whether
every parameter is still the same object: nothing is copied.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch


def shaped_7b() -> Any:
    """LLaVA-1.5-7B without its weights."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(vocab_size=32064)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def main() -> None:
    from vqguard.adapters import build_guard, guard_model, unguard_model

    model = shaped_7b()
    count = sum(p.numel() for p in model.parameters())
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    guard = build_guard(model)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        guard_model(model, guard)
        seconds.append(time.perf_counter() - started)
        after = {n: id(p) for n, p in model.named_parameters() if not n.startswith("vqguard.")}
        unguard_model(model)
        assert after == before
    print(f"{count / 1e9:.2f} B parameters, {len(before)} tensors, none copied")
    print(f"guard_model: {statistics.median(seconds):.3f} s (median of {len(seconds)} installs)")


if __name__ == "__main__":
    main()
