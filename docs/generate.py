"""Write the generated pages of the documentation.

    python docs/generate.py pages          # attacks, command line, configuration, decisions, models
    python docs/generate.py results RUN    # README's table and the results page, from a report
    python docs/generate.py red-team DIR...  # tables of the red team page, from suites' folders

A test fails when a page of the first kind is not what this script would write.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from vqguard.config import StrictConfig
from vqguard.errors import InputError, VQGuardError
from vqguard.recipes.report.markdown import (
    INTERVALS,
    headline_markdown,
    made_by,
    tables_markdown,
)
from vqguard.records import Record, read_records

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
NOTE = "<!-- Written by docs/generate.py: change the source, then run `make pages`. -->\n"

CONFIG_PACKAGES = (
    "vqguard",
    "vqguard.judging",
    "vqguard.recipes",
    "vqguard.recipes.attacking",
    "vqguard.recipes.judging",
    "vqguard.recipes.tiny",
)


def pages() -> dict[Path, str]:
    """Every generated page that needs no run, by its path."""
    return {
        DOCS / "command-line.md": command_line(),
        DOCS / "configuration.md": configuration(),
        DOCS / "decisions" / "index.md": decisions(DOCS / "decisions"),
        DOCS / "models.md": _beside("models_page").models_page(NOTE),
        DOCS / "attacks.md": _beside("attacks_page").attacks_page(NOTE),
        DOCS / "public-benchmarks.md": _beside("public_benchmarks_page").public_benchmarks_page(
            NOTE
        ),
        ROOT / "adapters" / "families" / "arguments.py": arguments(DOCS / "conformance.json"),
    }


def _beside(name: str) -> Any:
    """A module beside this script: docs/ is no package, and tests load the script by its path."""
    path = DOCS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{path} cannot be loaded")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(record: Path) -> str:
    """The module that says what each family was proven with, from the conformance record."""
    table = json.loads(record.read_text(encoding="utf-8"))
    lines = [_ARGUMENTS.format(version=table["transformers"])]
    for kind, row in table["families"].items():
        names = [f'"{name}"' for name in row.get("arguments", ())]
        if not names:
            continue
        line = f'    "{kind}": ({", ".join(names)}{"," if len(names) == 1 else ""}),'
        several = [f'    "{kind}": (', *(f"        {name}," for name in names), "    ),"]
        lines += [line] if len(line) <= 100 else several
    return "\n".join([*lines, "}", '"""By model type."""', ""])


_ARGUMENTS = '''\
"""Where calls of each family may hold data beside the prompt: what it was proven with.

Written by docs/generate.py from docs/conformance.json, a record of transformers {version}: make
that anew (`vqguard verify all --tiny --output docs/conformance.json`), then run `make pages`.
"""

from __future__ import annotations

ARGUMENTS: dict[str, tuple[str, ...]] = {{'''


def command_line() -> str:
    """The page of the program: each command's help and options, and the exit codes."""
    from vqguard.cli.main import COMMANDS, program

    context = click.Context(program, info_name="vqguard")
    parts = [
        "# Command line\n",
        NOTE,
        "Results go to stdout, progress and messages to stderr. `--debug`, before or after the "
        "command, shows tracebacks and the log.\n",
        "| exit code | meaning |\n| --- | --- |\n"
        "| 0 | done; for `scan`: no image is flagged |\n"
        "| 1 | `scan`: an image is flagged; `verify`: a check failed |\n"
        "| 2 | usage or input error: the message says what was expected and what to do |\n"
        "| 3 | a bug in the program, with its traceback |\n"
        "| 130 | interrupted |\n",
        "| command | what it does |\n| --- | --- |\n"
        + "".join(f"| [{name}](#{name}) | {entry.help} |\n" for name, entry in COMMANDS.items()),
    ]
    for name in program.list_commands(context):
        command = program.get_command(context, name)
        if command is None:
            raise RuntimeError(f"{name} is listed and not there")
        parts += [f"## {name}\n", *_sections(name, command)]
    return "\n".join(parts)


def _sections(name: str, command: click.Command) -> list[str]:
    """A command; of a group its commands too, each with a heading of its own."""
    if not isinstance(command, click.Group):
        return [_command(command, name)]
    parts = [inspect.cleandoc(command.help or "") + "\n"]
    for inner in command.commands.values():
        own = f"{name} {inner.name}"
        parts += [f"### {own}\n", *_sections(own, inner)]
    return parts


def _command(command: click.Command, called: str) -> str:
    # Rendered here, not by click: its layout differs between versions.
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    usage = [a.metavar or (a.name or "").upper() for a in arguments]
    rows = []
    for option in command.params:
        if isinstance(option, click.Option) and option.name != "debug":
            name = f"`{', '.join([*option.opts, *option.secondary_opts])}`"
            default = option.default
            shown = isinstance(default, str | int | float | Path) and not option.is_flag
            meaning = (option.help or "") + (" Required." if option.required else "")
            if option.envvar:
                meaning += f" Environment variable: `{option.envvar}`."
            rows.append(f"| {name} | {f'`{default}`' if shown else ''} | {meaning} |")
    if rows:
        rows = ["| option | default | meaning |", "| --- | --- | --- |", *rows, ""]
    example = (command.epilog or "").replace("\b", "").strip().splitlines()
    return "\n".join(
        [
            f"`vqguard {' '.join([called, *usage, '[OPTIONS]'])}`\n",
            inspect.cleandoc(command.help or "") + "\n",
            *rows,
            "```sh",
            *(line.strip() for line in example[1:]),
            "```\n",
        ]
    )


def configuration() -> str:
    """The page of the settings: one table for each configuration class."""
    parts = [
        "# Configuration\n",
        NOTE,
        "A recipe is a YAML file; `--config` reads it and `--set key=value` changes one setting "
        "(`--set stage.key=value` inside a nested part). Unknown, missing and mistyped keys are "
        "refused, all of them at once, each with the nearest valid name. Values of a recipe that "
        "comes with the package may differ from the defaults below.\n",
    ]
    for config in config_classes():
        parts += [f"## {config.__name__}\n", f"{_summary(config)}\n", _table(config)]
    return "\n".join(parts)


def config_classes() -> list[type[StrictConfig]]:
    """The public configuration classes, in the order of their modules."""
    found: dict[str, type[StrictConfig]] = {}
    for package in map(importlib.import_module, CONFIG_PACKAGES):
        for info in pkgutil.iter_modules(package.__path__):
            source = Path(package.__path__[0], f"{info.name}.py")
            if info.ispkg or "StrictConfig)" not in source.read_text(encoding="utf-8"):
                continue  # spares the imports of all the rest
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            # Classes are defined before those that contain them: the outermost one leads.
            for name, member in reversed(vars(module).items()):
                if (
                    isinstance(member, type)
                    and issubclass(member, StrictConfig)
                    and "__dataclass_fields__" in vars(member)
                    and member.__module__ == module.__name__
                    and not name.startswith("_")
                ):
                    found[f"{member.__module__}.{name}"] = member
    return list(found.values())


def _summary(config: type[StrictConfig]) -> str:
    return inspect.getdoc(config) or ""


def _table(config: type[StrictConfig]) -> str:
    docs = config.field_docs()
    hints = typing.get_type_hints(config)
    described = any(field.name in docs for field in _fields(config))
    rows = ["| key | type | default |" + (" meaning |" if described else "")]
    rows.append("| --- | --- | --- |" + (" --- |" if described else ""))
    for field in _fields(config):
        cells = [f"`{field.name}`", _type_name(hints[field.name]), _default(field)]
        if described:
            cells.append(" ".join(docs.get(field.name, "").split()))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _fields(config: type[StrictConfig]) -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(typing.cast("Any", config))


def _type_name(kind: Any) -> str:
    if isinstance(kind, type) and not typing.get_args(kind):
        if issubclass(kind, StrictConfig):
            return f"[{kind.__name__}](#{kind.__name__.lower()})"
        return kind.__name__
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f"`{option}`" for option in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Union:  # what `|` of an annotated type becomes
        return " | ".join(_type_name(part) for part in typing.get_args(kind)).replace(
            "NoneType", "None"
        )
    return str(kind).replace("typing.", "").replace("pathlib.", "").replace("NoneType", "None")


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if value is dataclasses.MISSING:
        if field.default_factory is dataclasses.MISSING:
            return "required"
        value = field.default_factory()
    if isinstance(value, StrictConfig):
        return "its defaults"
    return f"`{value}`" if not isinstance(value, str) or value else '`""`'


def decisions(folder: Path) -> str:
    """The list of the decisions, each by its title."""
    rows = [f"- [{title}]({path.name})" for path, title in _titles(folder)]
    return "\n".join(
        [
            "# Decisions\n",
            NOTE,
            "Where the paper is silent, or something else was chosen than a reader would expect: "
            "context, choice, consequence and source, one page each.\n",
            *(rows or ["None is written down yet."]),
            "",
        ]
    )


def _titles(folder: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(folder.glob("*.md")):
        if path.name != "index.md":
            lines = path.read_text(encoding="utf-8").splitlines()
            heading = next((line for line in lines if line.startswith("# ")), f"# {path.stem}")
            yield path, heading[2:].strip()


BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def write_results(run: Path, readme: Path, page: Path) -> None:
    """Fill README's table and write the results page from ``run``'s report.json.

    Raises:
        DataError: the report is missing or not valid.
        InputError: ``readme`` does not hold the two markers, once each and in order.
    """
    records = read_records(run / "report.json")
    text = readme.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended or BEGIN in rest or END in after:
        raise InputError(f"{readme}: expected {BEGIN} and {END}, once each and in this order.")
    table = readme_results(records)
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    page.write_text(results_page(records), encoding="utf-8")


def readme_results(records: Sequence[Record]) -> str:
    """The report's headline, without the notes of its cells."""
    return f"{headline_markdown(records)}\n\n{INTERVALS} {made_by(records)} {ALL_TABLES}"


ALL_TABLES = "The controls, every category and the cost: [docs/results.md](docs/results.md)."


STRONGER = "Stronger attacks than those of every report: [red team](red-team.md)."


def results_page(records: Sequence[Record]) -> str:
    """The results page: the tables of a report."""
    parts = ["# Results\n", "<!-- Written by docs/generate.py from a run's report.json. -->\n"]
    parts.append(f"{INTERVALS} {made_by(records)} {STRONGER}\n")
    return "\n".join([*parts, *tables_markdown(records, THREAT_MODELS)])


THREAT_MODELS = {
    "Jailbreak by image": (
        "The paper's attacker has no gradient behind the argmin; the adaptive one passes it "
        "straight through. See the [threat model](threat-model.md).\n",
    )
}


def main(arguments: list[str]) -> int:
    """Run the script; returns its exit code."""
    try:
        if arguments == ["pages"]:
            for path, text in pages().items():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
                print(path.relative_to(ROOT))
            return 0
        if len(arguments) == 2 and arguments[0] == "results":
            write_results(Path(arguments[1]), ROOT / "README.md", DOCS / "results.md")
            return 0
        if len(arguments) > 1 and arguments[0] == "red-team":
            folders = [Path(folder) for folder in arguments[1:]]
            _beside("red_team_page").fill_red_team(folders, DOCS / "red-team.md")
            return 0
    except VQGuardError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print((__doc__ or "").strip(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
