"""The documentation follows the code: generated pages, commands, links, the results table."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from vqguard.cli.main import main, program
from vqguard.errors import DataError, InputError
from vqguard.recipes.report.cells import METRIC_LABELS
from vqguard.records import Record, write_records
from vqguard.redteam import GRADIENTS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(generate: ModuleType) -> None:
    for path, text in generate.pages().items():
        assert path.exists(), f"{path} is missing: run `make pages`"
        assert path.read_text(encoding="utf-8") == text, f"{path} is out of date: run `make pages`"


def test_every_setting_of_a_guard_is_described(generate: ModuleType) -> None:
    from vqguard.config import GuardConfig

    assert GuardConfig in generate.config_classes()
    page = generate.configuration()
    for name, text in GuardConfig.field_docs().items():
        assert f"| `{name}` |" in page
        assert " ".join(text.split()) in page


def shell_lines(path: Path) -> Iterator[list[str]]:
    text = path.read_text(encoding="utf-8")
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


COMMANDS = [
    (str(path.relative_to(ROOT)), words)
    for path in PAGES
    for words in shell_lines(path)
    if Path(words[0]).name in ("vqguard", "make")
]


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: str(value)[:60])
def test_a_shown_command_exists(
    page: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert [word for word in words[1:] if "=" not in word and word not in targets] == []
        return
    context = click.Context(program)
    command = program.get_command(context, words[1])
    assert command is not None, f"{page}: no command {words[1]}"
    # The files and modules in examples do not exist; all else about the line is parsed for real.
    monkeypatch.setattr("vqguard.recipes.extensions.import_extension", lambda module: (module,))
    for parameter in command.params:
        if isinstance(parameter.type, click.Path):
            monkeypatch.setattr(parameter.type, "exists", False)
    command.make_context(words[1], list(words[2:]))


def test_settings_shown_with_set_exist() -> None:
    from vqguard.recipes.recipe import load_recipe

    shown = [
        value
        for _, words in COMMANDS
        if words[1] in ("retrofit", "evaluate")
        for option, value in itertools.pairwise(words)
        if option == "--set"
    ]
    assert shown
    load_recipe("llava-tiny").override(shown)


def test_the_readme_opens_with_the_two_commands() -> None:
    first = next(shell_lines(ROOT / "README.md"))
    assert first == ["make", "demo"]
    assert [words[:2] for words in shell_lines(ROOT / "README.md")][1] == ["make", "test"]


def test_the_python_lines_name_what_exists() -> None:
    import vqguard

    for page in (ROOT / "README.md", ROOT / "docs" / "quickstart.md"):
        blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        assert blocks
        for block in blocks:
            compile(block, str(page), "exec")
            for names in re.findall(r"^from vqguard import (.*)$", block, re.MULTILINE):
                assert set(names.split(", ")) <= set(vqguard.__all__)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        if "://" not in target:
            assert (ROOT / target).exists(), f"{name}: {target}"


@pytest.mark.alone
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    loaded = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page)
    assert loaded == [], "the pages load nothing from elsewhere"


def record(metric: str, subject: str, value: float, **condition: str | int) -> Record:
    return Record(
        metric=metric,
        subject=subject,
        condition=condition,
        threat_model="white-box" if metric in ("asr", "dsr") else "none",
        value=value,
        n=60,
        low=max(0.0, value - 0.05),
        high=value + 0.05,
        seed=0,
        command="vqguard retrofit --model llava-tiny",
        versions={"vqguard": "0.1.0"},
    )


@pytest.fixture
def report(tmp_path: Path) -> Path:
    attack: dict[str, str | int] = {"attack": "per_request", "eps_255": 255}
    records = [
        record("naming_single", "base", 0.5),
        record("naming_single", "guarded", 0.25),
        record("dsr", "guarded", 0.75, category="gun", distractors=0),
        record("asr", "base", 0.9, **attack, gradient="plain"),
        record("asr", "guarded", 0.0, **attack, gradient="stopped"),
        record("asr", "guarded", 0.625, **attack, gradient="straight_through"),
        record("new_measure", "guarded", 3.5),
    ]
    write_records(tmp_path / "report.json", records, {})
    return tmp_path


def write_readme(folder: Path, text: str) -> Path:
    readme = folder / "README.md"
    readme.write_text(text, encoding="utf-8")
    return readme


def test_results_fill_the_readme_and_the_page(generate: ModuleType, report: Path) -> None:
    readme = write_readme(report, f"before\n{generate.BEGIN}\nold\n{generate.END}\nafter\n")
    page = report / "results.md"
    generate.write_results(report, readme, page)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{generate.BEGIN}\n")
    assert text.endswith(f"{generate.END}\nafter\n")
    assert "old" not in text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    cells = {row[0].removeprefix("| "): [cell.split(" (")[0] for cell in row[1:]] for row in rows}
    assert cells[METRIC_LABELS["naming_single"]][:2] == ["50.0 %", "25.0 %"]
    (attack,) = (row for label, row in cells.items() if "er request, ε unbounded" in label)
    assert attack == ["90.0 %", "0.0 %", "62.5 %"]  # the paper's attacker, then the adaptive one
    assert cells[METRIC_LABELS["count"]][0] == "not measured"
    assert "`vqguard retrofit --model llava-tiny`" in text
    full = page.read_text(encoding="utf-8")
    assert "| Gun | not measured |" in full
    assert GRADIENTS.named("straight_through").label in full
    assert "New measure" in full  # a metric that no table knows is still shown
    generate.write_results(report, readme, page)
    assert readme.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    "text",
    [
        "no markers",
        "<!-- results:begin --> no end",
        "<!-- results:end --> <!-- results:begin -->",
        "<!-- results:begin --> <!-- results:begin --> <!-- results:end -->",
    ],
)
def test_a_readme_without_its_markers_is_left_alone(
    text: str, generate: ModuleType, report: Path
) -> None:
    readme = write_readme(report, text)
    with pytest.raises(InputError, match="once each"):
        generate.write_results(report, readme, report / "results.md")
    assert readme.read_text(encoding="utf-8") == text
    assert not (report / "results.md").exists()


def test_a_missing_report_is_named(generate: ModuleType, tmp_path: Path) -> None:
    readme = write_readme(tmp_path, f"{generate.BEGIN}{generate.END}")
    with pytest.raises(DataError, match=r"report\.json"):
        generate.write_results(tmp_path, readme, tmp_path / "results.md")


def test_the_script_says_how_it_is_used(
    generate: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main([]) == 2
    assert "generate.py pages" in capsys.readouterr().err
    assert generate.main(["results", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_help_names_the_same_commands_as_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for name in re.findall(r"^## (.*)$", page, re.MULTILINE):
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
