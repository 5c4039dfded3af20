"""`vqguard verify`: does the guard hold in a model?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from vqguard.cli.options import UserPath, adapter_module_option, base_option, debug_option
from vqguard.cli.output import say, say_lines
from vqguard.files import replace_text


@click.command(
    "verify",
    epilog=(
        "\b\nExamples:\n  vqguard verify llava-1.5\n  vqguard verify ./my-model --site encoder\n"
        "  vqguard verify ./my-model --adapter-module mypackage.my_adapter\n"
        "  vqguard verify qwen3_vl --tiny\n  vqguard verify all --tiny --output table.json"
    ),
)
@click.argument("model")
@click.option(
    "--site",
    type=click.Choice(["projected", "encoder"]),
    default="projected",
    show_default=True,
    help="Where features are quantised.",
)
@click.option(
    "--tiny",
    is_flag=True,
    help="MODEL is a model type, or 'all': check tiny random models, at every site.",
)
@click.option("--output", type=UserPath(dir_okay=False), help="Write the results as JSON.")
@base_option
@adapter_module_option
@debug_option
def command(*, model: str, site: str, tiny: bool, output: Path | None, base: str | None) -> int:
    """Run the conformance checks on MODEL: a name, a folder or `hub:owner/name`.

    They prove that nothing visual gets past the guard, that verdicts reach the right rows, and that
    the guard comes out without a trace. The exit code is 1 when a check fails.
    """
    return _tiny(model, output) if tiny else _real(model, site, output, base)


def _tiny(kind: str, output: Path | None) -> int:
    from vqguard.adapters.proof.random_models.conformance_table import run_table

    def report(name: str, row: dict[str, Any], seconds: float) -> None:
        detail = f": {row['detail']}" if row["detail"] else ""
        say("{}{} ({:.1f} s){}", f"{row['status']:10}", name, seconds, detail)

    table = run_table([] if kind == "all" else [kind], report)
    if output is not None:
        replace_text(output, json.dumps(table, indent=1) + "\n")
    rows = table["families"].values()
    good = sum(row["status"] == "guarded" for row in rows)
    seen = sum(row["status"] != "no pixels" for row in rows)
    say("{} of {} families that see pixels pass every check", good, seen)
    return 0 if kind == "all" or good == seen else 1


def _real(name: str, site: str, output: Path | None, base: str | None) -> int:
    from transformers import AutoModelForImageTextToText

    from vqguard.adapters.catalogue import resolve_model
    from vqguard.adapters.encoders.stored import ENCODER, holds_encoder, load_encoder
    from vqguard.adapters.proof.conformance import check, example_inputs
    from vqguard.adapters.proof.results import JUDGES_ALONE
    from vqguard.adapters.registry import adapter_or_default
    from vqguard.adapters.sizes.built import described, opening
    from vqguard.adapters.sizes.pictures import open_processor
    from vqguard.adapters.storage.closed_config import read_config
    from vqguard.adapters.storage.manifest import holds_manifest
    from vqguard.adapters.storage.reading import load_parts
    from vqguard.errors import InputError

    entry, quantises = resolve_model(name), True
    if entry.source == "path" and holds_encoder(Path(_model_of(entry.location, ENCODER))):
        guarded = load_encoder(Path(_model_of(entry.location, ENCODER)), base)
        say("The guard and its encoder are those that were saved ({}).", guarded.guard.judge_level)
        say("It judges behind a vision encoder: there is no language model to prove anything of.")
        return 0
    if entry.source == "package":
        from vqguard.recipes.tiny.weights import load_base

        model, processor = load_base()
    else:
        load: Any = AutoModelForImageTextToText
        place = _model_of(entry.location)
        held = entry.source == "path" and holds_manifest(Path(place))
        config = read_config(Path(place)) if held else described(place)
        kind = str(config.get("model_type", ""))
        # Asked first: the package that brings an adapter may teach transformers its type.
        adapter_or_default(kind)
        try:
            if held:
                parts = load_parts(Path(place), base, {})
                model, quantises = parts.model, parts.guard.quantises
            else:
                with opening(place):
                    model = load.from_pretrained(
                        place, use_safetensors=True, trust_remote_code=False
                    )
            processor = open_processor(place)
        except ValueError as error:
            raise InputError(
                f"transformers cannot load {place}, of type {kind!r}: "
                f"{str(error).splitlines()[0]} If the type is your own, name the module that "
                "registers it with --adapter-module"
            ) from error
    kind_of_site: Any = site
    proof = check(model.eval(), example_inputs(processor), site=kind_of_site, quantises=quantises)
    say_lines(str(proof))
    if output is not None:
        results = {result.name: [result.status, result.detail] for result in proof.results}
        document = {"model": name, "site": site, "checks": results}
        if not quantises:
            document["judge_alone"] = JUDGES_ALONE
        replace_text(output, json.dumps(document, indent=1) + "\n")
    return 0 if proof.passed else 1


def _model_of(location: str, mark: str = "config.json") -> str:
    """The model inside a run's directory, where it has the file `mark`; else the location."""
    from vqguard.recipes.run import MODEL

    inside = Path(location) / MODEL
    return str(inside) if (inside / mark).is_file() else location
