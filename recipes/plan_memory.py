"""Memory of a stage on one device, by part. All sizes are bytes.

| part | how much |
| --- | --- |
| weights | 4 a parameter, or 2 if frozen and 4 + 2 if trained under bf16 (the 2: autocast's copy) |
| codebooks | 4 an entry's number; they stay in float32 |
| gradients | 4 a trained parameter; once more for the buckets of several devices (DDP) |
| optimiser | 8 a trained parameter: AdamW's two moments in float32 |
| activations | the peak of one forward and backward pass on the meta device (`plan_peak`) |
| search | the search's blocks, and the codebook copy that an index holds where it is frozen |
| process | CUDA context, cuBLAS workspace and allocator slack; on the CPU the step's buffers |

Source of the 16 bytes a trained parameter: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054),
section 3.1, with float32 gradients, as autocast keeps them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vqguard.recipes.plan_model import MetaModel
from vqguard.recipes.plan_peak import StepShape, step_peak
from vqguard.recipes.recipe import StageRecipe
from vqguard.recipes.trainer import checkpointing_on, vision_at_rest

SEARCH_BLOCKS = 64 * 2**20
"""`vqguard.search.dense`: 8 MB of scores, 16 MB of float64 codewords, their candidates."""
CUDA_PROCESS = 10**9
"""An assumption, not measured here: about 0.5 GB of context, 0.1 GB of cuBLAS workspaces, and what
PyTorch's caching allocator loses to fragments."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    weights: int
    codebooks: int
    gradients: int
    optimiser: int
    activations: int
    search: int
    process: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def stage_memory(
    meta: MetaModel,
    stage: StageRecipe,
    shape: StepShape,
    *,
    number: int,
    gpus: int,
    accumulate: bool,
) -> Memory:
    """Peak memory of a stage whose trained parameters require a gradient and no others do."""
    model = meta.model
    model.train()
    vision_at_rest(model, meta.adapter)
    if stage.gradient_checkpointing:
        checkpointing_on(model)
    guard = {id(p) for p in model.vqguard.parameters()}
    rest = [p for p in model.parameters() if id(p) not in guard]
    codebooks = 4 * sum(p.numel() for p in model.vqguard.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    mixed = sum(p.numel() for p in rest if p.requires_grad) if stage.bf16 else 0
    weights = (2 if stage.bf16 else 4) * sum(p.numel() for p in rest) + 4 * mixed
    if stage.bf16:
        # Autocast does not reach the meta device: the cast is made beforehand.
        model.to(torch.bfloat16)
    step = step_peak(model, meta.adapter, shape, stage=number, accumulate=accumulate)
    gradients = 4 * trained * (2 if gpus > 1 else 1)
    # Gradients are part of the step's peak unless they are held already, bfloat16 ones by half.
    counted = 0 if accumulate else 4 * trained - 2 * mixed
    frozen_index = codebooks if number == 2 else 0
    return Memory(
        weights,
        codebooks,
        gradients,
        8 * trained,
        max(step - counted, 0),
        SEARCH_BLOCKS + frozen_index,
        CUDA_PROCESS if gpus else 0,
    )
