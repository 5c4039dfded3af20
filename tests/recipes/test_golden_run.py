"""A run's directory as 0.1 wrote it, before its code moved: it opens, is read, and goes on.

Made with a base of 24 thousand weights by `vqguard retrofit --model llava-tiny`, of few samples
and steps; pictures, the page and the optimisers of what had ended were left out for their size.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.recipes import control as control_module
from vqguard.recipes import retrofit as retrofit_module
from vqguard.recipes.data.feature_cache import CacheIdentity, FeatureCache
from vqguard.recipes.evaluation import world as world_module
from vqguard.recipes.models import control_model
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.retrofit import retrofit
from vqguard.recipes.run import MODEL, RECIPE, open_run
from vqguard.recipes.tiny import weights
from vqguard.recipes.training.progress import read_steps
from vqguard.records import Record, read_record_file, read_records

GOLDEN = Path(__file__).parents[1] / "golden" / "run-1"
COMMAND = "vqguard retrofit --model llava-tiny --output run"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run beside its cache of features, whose folder its recipe names."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    monkeypatch.setattr(weights, "shipped_folder", lambda: GOLDEN / "base")
    # a second process would find the package's own base
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    return Path("run")


def recipe_of(run: Path) -> RetrofitRecipe:
    return RetrofitRecipe.from_yaml(run / RECIPE)


def what_is_measured(records: list[Record]) -> Counter[str]:
    """Everything of the records but the figures; the judge of 0.1, which named none, is global."""
    judged = {"judge": "global"}
    return Counter(
        json.dumps(
            [
                r.metric,
                r.subject,
                dict(sorted({**(judged if _by_a_judge(r) else {}), **r.condition}.items())),
                r.threat_model,
                r.n,
            ]
        )
        for r in records
    )


def _by_a_judge(record: Record) -> bool:
    return record.metric in ("dsr", "fpr") and record.subject == "guarded"


def test_it_opens_and_judges(run: Path) -> None:
    opened = open_run(run)
    (verdict,) = opened.screen_images([Image.new("RGB", (96, 96), "grey")])
    assert verdict.category in ("neutral", *opened.model.vqguard.safety_map.categories)
    assert control_model(run) is not None


def test_its_files_are_read(run: Path) -> None:
    assert recipe_of(run).guard.patch_codes == 16
    file = read_record_file(run / "report.json")
    assert file.metadata["command"] == COMMAND
    assert len(read_records(run / "report.json")) == 109
    assert [line["step"] for line in read_steps(run / "stage1" / "metrics.jsonl")] == [1, 2, 3, 4]


def test_its_features_are_found(run: Path) -> None:
    folder = recipe_of(run).features.folder
    assert folder is not None
    # A model's identity is its settings too, and transformers adds some.
    made_by = json.loads((folder / "index.json").read_text())["identity"]
    cache = FeatureCache(folder, CacheIdentity(**made_by))
    assert len(cache) == 66
    (picture,) = cache["caption-0"]
    assert picture.tokens.shape == (36, 12)


def test_a_finished_run_is_measured_again_as_it_was(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    for module, name in (
        (retrofit_module, "Stage1Trainer"),
        (retrofit_module, "Stage2Trainer"),
        (control_module, "Stage2Trainer"),
        (control_module, "ProjectorTrainer"),
    ):
        monkeypatch.setattr(module, name, never)
    # Two further processes, which take longer than all of the rest.
    monkeypatch.setattr(world_module, "measure_memory", lambda *_: None)
    before = read_records(run / "report.json")
    patch = open_run(run).model.vqguard.checksum("patch")
    result = retrofit(recipe_of(run), run, resume=True, command=COMMAND)
    assert open_run(run).model.vqguard.checksum("patch") == patch
    kept = [record for record in before if record.metric != "peak_memory_mb"]
    assert what_is_measured(kept) <= what_is_measured(result.records)
    added = what_is_measured(result.records) - what_is_measured(kept)
    assert all('"distractors": 3' in record or '"distractors": 4' in record for record in added)


def test_a_stopped_stage_goes_on_from_its_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = read_steps(run / "stage2" / "metrics.jsonl")
    for gone in (run / MODEL, run / "stage2" / MODEL, Path("features")):
        shutil.rmtree(gone)
    monkeypatch.setattr(retrofit_module, "measure_run", lambda run, command: None)
    retrofit(recipe_of(run), run, resume=True, command=COMMAND)
    steps = read_steps(run / "stage2" / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    for old, new in zip(finished, steps, strict=True):
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-4)
    assert open_run(run).model.vqguard.safety_map is not None
