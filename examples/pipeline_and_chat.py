"""A guarded model in transformers' own pipeline, with chat messages.

python examples/pipeline_and_chat.py
"""

from __future__ import annotations

from typing import Any

from transformers import pipeline

from vqguard import build_guard, guard_model
from vqguard.recipes.calibrate import calibrate_model
from vqguard.recipes.image_batches import collect_features
from vqguard.recipes.tiny.weights import load_base
from vqguard.recipes.tiny.world import TinyWorld


def main() -> None:
    model: Any
    model, processor = load_base()
    world = TinyWorld(seed=1)
    guard = build_guard(
        model, patch_codes=512, semantic_codes=64, refusal_text="sorry , i cannot help with that ."
    )
    guard_model(model, guard, processor)
    pictures = [sample.image() for sample in world.captions(300) if sample.image]
    patches, semantic = collect_features(model, processor, pictures)
    guard.patch.codebook.start_from(patches)
    guard.semantic.codebook.start_from(semantic)
    calibrate_model(model, processor, world.calibration(25, 300), tau=0.6, fpr=None)

    ask: Any = pipeline("image-text-to-text", model=model, processor=processor)
    gun = next(iter(world.toxic_images("gun", 0, 1)))
    neutral = next(iter(world.neutral_images((1, 1), 1)))
    for name, image in (("toxic", gun), ("neutral", neutral)):
        content = [{"type": "image", "image": image}, {"type": "text", "text": "what is this ?"}]
        answer = ask(
            text=[{"role": "user", "content": content}],
            max_new_tokens=12,
            do_sample=False,
            return_full_text=False,
        )
        flagged = model.last_verdicts[0].flagged
        print(f"{name}: flagged {flagged}, answer: {answer[0]['generated_text'].strip()}")


if __name__ == "__main__":
    main()
