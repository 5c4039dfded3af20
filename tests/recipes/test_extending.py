"""The code in docs/extending.md is run as it stands there, each block as the one file it names."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from tests.layout import ROOT, source_of, tomllib
from vqguard import GuardConfig, SafetyMap, VQGuard, verdict_rules
from vqguard.adapters import list_models, one_codeword_probe, registry
from vqguard.adapters.families import registration
from vqguard.errors import ArtefactError, TrainingError
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.evaluation.jailbreak import Jailbreak, JailbreakFindings
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.extensions import import_extension
from vqguard.recipes.recipe import AttackRecipe, Stage1Recipe
from vqguard.recipes.report.page import render_report
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training.engines import engine as engine_module
from vqguard.recipes.training.stage1 import Stage1Trainer
from vqguard.records import read_records, write_records
from vqguard.redteam import threat_models
from vqguard.search import backend_table, make_search
from vqguard.search.settle import settle

pytestmark = pytest.mark.alone  # an adapter is tried in a process of its own
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r'^```\w+ title="([^"]+)"\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE))
MakeModel = Callable[..., tuple[Any, Any]]


@pytest.fixture
def add(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_tables: None
) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a block of the page as a module; attacks and gradient modes leave their tables again.

    What enters another table is taken out by its test.
    """
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write_and_import(name: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(BLOCKS[f"{name}.py"], encoding="utf-8")
        assert import_extension(name) == ()  # as `--adapter-module` does
        return sys.modules[name]

    yield write_and_import
    for name in set(sys.modules) - before:
        if f"{name}.py" in BLOCKS:
            del sys.modules[name]


def test_every_part_of_the_table_has_its_code_and_all_code_is_run() -> None:
    assert list(BLOCKS) == [
        "my_attack.py",
        "my_gradient.py",
        "aurora_model.py",
        "aurora.py",
        "pyproject.toml",
        "prove_aurora.py",
        "my_rule.py",
        "my_search.py",
        "my_engine.py",
    ]
    assert len(re.findall(r"^```(?:python|toml)", PAGE, re.MULTILINE)) == len(BLOCKS)


def test_an_attack_and_a_gradient_mode_stand_in_a_report(
    add: Callable[[str], ModuleType],
    small_guarded: MakeModel,
    tmp_path: Path,
) -> None:
    add("my_attack")
    add("my_gradient")
    model, processor = small_guarded()
    guard = model.vqguard
    counts = torch.tensor([[0, 9]] * 8)  # all semantic cells are neutral
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))
    recipe = AttackRecipe(
        eps_255=(16,), requests=2, steps=1, adaptive_steps=1, universal_requests=0
    )
    ledger, findings = Ledger("a command", 0), JailbreakFindings()
    Jailbreak(recipe, TinyWorld(0).attack_cases(2), processor, 0).measure(
        ledger, "guarded", model, findings
    )

    sentences = {threat.value: threat.sentence for threat in threat_models()}
    losses = {"attack_losses": findings.losses}
    write_records(
        tmp_path / "report.json", ledger.records, {"threat_models": sentences}, {"series": losses}
    )
    records = read_records(tmp_path / "report.json")
    ran = [(r.condition["attack"], r.condition["gradient"]) for r in records]
    for gradient in ("stopped", "straight_through", "half"):
        assert [attack for attack, mode in ran if mode == gradient] == [
            "none",
            "per_request",
            "fgsm",
        ]
    record = next(r for r in records if r.condition == {**r.condition, "attack": "fgsm"})
    assert (record.n, record.condition["eps_255"]) == (2, 16)
    assert records[-1].threat_model == "adaptive_half"

    render_report(tmp_path / "report.json", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<th scope="row">FGSM, ε 16/255</th>' in page
    assert '<th scope="col">Guarded · half-way (adaptive)</th>' in page
    assert "takes half of the straight-through gradient" in page


def test_the_step_of_the_attack_goes_down(add: Callable[[str], ModuleType]) -> None:
    class Brightness:
        """An attacker who wants dark pictures."""

        requests = 1

        def loss(self, pixels: torch.Tensor, request: torch.Tensor) -> torch.Tensor:
            return pixels.flatten(1).mean(dim=1)

        def succeeded(self, pixels: torch.Tensor, request: torch.Tensor) -> torch.Tensor:
            return pixels.flatten(1).amax(dim=1) < 0.45

    attack: Any = add("my_attack").SingleStep
    clean = torch.full((1, 3, 4, 4), 0.5)
    assert not attack(eps_255=8)(Brightness(), clean).success.any()
    broken = attack(eps_255=16)(Brightness(), clean)
    assert broken.success.all()
    assert torch.allclose(broken.adversarial, clean - 16 / 255)


# After the page's own proof, which builds the model, guards it and runs the probe.
INSIDE = """
import aurora_model
from vqguard.adapters import get_adapter, list_models
assert "aurora-7b" in [entry.name for entry in list_models()]
from prove_aurora import model
adapter = get_adapter(model)
assert adapter.projector(model) is model.model.bridge
from vqguard.adapters.proof.random_models.conformance_table import run_family
assert run_family("aurora")["status"] == "guarded"
print("in", type(adapter).__module__)
"""


def write_blocks(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text(BLOCKS[name], encoding="utf-8")


def test_an_adapter_inside_is_one_file_and_one_line(tmp_path: Path) -> None:
    """In a copy of the project."""
    for name in ("vqguard", "vqguard.adapters"):
        shutil.copytree(source_of(name), tmp_path / name.replace(".", "/"))
    families = tmp_path / "vqguard" / "adapters" / "families"
    write_blocks(families, "aurora.py")
    table = families / "__init__.py"
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace('    "llava",\n', '    "llava",\n    "aurora",\n'))
    write_blocks(tmp_path, "aurora_model.py", "prove_aurora.py")
    done = subprocess.run(
        [sys.executable, "-c", INSIDE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "ProbeResult(forward_delta=0.0, generate_same=True" in done.stdout
    assert done.stdout.endswith("in vqguard.adapters.families.aurora\n")


@pytest.fixture
def open_families(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test enters in the tables of adapters, here and in transformers, is gone after it."""
    monkeypatch.setattr(registration, "_ADAPTERS", dict(registry.registered()))
    monkeypatch.setattr(registration, "_FAMILIES", dict(registration.family_table()))
    for mapping in (CONFIG_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))


def test_an_adapter_outside_is_a_package(
    add: Callable[[str], ModuleType], open_families: None, tmp_path: Path
) -> None:
    """As pip lays out an installed package: its module beside its metadata."""
    package = tomllib.loads(BLOCKS["pyproject.toml"])
    assert package["tool"]["setuptools"]["py-modules"] == ["aurora"]
    project = package["project"]
    metadata = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")
    write_blocks(tmp_path, "aurora.py", "aurora_model.py", "prove_aurora.py")

    importlib.import_module("aurora_model")
    registry.adapter_for_type("llava")
    assert "aurora" not in sys.modules, "imported before a model of its type was met"
    proof = importlib.import_module("prove_aurora")
    assert proof.result.passed
    adapter = registry.get_adapter(proof.model)
    assert type(adapter) is sys.modules["aurora"].AuroraAdapter
    assert adapter.projector(proof.model) is proof.model.model.bridge
    assert "aurora-7b" in [entry.name for entry in list_models()]

    shape, generator = proof.inputs["pixel_values"].shape, torch.Generator().manual_seed(0)
    same = {**proof.inputs, "pixel_values": torch.randn(shape, generator=generator)}
    assert one_codeword_probe(proof.model, same).control_delta == 0, "the page says so"


def test_a_verdict_rule_calibrates_judges_and_is_saved(
    add: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdict_rules, "_RULES", dict(verdict_rules._RULES))
    add("my_rule")
    guard = VQGuard(GuardConfig(4, 4, patch_codes=6, semantic_codes=4)).eval()
    words = guard.semantic.lookup(torch.arange(4))
    guard.safety_map = SafetyMap.calibrate(
        torch.tensor([[0], [1], [2], [3]]),
        ["gun", "gun", "neutral", "neutral"],
        semantic_codes=4,
        tau=0.6,
        rule="mean",
        codebook_checksum=guard.checksum("semantic"),
    )
    guard.save_pretrained(tmp_path / "guard")
    saved = json.loads((tmp_path / "guard" / "guard.json").read_text())
    assert saved["safety_map"]["rule"] == "mean"

    again = VQGuard.from_pretrained(tmp_path / "guard")
    images = words[torch.tensor([[0, 2, 2], [0, 1, 3], [0, 0, 2]])]
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool()
    verdicts = again.judge(images, mask)
    assert [round(verdict.probability, 3) for verdict in verdicts] == [0.5, 1.0, 0.667]
    assert [verdict.flagged for verdict in verdicts] == [False, True, True]

    monkeypatch.delitem(verdict_rules._RULES, "mean")
    with pytest.raises(ArtefactError, match="rule 'mean', which is not known here"):
        VQGuard.from_pretrained(tmp_path / "guard")


def every_pair(queries: torch.Tensor, codewords: torch.Tensor) -> torch.Tensor:
    """The answer by its definition: all distances in float64, ties to the lowest index."""
    rows = torch.arange(len(queries)).repeat_interleave(len(codewords))
    columns = torch.arange(len(codewords)).repeat(len(queries))
    nearest = torch.empty(len(queries), dtype=torch.int64)
    settle(queries, codewords, rows, columns, nearest)
    return nearest


def test_a_search_back_end_answers_exactly(
    add: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_table, "_BACKENDS", dict(backend_table._BACKENDS))
    backend: Any = add("my_search").Float64Search
    generator = torch.Generator().manual_seed(0)
    codewords = torch.randn(60, 8, generator=generator)
    codewords[40] = codewords[7]  # a tie, which goes to the lowest index
    midpoints = (codewords[:30] + codewords[30:]) / 2
    queries = torch.cat([torch.randn(200, 8, generator=generator), codewords, midpoints])

    search = make_search(codewords, backend="float64")
    assert type(search) is backend
    nearest = search(queries)
    assert torch.equal(nearest, every_pair(queries, codewords))
    assert nearest[240] == 7
    assert torch.equal(nearest, make_search(codewords, backend="torch")(queries))
    assert torch.equal(nearest, torch.cat([search(query[None]) for query in queries]))
    search.refresh(codewords.flip(0))
    assert torch.equal(search(queries), every_pair(queries, codewords.flip(0)))

    guard = VQGuard(GuardConfig(8, 8, patch_codes=9, semantic_codes=3, search="float64")).eval()
    tokens = torch.randn(2, 5, 8, generator=generator)
    codes, words = guard(tokens, tokens[:, :1]).codes, guard.patch.lookup(torch.arange(9))
    assert type(guard.patch._current_search(tokens[0]).search) is backend
    assert torch.equal(codes.flatten(), every_pair(tokens.flatten(0, 1), words))


def test_an_engine_trains_as_one_process_does(
    add: Callable[[str], ModuleType],
    small_guarded: MakeModel,
    stage1_recipe: Stage1Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def trainer(folder: str) -> Stage1Trainer:
        model, processor = small_guarded()
        data = EncodedSamples(TinyWorld(0).captions(16), processor, stage1_recipe.max_length)
        recipe = stage1_recipe.override(["samples=16"])
        return Stage1Trainer(model, recipe, data, tmp_path / folder, seed=0)

    def figures(folder: str) -> list[dict[str, float]]:
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        timed = ("seconds", "images_per_second")
        return [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]

    monkeypatch.setattr(engine_module, "ENGINES", list(engine_module.ENGINES))
    engine: Any = add("my_engine").Watchful
    alone = trainer("alone").run(resume=False)
    monkeypatch.setenv("VQGUARD_WATCHFUL", "1")
    watched = trainer("watched")
    assert type(watched.engine) is engine
    trained = watched.run(resume=False)
    assert len(figures("watched")) == 4
    assert figures("watched") == figures("alone")
    for (name, ours), theirs in zip(
        trained.state_dict().items(), alone.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name

    broken: Any = trainer("broken")
    projector = broken.model.model.multi_modal_projector.linear_1.weight
    projector.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(TrainingError, match=r"gradient of .*linear_1\.weight is not finite"):
        broken.run(resume=False)
