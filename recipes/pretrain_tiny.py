"""Makes llava-tiny's base model: the undefended model that the demonstration retrofits.

Phase one teaches the vision tower (`vision.py`), phase two projector and language model
(`grounding.py`). Then the base is measured, because a base that is weak or cannot be broken proves
nothing about a guard.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from vqguard.adapters.storage.folder_lock import only_writer
from vqguard.errors import ConfigError
from vqguard.files import RESUME_OR_ANOTHER, require_empty
from vqguard.recipes.evaluation.jailbreak import Jailbreak, JailbreakFindings
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.evaluation.machine import machine
from vqguard.recipes.evaluation.result import REPORT_HTML, REPORT_JSON
from vqguard.recipes.evaluation.utility import measure_utility
from vqguard.recipes.recipe import AttackRecipe
from vqguard.recipes.report.page import render_report
from vqguard.recipes.tiny.grounding import (
    GroundedLanguage,
    TurnEncoder,
    start_attention_as_matching,
)
from vqguard.recipes.tiny.language import Compliance
from vqguard.recipes.tiny.loop import PhaseConfig, run_phase
from vqguard.recipes.tiny.model import TinySizes, build_model, build_tokenizer
from vqguard.recipes.tiny.vision import SupervisedTower, cache_features, train_scenes
from vqguard.recipes.tiny.weights import load_base, save_base
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training.progress import read_steps
from vqguard.records import Record, write_records
from vqguard.redteam import ThreatModel
from vqguard.strict import StrictConfig

log = logging.getLogger(__name__)

WEIGHTS_FOLDER = "weights"
RECIPE = "pretrain.yaml"


@dataclass(frozen=True)
class PretrainRecipe(StrictConfig):
    """All that decides the base model."""

    sizes: TinySizes = field(default_factory=TinySizes)
    """Widths and depths."""
    vision: PhaseConfig = field(
        default_factory=lambda: PhaseConfig(steps=480, batch=128, learning_rate=1.5e-3)
    )
    """Phase one: the vision tower."""
    language: PhaseConfig = field(
        default_factory=lambda: PhaseConfig(steps=1800, batch=12, learning_rate=1e-3)
    )
    """Phase two: projector and language model."""
    scenes: int = 16000
    """Scenes whose features phase two uses."""
    compliance: Compliance = field(default_factory=Compliance)
    """How far forbidden requests pass (see `language.py`)."""
    questions: int = 300
    """Held-out questions a task in the report."""
    attack: AttackRecipe = field(
        default_factory=lambda: AttackRecipe(
            eps_255=(16, 255), requests=60, steps=100, universal_steps=100
        )
    )
    """The report's attacks."""
    seed: int = 0
    """Seed of weights, scenes, texts and attacks."""


@dataclass(frozen=True)
class PretrainResult:
    """Where the weights and the small report are."""

    weights: Path
    report_json: Path
    records: list[Record]


def load_pretrain_recipe(path: Path | None) -> PretrainRecipe:
    """The recipe in a YAML file, or the one that made the shipped weights."""
    return PretrainRecipe() if path is None else PretrainRecipe.from_yaml(path)


def pretrain(
    recipe: PretrainRecipe, output: Path, *, resume: bool = False, command: str
) -> PretrainResult:
    """Train, save and measure a base model.

    Args:
        output: gets `vision.*` and `language.*` (checkpoints and metrics), `weights/` and
            the report.
        resume: go on from the last checkpoint of the same recipe.

    Raises:
        ConfigError: `output` holds something already, or another recipe's run, or is being written
            by another process.
        TrainingError: a loss is not finite.
    """
    with only_writer(output):
        _open(recipe, output, resume)
        return _pretrain(recipe, output, resume, command)


def _pretrain(recipe: PretrainRecipe, output: Path, resume: bool, command: str) -> PretrainResult:
    torch.manual_seed(recipe.seed)
    tokenizer = build_tokenizer()
    model = build_model(recipe.sizes, tokenizer)
    if not (output / WEIGHTS_FOLDER / "card.json").exists():
        _train(recipe, model, tokenizer, output, resume)
        card = {
            "model": "llava-tiny",
            "command": command,
            "seed": recipe.seed,
            "sizes": recipe.sizes.to_dict(),
            "recipe": recipe.to_dict(),
            "glyphs": "Twemoji, by Twitter, Inc. and other contributors, CC-BY 4.0",
        }
        save_base(model, output / WEIGHTS_FOLDER, card)
    return report_base(recipe, output, command=command)


def _train(recipe: PretrainRecipe, model: Any, tokenizer: Any, output: Path, resume: bool) -> None:
    tower = SupervisedTower(model.model.vision_tower, recipe.sizes)
    run_phase(
        "vision",
        tower,
        lambda step: tower.loss(
            train_scenes(recipe.seed, step * recipe.vision.batch, recipe.vision.batch)
        ),
        recipe.vision,
        output,
        resume=resume,
    )
    start_attention_as_matching(model)
    log.info("features of %d scenes", recipe.scenes)
    scenes = train_scenes(recipe.seed, 0, recipe.scenes)
    grounded = GroundedLanguage(
        model,
        TurnEncoder(tokenizer, recipe.sizes.patches),
        scenes,
        cache_features(model, scenes),
        recipe.sizes,
        seed=recipe.seed,
        compliance=recipe.compliance,
    )
    run_phase(
        "language",
        grounded,
        lambda step: grounded.loss(step, recipe.language.batch),
        recipe.language,
        output,
        resume=resume,
    )


def report_base(recipe: PretrainRecipe, output: Path, *, command: str) -> PretrainResult:
    """Measure saved weights: utility on held-out scenes, and how easily pictures break them."""
    model, processor = load_base(output / WEIGHTS_FOLDER)
    ledger = Ledger(command, recipe.seed)
    world = TinyWorld(recipe.seed)
    tasks = {task: list(world.questions(task, recipe.questions)) for task in world.tasks}
    measure_utility(ledger, "base", model, processor, tasks)
    findings = JailbreakFindings()
    cases = world.attack_cases(Jailbreak.cases_needed(recipe.attack))
    attacks = Jailbreak(recipe.attack, cases, processor, recipe.seed)
    attacks.measure(ledger, "base", model, findings)
    metadata = {
        "title": "llava-tiny: the undefended base",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "seed": recipe.seed,
        "model": "llava-tiny",
        "recipe": recipe.to_dict(),
        "machine": machine(),
        "threat_models": {ThreatModel.WHITE_BOX.value: ThreatModel.WHITE_BOX.sentence},
        "notes": findings.notes,
    }
    training = {n: read_steps(output / f"{n}.jsonl") for n in ("vision", "language")}
    sections = {"series": {"training": training, "attack_losses": findings.losses}}
    write_records(output / REPORT_JSON, ledger.records, metadata, sections)
    render_report(output / REPORT_JSON, output / REPORT_HTML)
    return PretrainResult(output / WEIGHTS_FOLDER, output / REPORT_JSON, ledger.records)


def _open(recipe: PretrainRecipe, output: Path, resume: bool) -> None:
    path = output / RECIPE
    if not (resume and path.exists()):
        require_empty(output, RESUME_OR_ANOTHER)
    elif PretrainRecipe.from_yaml(path) != recipe:
        raise ConfigError(f"{output} holds another recipe's run. Name another --output.")
    recipe.to_yaml(path)
