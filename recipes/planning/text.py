"""A plan as text for the terminal."""

from __future__ import annotations

import yaml

from vqguard.recipes.planning.plan import RetrofitPlan, StagePlan

_GB = 10**9


def format_plan(plan: RetrofitPlan) -> str:
    """The resolved recipe, both stages, and what to change."""
    text = yaml.safe_dump(plan.recipe.to_dict(), sort_keys=False, allow_unicode=True)
    parts = ["Recipe", _indented(text)]
    for stage in plan.stages:
        parts.append(_stage(plan, stage))
    return "\n".join(parts)


def _stage(plan: RetrofitPlan, stage: StagePlan) -> str:
    where = "GPU" if plan.gpus else "processor"
    layers = f", layers spread over {plan.gpus} GPUs" if plan.is_spread else ""
    batch = f"{stage.micro_batch} x {1 if layers else max(plan.gpus, 1)} {where}"
    if stage.accumulation > 1:
        batch += f" x {stage.accumulation} accumulated"
    whose = "the fullest" if layers else "a"
    lines = [
        f"Stage {stage.stage}: {stage.samples} samples, {stage.steps} steps of {batch}{layers}",
        f"  trained  {_counts(stage.trained)}",
        f"  frozen   {_counts(stage.frozen)}",
        f"  memory of {whose} {where}, GB (sequences of {stage.tokens} tokens)",
    ]
    lines += [f"    {part:<12}{size / _GB:8.2f}" for part, size in vars(stage.memory).items()]
    lines.append(f"    {'total':<12}{stage.memory.total / _GB:8.2f}")
    lines += _codes(plan, stage)
    if plan.limit is not None:
        lines.append("  " + _verdict(plan, stage))
        for change in plan.changes.get(stage.stage, []):
            settings = " ".join(f"--set {setting}" for setting in change.settings)
            lines.append(f"    {change.total / _GB:8.2f} GB with {settings}")
        lines += _shards(plan, stage)
    return "\n".join(lines) + "\n"


def _codes(plan: RetrofitPlan, stage: StagePlan) -> list[str]:
    codes = stage.codes
    if codes is None:
        return []
    counted = plan.recipe.stage2.from_codes is True
    return [
        f"  from codes{' (counted above)' if counted else ', if nothing speaks against it'}",
        f"    {codes.memory / _GB:8.2f} GB less memory: no vision encoder ({_count(codes.vision)})",
        f"    {codes.disk / _GB:8.2f} GB on disk for {codes.pictures} pictures, each encoded once",
        f"    {100 * codes.arithmetic:8.2f} % less arithmetic a step, and no picture is read",
    ]


def _verdict(plan: RetrofitPlan, stage: StagePlan) -> str:
    assert plan.limit is not None
    limit = plan.limit / _GB
    if plan.fits(stage):
        return f"fits in {limit:.0f} GB"
    tried = "; smaller:" if plan.changes.get(stage.stage) else ""
    return f"DOES NOT FIT in {limit:.0f} GB{tried}"


def _shards(plan: RetrofitPlan, stage: StagePlan) -> list[str]:
    changes = plan.changes.get(stage.stage, [])
    assert plan.limit is not None
    smallest = changes[-1].total if changes else stage.memory.total
    if plan.fits(stage) or smallest <= plan.limit:
        return []
    if plan.is_spread:
        return ["    or the layers spread over more GPUs"]
    shards = plan.shards(stage.memory.total, stage)
    if shards is None:
        return ["    or GPUs with more memory: activations alone do not leave room"]
    return [
        f"    or weights, gradients and states sharded (FSDP) over {shards} GPUs of this size",
        "    or the layers spread over as many, used in turn: --set device_map=auto",
    ]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{part} {_count(number)}" for part, number in counts.items()) or "nothing"


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())
