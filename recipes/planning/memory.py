"""Memory of a stage on one device, by part. All sizes are bytes.

| part | how much |
| --- | --- |
| weights | 4 a parameter, or 2 if frozen and 4 + 2 if trained under bf16 (the 2: autocast's copy) |
| | with nf4 0.52 for the language model's frozen layers, and one of them multiplied out |
| codebooks | 4 an entry's number; they stay in float32 |
| gradients | 4 a trained parameter; once more for the buckets of several devices (DDP) |
| optimiser | 8 a trained parameter: AdamW's two moments in float32 |
| activations | the peak of one forward and backward pass on the meta device (`step_peak`) |
| search | the index over a frozen codebook; the search's blocks where a step takes less |
| inputs | pixels or kept features of a batch; on the CPU of two, as the loader reads one ahead |
| retained | on the CPU: freed blocks that the heap keeps at the peak (`heap`) |
| process | CUDA context, cuBLAS workspace, allocator slack; on the CPU code and Python's objects |
| | in stage 2 on the CPU also numba, LLVM and faiss, where the codebook is large |

Source of the 16 bytes a trained parameter: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054),
section 3.1, with float32 gradients, as autocast keeps them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vqguard.adapters.base import Adapter
from vqguard.guard import VQGuard
from vqguard.recipes.planning.heap import Heap
from vqguard.recipes.planning.meta_model import MetaModel
from vqguard.recipes.planning.step_peak import Step, StepShape, step_peak
from vqguard.recipes.recipe import StageRecipe
from vqguard.recipes.training.nf4 import BYTES, frozen_linear
from vqguard.recipes.training.step import checkpointing_on, vision_at_rest
from vqguard.search.choose import WORTH_AN_INDEX

SEARCH_BLOCKS = 64 * 2**20
"""`vqguard.search.dense`: 8 MB of scores, 16 MB of float64 codewords, their candidates."""
CUDA_PROCESS = 10**9
"""An assumption, not measured here: about 0.5 GB of context, 0.1 GB of cuBLAS workspaces, and what
PyTorch's caching allocator loses to fragments."""
CPU_PROCESS = 54 * 10**6
"""Code and Python's objects that training brings in: what llava-tiny's stage 1 took with freed
blocks returned (305 MB), less PyTorch's own count of its tensors (251 MB). One run of each."""
CPU_SEARCH = 197 * 10**6
"""What numba, LLVM and faiss hold once the search of a large frozen codebook was calibrated: growth
of a process that calibrates 512 codewords of width 16, where codewords themselves are nothing. One
run; 202 and 222 MB at (2048, 128) and (4000, 192)."""
_STEPS = 3
"""Steps until the heap's holes are the same at the end of each."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part."""

    weights: int
    codebooks: int
    gradients: int
    optimiser: int
    activations: int
    search: int
    inputs: int
    retained: int
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
    cached: bool = False,
) -> Memory:
    """Peak memory of a stage whose trained parameters require a gradient and no others do.

    `cached`: the stage reads the vision encoder's kept outputs and no pixels.
    """
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
    each = 2 if stage.bf16 else 4
    weights = each * sum(p.numel() for p in rest) + 4 * mixed
    if stage.nf4:
        packed = _packed(model, meta.adapter)
        # One layer at a time is multiplied out.
        weights += each * max(packed) - int((each - BYTES) * sum(packed))
    if stage.bf16:
        # Autocast does not reach the meta device: the cast is made beforehand.
        model.to(torch.bfloat16)
    step = step_peak(
        model, meta.adapter, shape, stage=number, accumulate=accumulate, history=not gpus
    )
    gradients = 4 * trained * (2 if gpus > 1 else 1)
    # Gradients are part of the step's peak unless they are held already, bfloat16 ones by half.
    counted = 0 if accumulate else 4 * trained - 2 * mixed
    indexed = number == 2 and _indexed(model.vqguard)
    frozen_index = codebooks if indexed else 0
    batch = input_bytes(meta, shape, cached=cached)
    memory = Memory(
        weights,
        codebooks,
        gradients,
        8 * trained,
        max(step.peak - counted, 0),
        max(SEARCH_BLOCKS - step.peak, 0) + frozen_index,
        batch * (1 if gpus else 2),
        0,
        CUDA_PROCESS if gpus else CPU_PROCESS + CPU_SEARCH * indexed,
    )
    if gpus:
        return memory
    held = [weights, codebooks, frozen_index]
    held += [4 * trained] * accumulate
    peak = _heap_peak(step, held, trained=trained, batch=batch)
    return replace(memory, retained=max(peak - (memory.total - memory.process), 0))


def spread_over(memory: Memory, devices: int) -> Memory:
    """Memory of the fullest of several devices that each hold some of the layers.

    Weights, gradients and states are shared out. Activations are counted whole: the last device has
    the loss, which is most of them under checkpointing.
    """
    parts = ("weights", "gradients", "optimiser")
    return replace(memory, **{part: math.ceil(getattr(memory, part) / devices) for part in parts})


def _packed(model: nn.Module, adapter: Adapter) -> list[int]:
    """Weights of each layer that a stage holds in 4 bits: linear, frozen, not the head."""
    names = {f"{name}.weight" for name in frozen_linear(model, adapter)}
    parameters = [p for name, p in model.named_parameters() if name in names]
    return [p.numel() for p in parameters if not p.requires_grad] or [0]


def _indexed(guard: VQGuard) -> bool:
    """Whether the search of its frozen patch codebook has an index and more than torch to run."""
    config = guard.config
    return config.search != "torch" and config.patch_codes >= WORTH_AN_INDEX


def input_bytes(meta: MetaModel, shape: StepShape, *, cached: bool) -> int:
    """Bytes of a batch's pictures as the model is given them.

    Pixels in float32: as many tiles of the encoder's size as hold the visual tokens, or for
    families without a size as many patches.
    """
    vision: Any = getattr(meta.model.config, "vision_config", None)
    side, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if vision is None or not isinstance(patch, int):
        return 0
    if cached:
        width = meta.adapter.width(meta.model, "encoder")
        return 4 * shape.samples * (shape.visual + 1) * width
    if isinstance(side, int):
        tiles = math.ceil(shape.visual / max((side // patch) ** 2, 1))
        return 4 * shape.samples * tiles * 3 * side**2
    merged = int(getattr(vision, "spatial_merge_size", 1)) ** 2
    frames = int(getattr(vision, "temporal_patch_size", 1))
    return 4 * shape.samples * shape.visual * merged * 3 * frames * patch**2


def _heap_peak(step: Step, held: Sequence[int], *, trained: int, batch: int) -> int:
    """Bytes that the heap holds at most in the first steps.

    These are the step's blocks as they come and go, AdamW's moments from the first step on, and
    the batch that is read ahead.
    """
    heap, number = Heap(), 0

    def take(size: int) -> int:
        nonlocal number
        number -= 1  # the step's own blocks count upwards
        if size:
            heap.take(number, size)
        return number

    for size in held:
        take(size)
    inputs = [take(batch)]
    for turn in range(_STEPS):
        inputs.append(take(batch))
        shift = turn * (len(step.events) + 1)
        left = dict.fromkeys(block for block, size in step.events if size)
        for block, size in step.events:
            if size:
                heap.take(shift + block, size)
            else:
                del left[block]
                heap.free(shift + block)
        if turn == 0:
            take(4 * trained)
            take(4 * trained)
        for block in left:  # gradients
            heap.free(shift + block)
        if batch:
            heap.free(inputs.pop(0))
    return heap.peak
