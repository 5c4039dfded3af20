"""Guard a model in Python: build a guard, start its codebooks, calibrate, ask.

The model is llava-tiny's undefended base. Without the two training stages the language model has
not adapted to codewords, so answers are a little worse than after `vqguard retrofit`.

    python examples/guard_a_model.py
"""

from __future__ import annotations

from typing import Any

from vqguard import build_guard, guard_model, unguard_model
from vqguard.recipes.calibrate import calibrate_model
from vqguard.recipes.image_batches import collect_features
from vqguard.recipes.tiny.weights import load_base
from vqguard.recipes.tiny.world import TinyWorld


def main() -> None:
    model: Any
    model, processor = load_base()
    world = TinyWorld(seed=1)

    guard = build_guard(
        model, patch_codes=512, semantic_codes=128, refusal_text="sorry , i cannot help with that ."
    )
    guard_model(model, guard, processor)

    # The codebooks start on k-means centres of training features.
    pictures = [sample.image() for sample in world.captions(600) if sample.image]
    patches, semantic = collect_features(model, processor, pictures)
    guard.patch.codebook.start_from(patches)
    guard.semantic.codebook.start_from(semantic)

    # Labelled images say which semantic codes are toxic.
    calibrate_model(model, processor, world.calibration(25, 300), tau=0.6, fpr=None)

    gun = next(iter(world.toxic_images("gun", 0, 1)))
    neutral = next(iter(world.neutral_images((1, 1), 1)))
    for name, image in (("toxic", gun), ("neutral", neutral)):
        text = "USER: <image> what is this ? ASSISTANT: "
        inputs = processor(images=[image], text=[text], return_tensors="pt")
        (verdict,) = model.screen(pixel_values=inputs["pixel_values"])
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answer = processor.tokenizer.decode(new, skip_special_tokens=True)
        print(f"{name}: {verdict.category} ({verdict.probability:.2f}), answer: {answer}")

    unguard_model(model)  # and the model is what it was


if __name__ == "__main__":
    main()
