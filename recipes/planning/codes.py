"""What training stage 2 from codes needs on disk, and what it saves."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vqguard.recipes.data.code_dtypes import code_bytes
from vqguard.recipes.planning.memory import Memory
from vqguard.recipes.planning.meta_model import MetaModel
from vqguard.recipes.planning.step_peak import StepShape
from vqguard.recipes.recipe import Stage2Recipe


@dataclass(frozen=True)
class CodesPlan:
    """Stage 2 from codes. Sizes in bytes."""

    pictures: int
    """At most: one a sample."""
    disk: int
    """Of their codes."""
    vision: int
    """Parameters of the vision encoder, which is not held."""
    memory: int
    """How much less a device holds."""
    arithmetic: float
    """Share of a step's multiplications that vision encoder and search have, which codes spare."""


def codes_plan(
    meta: MetaModel, stage: Stage2Recipe, shape: StepShape, memory: Memory
) -> CodesPlan | None:
    """The saving; None where the recipe is against codes or the model has no vision encoder.

    Multiplications: one a parameter and token forward, as many backward for activations and for
    trained weights each, one more forward under checkpointing; the search one a number of the
    codebook and token. Attention and elementwise work are left out.
    """
    counts = meta.counts()
    vision = counts.get("vision encoder", 0)
    if stage.from_codes is False or not vision:
        return None
    config = meta.model.vqguard.config
    each = shape.visual * code_bytes(config.patch_codes) * (1 + config.deepstack_levels)
    each += code_bytes(config.semantic_codes)
    inputs = memory.inputs - min(memory.inputs, 8 * shape.samples * shape.visual)
    passes = 2 + (stage.lora is None) + stage.gradient_checkpointing
    language = passes * shape.tokens * counts["language model"]
    seen = shape.visual * (vision + config.patch_codes * config.patch_dim)
    weights = (2 if stage.bf16 else 4) * vision
    return CodesPlan(
        stage.samples, stage.samples * each, vision, weights + inputs, seen / (seen + language)
    )


def without_vision(memory: Memory, codes: CodesPlan, stage: Stage2Recipe) -> Memory:
    """The memory of a stage that trains from codes and nothing else."""
    weights = (2 if stage.bf16 else 4) * codes.vision
    return replace(
        memory,
        weights=memory.weights - weights,
        inputs=memory.inputs - (codes.memory - weights),
    )
