"""`vqguard retrofit`: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vqguard.cli.group import Session
from vqguard.cli.options import (
    UserPath,
    adapter_module_option,
    check_output,
    debug_option,
    is_first_process,
    resume_option,
    set_option,
    skip_bad_option,
)
from vqguard.cli.output import say, say_json, say_lines, show_report

if TYPE_CHECKING:
    from vqguard.recipes.judging.recipe import JudgeRecipe
    from vqguard.recipes.recipe import RetrofitRecipe

_ANY_MODEL = "qwen2.5-vl"
"""The recipe for models without one: the paper's sizes, with room for pictures of any size."""


@click.command(
    "retrofit",
    epilog="""\b
Examples:
  vqguard retrofit --model llava-tiny
  vqguard retrofit --model llava-tiny --output runs/first --set stage1.samples=500
  vqguard retrofit --model llava-1.5 --dry-run --gpu-memory 24GB
  vqguard retrofit --model llava-1.5 --levels semantic --images my-images --output runs/judge
  vqguard retrofit --model llava-tiny --data conversations.json --images photos --output runs/mine
  torchrun --nproc_per_node 4 -m vqguard.cli retrofit --model llava-1.5 --data d.json --images i
""",
)
@click.option("--model", metavar="NAME", help="The model to guard (see: vqguard models).")
@click.option(
    "--config",
    type=UserPath(exists=True, dir_okay=False),
    help="A recipe in YAML. Default: the model's, else its family's, else qwen2.5-vl's.",
)
@click.option(
    "--data",
    type=UserPath(exists=True),
    help="LLaVA's JSON, WebDataset shards (a .tar or a directory of them), a Hugging Face dataset "
    "(a saved directory or .parquet) or a mixture (.yaml), in place of the recipe's data.",
)
@click.option(
    "--images",
    type=UserPath(exists=True),
    help="The directory, .zip or .tar that the image names in --data start from. With --levels "
    "semantic: one subdirectory of images for each category, 'neutral' among them.",
)
@click.option(
    "--levels",
    type=click.Choice(["both", "semantic"]),
    default="both",
    show_default=True,
    help="semantic: a judge alone, in minutes; nothing of the model is trained. Visual tokens are "
    "judged, not quantised. --model may also be a vision encoder: timm:NAME, open_clip:NAME, "
    "transformers:FOLDER.",
)
@click.option(
    "--labels",
    type=UserPath(exists=True, dir_okay=False),
    help="With --levels semantic: a .csv or .jsonl list of the images' labels, whose paths start "
    "from --images.",
)
@click.option(
    "--fpr",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="With --levels semantic: the false-positive budget. Default: 0.01.",
)
@click.option(
    "--follow-links",
    is_flag=True,
    help="Take files outside --images too, where symbolic links in it lead there, as in a snapshot "
    "of the Hugging Face hub.",
)
@click.option(
    "--output",
    type=UserPath(),
    help="The run directory to write. Default: the model's name, in runs/.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be trained and what it needs.")
@click.option(
    "--gpu-memory",
    metavar="SIZE",
    help="With --dry-run: say whether it fits in this, as in 24GB, and what to change.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=0),
    default=1,
    help="With --dry-run: GPUs that share a batch, or with device_map the layers; 0 plans for the "
    "processor. Default: 1.",
)
@click.option("--json", "as_json", is_flag=True, help="With --dry-run: print JSON.")
@set_option("stage1.samples=500")
@resume_option
@skip_bad_option
@adapter_module_option
@debug_option
@click.pass_obj
def command(
    session: Session,
    *,
    model: str | None,
    config: Path | None,
    data: Path | None,
    images: Path | None,
    levels: str,
    labels: Path | None,
    fpr: float | None,
    follow_links: bool,
    output: Path | None,
    dry_run: bool,
    gpu_memory: str | None,
    gpus: int,
    as_json: bool,
    settings: tuple[str, ...],
    resume: bool,
    skip_bad: bool,
) -> None:
    """Put a two-level quantiser into a model, train it in two stages, fit its safety map,
    attack it, and write a report that sets the guarded model beside the undefended one.

    The run directory gets the resolved recipe, metrics, checkpoints, the guarded model
    and the report. A run that was stopped goes on with --resume.

    With --levels semantic nothing of the model is trained: a judge is calibrated from labelled
    images and measured on a share of them that is held out.
    """
    if not dry_run and (gpu_memory or as_json or gpus != 1):
        raise click.UsageError("--gpu-memory, --gpus and --json belong to --dry-run.")
    if output is not None and not dry_run:
        check_output(output, resume)
    if levels == "semantic":
        if data is not None or dry_run or follow_links:
            raise click.UsageError(
                "--levels semantic trains no model: leave --data, --follow-links, --dry-run out."
            )
        judge = _judge_recipe(model, config, {"images": images, "labels": labels}, fpr, settings)
        _judge_alone(session, judge, output, resume=resume, skip_bad=skip_bad)
        return
    if labels is not None or fpr is not None:
        raise click.UsageError("--labels and --fpr belong to --levels semantic.")
    recipe = _recipe(model, config)
    # A recipe by name says itself which checkpoint it is for.
    paths = {"model": model if config else None, "data": data, "images": images}
    # Quoted, so that YAML reads "1e3" or "yes" in a path as the text that it is.
    changes = [f"{key}={json.dumps(str(value))}" for key, value in paths.items() if value]
    links = ["follow_links=true"] if follow_links else []
    recipe = recipe.override([*changes, *links, *settings])
    if dry_run:
        _show_plan(recipe, gpu_memory, gpus, as_json)
        return
    if output is None:
        output = Path("runs") / Path(recipe.model).name
        check_output(output, resume)

    from vqguard.recipes.retrofit import retrofit

    result = retrofit(recipe, output, resume=resume, skip_bad=skip_bad, command=session.command)
    if is_first_process():
        show_report(result.records, result.report_html, result.report_json)


def _judge_recipe(
    model: str | None,
    config: Path | None,
    paths: dict[str, Path | None],
    fpr: float | None,
    settings: tuple[str, ...],
) -> JudgeRecipe:
    from vqguard.recipes.judging.recipe import JudgeRecipe

    if model is None and config is None:
        raise click.UsageError("Give --model (see: vqguard models) or --config FILE.")
    recipe = JudgeRecipe.from_yaml(config) if config else JudgeRecipe.of_model(str(model))
    named = {"model": model, **paths}
    changes = [f"{key}={json.dumps(str(value))}" for key, value in named.items() if value]
    if fpr is not None:
        changes.append(f"regional.fpr={fpr!r}")
    return recipe.override([*changes, *settings])


def _judge_alone(
    session: Session, recipe: JudgeRecipe, output: Path | None, *, resume: bool, skip_bad: bool
) -> None:
    from vqguard.recipes.judge_alone.calibrate import judge_alone
    from vqguard.recipes.report.tables import judge_table

    if output is None:
        output = Path("runs") / f"{Path(recipe.model.partition(':')[2] or recipe.model).name}-judge"
        check_output(output, resume)
    result = judge_alone(recipe, output, resume=resume, skip_bad=skip_bad, command=session.command)
    table = judge_table(result.records)
    width = max(len(row.label) for row in table.rows)
    for row in table.rows:
        for heading, cells in zip(table.headings[1:], row.columns, strict=True):
            shown = " / ".join(cell.text for cell in cells)
            say("{}  {}: {}", row.label.ljust(width), heading, shown)
    say("Visual tokens are judged, not quantised: `vqguard retrofit` without --levels does both.")
    say("Report: {}", result.report_html)
    say("Numbers: {}", result.report_json)


def _show_plan(recipe: RetrofitRecipe, gpu_memory: str | None, gpus: int, as_json: bool) -> None:
    from vqguard.recipes.planning.plan import parse_memory, plan
    from vqguard.recipes.planning.text import format_plan

    try:
        limit = None if gpu_memory is None else parse_memory(gpu_memory)
    except ValueError:
        raise click.BadParameter(
            f"expected a size as in 24GB, got {gpu_memory!r}.", param_hint="--gpu-memory"
        ) from None
    result = plan(recipe, gpus=gpus, limit=limit)
    if as_json:
        say_json(result.to_dict(), indent=2)
    else:
        say_lines(format_plan(result))


def _recipe(model: str | None, config: Path | None) -> RetrofitRecipe:
    from vqguard.recipes.recipe import load_recipe, recipe_names

    if config is not None:
        return load_recipe(config)
    names = recipe_names()
    if model is None:
        raise click.UsageError(f"Give --model (one of: {', '.join(names)}) or --config FILE.")
    if model in names:
        return load_recipe(model)
    return _recipe_of_entry(model, names)


def _recipe_of_entry(model: str, names: list[str]) -> RetrofitRecipe:
    """The recipe of a model that none is named like.

    That of the same checkpoint, else of its family, else the one that is nearest to any model.
    """
    from vqguard.adapters.catalogue import resolve_model
    from vqguard.errors import VQGuardError
    from vqguard.names import nearest_name
    from vqguard.recipes.recipe import load_recipe

    try:
        entry = resolve_model(model)
    except VQGuardError as error:
        guess = nearest_name(model, names)
        if guess is None:
            raise
        raise click.UsageError(f"No model '{model}'. Did you mean '{guess}'?") from error
    kind = _kind_of_folder(entry.location) if entry.source == "path" else entry.model_type
    of_family = []
    for name in names:
        recipe = load_recipe(name)
        known = resolve_model(recipe.model)
        if known.source == "hub" and known.location == entry.location:
            return recipe
        if known.source == "hub" and known.model_type == kind:
            of_family.append((name, recipe))
    if of_family:
        name, recipe = of_family[0]
        say("Takes the recipe {} of the same family for {}.", name, entry.location, err=True)
    else:
        name, recipe = _ANY_MODEL, load_recipe(_ANY_MODEL)
        say(
            "No recipe is for {} or its family: takes that of {}, untried on this model. Write one "
            "of your own, beginning with it, and give it with --config FILE.",
            *(entry.location, name),
            err=True,
        )
    return recipe.override([f"model={json.dumps(model)}"])


def _kind_of_folder(folder: str) -> str:
    from vqguard.adapters.sizes.configured import read_sizes

    kind = read_sizes(Path(folder), strict=True).get("model_type")
    return kind if isinstance(kind, str) else ""
