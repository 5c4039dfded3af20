"""An engine is one class and one line: here is one from outside."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import Trainer

from vqguard.errors import ConfigError
from vqguard.recipes.data.encoding import EncodedSamples
from vqguard.recipes.recipe import Stage1Recipe, StageRecipe
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training.checkpoints import last_checkpoint
from vqguard.recipes.training.engines import engine as engine_module
from vqguard.recipes.training.engines.deepspeed import Partitioned
from vqguard.recipes.training.engines.engine import ENGINES, add_engine, choose_engine
from vqguard.recipes.training.engines.fsdp import Sharded
from vqguard.recipes.training.engines.replicated import Replicated
from vqguard.recipes.training.stage1 import Stage1Trainer

asked: list[str] = []


class Recorder(Replicated):
    """One process, written down: an engine as another package would add it."""

    name: ClassVar[str] = "recorder"

    @staticmethod
    def is_asked_for(trainer: Trainer) -> bool:
        return Path(str(trainer.args.output_dir)).name.startswith("recorder")

    def prepare(self, recipe: StageRecipe) -> None:
        asked.append("prepare")
        super().prepare(recipe)

    def before_training(self, model: nn.Module) -> None:
        asked.append("before_training")
        super().before_training(model)

    def after_backward(self) -> None:
        asked.append("after_backward")
        assert any(p.grad is not None for p in self.trainer.model.parameters())
        super().after_backward()

    def restart_rows(
        self, parameter: nn.Parameter, rows: torch.Tensor, states: Iterable[str]
    ) -> None:
        asked.append("restart_rows")
        super().restart_rows(parameter, rows, states)

    def trained_model(self, model: nn.Module) -> Any:
        asked.append("trained_model")
        return super().trained_model(model)

    @property
    def states_file(self) -> str:
        return "recorded.pt"


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "ENGINES", list(ENGINES))
    add_engine(Recorder)
    asked.clear()


def train(make: Any, recipe: Stage1Recipe, folder: Path, *, resume: bool = False) -> Any:
    model, processor = make()
    data = EncodedSamples(TinyWorld(0).captions(recipe.samples), processor, recipe.max_length)
    return Stage1Trainer(model, recipe, data, folder, seed=0).run(resume=resume)


def assert_same(one: Any, two: Any) -> None:
    for (name, here), there in zip(
        one.state_dict().items(), two.state_dict().values(), strict=True
    ):
        assert torch.equal(here, there), name


@pytest.mark.usefixtures("added")
def test_an_engine_from_outside_trains(
    small_guarded: Any, stage1_recipe: Stage1Recipe, tmp_path: Path
) -> None:
    trained = train(small_guarded, stage1_recipe, tmp_path / "recorder")
    assert asked[:3] == ["prepare", "before_training", "after_backward"]
    assert asked.count("after_backward") == 8  # one a step
    assert asked.count("restart_rows") == 2  # both codebooks, at step 3
    assert asked[-1] == "trained_model"
    assert_same(trained, train(small_guarded, stage1_recipe, tmp_path / "alone"))


@pytest.mark.usefixtures("added")
def test_its_checkpoints_are_its_own(
    small_guarded: Any, stage1_recipe: Stage1Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(small_guarded, stage1_recipe, tmp_path / "recorder whole")
    folder = tmp_path / "recorder"
    stopping = dataclasses.replace(stage1_recipe, checkpoint_every=5)

    real, steps = Recorder.after_backward, [0]

    def stop_after_six(engine: Recorder) -> None:
        real(engine)
        steps[0] += 1
        if steps[0] > 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(Recorder, "after_backward", stop_after_six)
    with pytest.raises(KeyboardInterrupt):
        train(small_guarded, stopping, folder)
    monkeypatch.setattr(Recorder, "after_backward", real)
    checkpoint = last_checkpoint(folder)
    assert checkpoint is not None
    assert (checkpoint / "recorded.pt").is_file()
    assert not (checkpoint / "optimizer.pt").exists()
    assert_same(train(small_guarded, stopping, folder, resume=True), whole)

    other = tmp_path / "another"
    folder.rename(other)
    with pytest.raises(ConfigError, match=r"expected .* in optimizer\.pt"):
        train(small_guarded, stopping, other, resume=True)


class Asking:
    """As much of a trainer as the choice looks at."""

    def __init__(self, *, fsdp: bool = False, deepspeed: bool = False) -> None:
        self.is_fsdp_enabled = fsdp
        self.is_deepspeed_enabled = deepspeed
        self.accelerator = type("Accelerator", (), {"state": type("State", (), {})()})()
        self.accelerator.state.distributed_type = None


@pytest.mark.parametrize(
    ("wanted", "settings"),
    [(Replicated, {}), (Sharded, {"fsdp": True}), (Partitioned, {"deepspeed": True})],
)
def test_the_launcher_chooses(wanted: type, settings: dict[str, bool]) -> None:
    trainer: Any = Asking(**settings)
    assert type(choose_engine(trainer)) is wanted


@pytest.mark.usefixtures("added")
def test_a_name_is_given_once() -> None:
    with pytest.raises(ConfigError, match="an engine called 'recorder' already"):
        add_engine(Recorder)


def test_names_tell_engines_apart() -> None:
    assert len({engine.name for engine in ENGINES}) == len(ENGINES)
