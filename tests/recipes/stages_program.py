"""Both stages at small size, as one process or as several that a launcher's environment describes.

`torchrun stages_program.py FOLDER ENGINE` trains under an engine: once through, once stopped and
resumed, with micro batches, with low-rank adapters, from codes and what else `VARIANTS` has for it.
`python stages_program.py FOLDER` trains what all of these must equal. `die` after ENGINE: the last
process kills itself in stage 1; `resume` goes on from there. Results are left in FOLDER.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from vqguard.adapters import build_guard, guard_model
from vqguard.distributed import rank_and_world
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.picture_codes import shared_codes
from vqguard.recipes.processes import is_first, launched, together
from vqguard.recipes.recipe import LoraRecipe, Stage1Recipe, Stage2Recipe
from vqguard.recipes.tiny.model import TinySizes, build_model, build_processor, build_tokenizer
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training.stage1 import Stage1Trainer
from vqguard.recipes.training.stage2 import Stage2Trainer

SIZES = TinySizes(
    patch_size=32,
    vision_width=24,
    vision_layers=1,
    vision_heads=2,
    vision_mlp=32,
    text_width=24,
    text_layers=2,
    text_heads=2,
    text_mlp=32,
)
SAMPLES = 22  # the last step of an epoch has 6 samples: 3 a process
STAGE1 = Stage1Recipe(
    samples=SAMPLES,
    batch=8,
    epochs=2,
    learning_rate=1e-3,
    checkpoint_every=2,
    revive_every=3,  # not the checkpoints' steps: a resumed run needs their counts
    revive_until=0.9,
    max_length=128,
)
STAGE2 = Stage2Recipe(
    samples=SAMPLES, batch=8, learning_rate=1e-3, checkpoint_every=1, max_length=256
)
# What `accelerate launch` sets for the files in recipes/engines.
ENGINES = {
    "ddp": {},
    "fsdp": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    },
    "deepspeed": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
        "ACCELERATE_GRADIENT_CLIPPING": "auto",
    },
}
QLORA = {"lora": True, "nf4": True}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "ddp": {"nf4": QLORA},
    "deepspeed": {"nf4": QLORA},
}
EVERYWHERE: dict[str, dict[str, Any]] = {
    "stopped": {"stop": 3},
    "micro": {"micro": 2},
    "lora": {"lora": True},
    "bf16": {"bf16": True},
    "codes": {"from_codes": True},
}


class StoppedError(Exception):
    """Ends a stage in the middle of a step, in every process."""


def train(
    folder: Path,
    *,
    micro: int | None = None,
    lora: bool = False,
    nf4: bool = False,
    bf16: bool = False,
    from_codes: bool = False,
    stop: int | None = None,
    die: bool = False,
    resume: bool = False,
) -> None:
    """Both stages from the same start; with `stop` each is broken off at that loss and resumed."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model: Any = build_model(SIZES, tokenizer)
    processor = build_processor(SIZES, tokenizer)
    guard_model(
        model,
        build_guard(model, patch_codes=32, semantic_codes=8, refusal_text="sorry ."),
        processor,
    )
    world = TinyWorld(0)
    adapters = LoraRecipe(rank=4, alpha=8, dropout=0.0) if lora else None
    both: dict[str, Any] = {"micro_batch": micro, "nf4": nf4, "bf16": bf16}
    first, second = replace(STAGE1, **both), replace(STAGE2, **both, lora=adapters)
    for kind, recipe, samples in (
        (Stage1Trainer, first, world.captions(SAMPLES)),
        (Stage2Trainer, second, world.instructions(SAMPLES)),
    ):
        data = EncodedSamples(samples, processor, recipe.max_length)
        where = folder / kind.stage
        if from_codes and kind is Stage2Trainer:
            kept = shared_codes(folder / "codes", model, data)
            data = EncodedSamples(samples, processor, recipe.max_length, codes=kept)
        if stop is not None:
            broken = kind(copy.deepcopy(model), recipe, data, where, seed=0)  # type: ignore[arg-type]
            _stop_at(broken, stop, _raise)
            try:
                broken.run(resume=False)
            except StoppedError:
                pass
            else:
                raise AssertionError("the stage ended before it was stopped")
        trainer = kind(model, recipe, data, where, seed=0)  # type: ignore[arg-type]
        if die and rank_and_world()[0] == 1:
            _stop_at(trainer, 4, lambda: os.kill(os.getpid(), signal.SIGKILL))
        model = trainer.run(resume=resume or stop is not None)
        assert not any(hasattr(p, "_hp_mapping") for p in model.parameters())
    if is_first():
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
        save_file(state, folder / "result.safetensors")
        model.save_pretrained(folder / "model")
        images = list(TinyWorld(1).neutral_images((1, 2), 8))
        inputs = processor.image_processor(images=images, return_tensors="pt")
        with torch.no_grad():
            tokens = model.eval().model.get_image_features(**inputs).pooler_output
            codes = model.vqguard.patch.encode(torch.stack(list(tokens)))
        (folder / "codes.json").write_text(json.dumps(codes.tolist()))


def _raise() -> None:
    raise StoppedError


def _stop_at(trainer: Any, number: int, end: Callable[[], None]) -> None:
    losses, calls = trainer.losses, []

    def stopping(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            end()
        return losses(*arguments)

    trainer.losses = stopping


def main(folder: Path, engine: str = "alone", how: str = "") -> None:
    torch.set_num_threads(1)
    if launched() == 1:
        train(folder / "alone")
        train(folder / "alone_lora", lora=True)
        train(folder / "alone_nf4", **QLORA)
        train(folder / "alone_bf16", bf16=True)
        return
    os.environ.update(ENGINES[engine])
    with together():
        if how:
            train(folder / f"{engine}_dead", die=how == "die", resume=how == "resume")
            return
        train(folder / engine)
        for name, variant in {**EVERYWHERE, **VARIANTS.get(engine, {})}.items():
            train(folder / f"{engine}_{name}", **variant)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
