"""The plan of a retrofit: what is trained, how many steps, how much memory, and whether it fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from vqguard.adapters import resolve_model
from vqguard.recipes.planning.codes import CodesPlan, codes_plan, without_vision
from vqguard.recipes.planning.memory import Memory, spread_over, stage_memory
from vqguard.recipes.planning.meta_model import choose_trained, meta_model
from vqguard.recipes.planning.step_peak import StepShape
from vqguard.recipes.recipe import LoraRecipe, RetrofitRecipe, Stage2Recipe, StageRecipe
from vqguard.recipes.training.step import in_halves, micro_batches

GB = 10**9


@dataclass(frozen=True)
class StagePlan:
    """One stage on one device."""

    stage: int
    trained: dict[str, int]
    """Trained parameters by part."""
    frozen: dict[str, int]
    """Frozen parameters by part."""
    samples: int
    steps: int
    """Optimiser steps."""
    micro_batch: int
    """Samples a device holds at a time."""
    accumulation: int
    """Micro batches of a device for a step."""
    tokens: int
    """Tokens of the longest sequence, which the memory is planned for."""
    memory: Memory
    """On pixels or kept features; on codes where the recipe has `from_codes` true."""
    codes: CodesPlan | None = None
    """What training from codes saves, in stage 2 unless the recipe is against it."""


@dataclass(frozen=True)
class Change:
    """Settings that lower a stage's memory, and what it then takes (bytes)."""

    settings: tuple[str, ...]
    total: int


@dataclass(frozen=True)
class RetrofitPlan:
    """What a recipe does and needs."""

    recipe: RetrofitRecipe
    gpus: int
    """Devices that share each batch, or with the recipe's `device_map` the layers; 0 plans for the
    processor."""
    limit: int | None
    """Bytes a device has; None where that is not asked."""
    stages: tuple[StagePlan, ...]
    changes: dict[int, list[Change]] = field(default_factory=dict)
    """For a stage that does not fit: settings, each row with all of the rows before it."""

    @property
    def is_spread(self) -> bool:
        """Whether the devices share the layers and not the batch."""
        return self.recipe.device_map is not None and self.gpus > 1

    def fits(self, stage: StagePlan) -> bool:
        return self.limit is None or stage.memory.total <= self.limit

    def shards(self, total: int, stage: StagePlan) -> int | None:
        """Devices over which weights, gradients and states must be sharded to fit (FSDP)."""
        assert self.limit is not None
        memory = stage.memory
        stays = memory.activations + memory.search + memory.inputs + memory.process
        # While a layer runs, its weights are gathered: a tenth is more than any layer here has.
        room = self.limit - stays - stage.memory.weights // 10
        return math.ceil((total - stays) / room) if room > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        stages = []
        for planned in self.stages:
            plain = {k: v for k, v in vars(planned).items() if k not in ("memory", "codes")}
            plain["codes"] = vars(planned.codes) if planned.codes is not None else None
            memory = {**vars(planned.memory), "total": planned.memory.total}
            changes = [
                {"settings": list(c.settings), "total": c.total}
                for c in self.changes.get(planned.stage, [])
            ]
            fits = self.fits(planned) if self.limit is not None else None
            stages.append({**plain, "memory": memory, "fits": fits, "changes": changes})
        return {
            "recipe": self.recipe.to_dict(),
            "device": "gpu" if self.gpus else "cpu",
            "gpus": self.gpus,
            "limit": self.limit,
            "stages": stages,
        }


def plan(
    recipe: RetrofitRecipe,
    *,
    gpus: int = 1,
    limit: int | None = None,
    tokens: tuple[int, int] | None = None,
    config: Any = None,
) -> RetrofitPlan:
    """Plan both stages from the meta device: no network, no weights, nothing trained.

    Args:
        gpus: devices that share each batch, or the layers, if the recipe has a `device_map`; 0
            plans for the processor.
        limit: bytes that a device has.
        tokens: longest sequence of each stage; None is the recipe's `max_length`, or what the
            embedded world's first samples have.
        config: of a loaded checkpoint, in place of the sizes in the package.

    Raises:
        ConfigError: unknown sizes, or a batch that the devices cannot share.
    """
    lengths = tokens or _lengths(recipe)
    stages = tuple(_stage(recipe, number, gpus, lengths[number - 1], config) for number in (1, 2))
    result = RetrofitPlan(recipe, gpus, limit, stages)
    if limit is None or not gpus:
        return result
    for planned in stages:
        if not result.fits(planned):
            result.changes[planned.stage] = list(_smaller(recipe, planned, gpus, limit, config))
    return result


def _of(recipe: RetrofitRecipe, number: int) -> StageRecipe:
    return recipe.stage1 if number == 1 else recipe.stage2


def _stage(
    recipe: RetrofitRecipe, number: int, gpus: int, tokens: int, config: Any = None
) -> StagePlan:
    stage = _of(recipe, number)
    meta = meta_model(recipe, config)
    names = choose_trained(meta, stage, number)
    every, trained = meta.counts(), meta.counts(names)
    spread = recipe.device_map is not None
    if not gpus and number == 2:
        stage = in_halves(stage)
    each, times = micro_batches(stage, 1 if spread else max(gpus, 1))
    shape = StepShape(each, tokens, meta.visual_tokens)
    memory = stage_memory(
        meta,
        stage,
        shape,
        number=number,
        gpus=min(gpus, 1) if spread else gpus,
        accumulate=times > 1,
        cached=recipe.features.cache,
    )
    codes = None
    if isinstance(stage, Stage2Recipe):
        codes = codes_plan(meta, stage, shape, memory)
        if codes is not None and stage.from_codes is True:
            memory = without_vision(memory, codes, stage)
    if spread and gpus > 1:
        memory = spread_over(memory, gpus)
    return StagePlan(
        number,
        trained,
        {part: n - trained.get(part, 0) for part, n in every.items() if n > trained.get(part, 0)},
        stage.samples,
        stage.steps,
        each,
        times,
        tokens,
        memory,
        codes,
    )


def _smaller(
    recipe: RetrofitRecipe, plan: StagePlan, gpus: int, limit: int, config: Any
) -> Iterator[Change]:
    """Changes in the order in which they cost least, until the stage fits."""
    name = f"stage{plan.stage}"
    stage: Any = _of(recipe, plan.stage)
    wanted: list[tuple[str, dict[str, Any]]] = []
    if not stage.bf16:
        wanted.append((f"{name}.bf16=true", {"bf16": True}))
    if plan.micro_batch > 1:
        wanted.append((f"{name}.micro_batch=1", {"micro_batch": 1}))
    if not stage.gradient_checkpointing:
        wanted.append((f"{name}.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if plan.stage == 2 and stage.lora is None:
        wanted.append(("stage2.lora={}", {"lora": LoraRecipe()}))
    if not stage.nf4:
        wanted.append((f"{name}.nf4=true", {"nf4": True}))
    done: tuple[str, ...] = ()
    for setting, change in wanted:
        stage = replace(stage, **change)
        done = (*done, setting)
        changed = replace(recipe, **{name: stage})
        total = _stage(changed, plan.stage, gpus, plan.tokens, config).memory.total
        yield Change(done, total)
        if total <= limit:
            return


def _lengths(recipe: RetrofitRecipe) -> tuple[int, int]:
    """Tokens of the longest sequence that a batch can hold."""
    if recipe.data is not None or resolve_model(recipe.model).source != "package":
        return recipe.stage1.max_length, recipe.stage2.max_length
    # Most plans are of other models: its classes, tokenizer and scenes take a while to import.
    from vqguard.recipes.planning.embedded import embedded_lengths

    return embedded_lengths(recipe)


def parse_memory(text: str) -> int:
    """Bytes of a size as in 24GB (10^9) or 24GiB (2^30).

    Raises:
        ValueError: not a size.
    """
    units = {"GIB": 2**30, "GB": GB, "G": GB}
    clean = text.strip().upper()
    for unit in units:
        if clean.endswith(unit):
            number, size = float(clean.removesuffix(unit)), units[unit]
            break
    else:
        number, size = float(clean), GB
    if not (math.isfinite(number) and number > 0):
        raise ValueError(text)
    return int(number * size)
