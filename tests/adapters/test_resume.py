"""Trainer's whole-model checkpoints: a resumed run is the uninterrupted one, guard included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

from vqguard.adapters import GuardedCheckpoints
from vqguard.errors import ArtefactError, ConfigError

Make = Callable[..., Any]


class GuardedTrainer(GuardedCheckpoints, Trainer):
    pass


@pytest.fixture
def samples(make_inputs: Make) -> list[dict[str, torch.Tensor]]:
    found = []
    for seed in range(8):
        inputs = make_inputs((1,), seed)
        one = {"input_ids": inputs["input_ids"][0], "pixel_values": inputs["pixel_values"][0]}
        found.append({**one, "labels": one["input_ids"]})
    return found


def trainer_of(
    cls: type[Trainer], model: Any, samples: Any, folder: Path, steps: int = 4
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=steps,
        save_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return cls(model=model, args=arguments, train_dataset=samples)


@pytest.fixture
def trained(make_guarded: Make, samples: Any, tmp_path: Path) -> Any:
    model = make_guarded(flag=(1, 3))
    with torch.no_grad():  # a trained guard is not what build_guard draws
        model.vqguard.patch.codebook.weight.add_(1)
    model.vqguard.safety_map = None
    trainer_of(GuardedTrainer, model, samples, tmp_path / "run").train()
    return model


def test_resuming_gives_the_uninterrupted_result(
    trained: Any, make_guarded: Make, samples: Any, tmp_path: Path
) -> None:
    again = make_guarded(flag=(1,))
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    trainer_of(GuardedTrainer, again, samples, tmp_path / "again").train(
        resume_from_checkpoint=checkpoint
    )
    expected = trained.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    assert again.vqguard.safety_map is None


def test_a_plain_trainer_is_refused_instead_of_starting_from_other_weights(
    trained: Any, make_guarded: Make, samples: Any, tmp_path: Path
) -> None:
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    # To transformers a guarded model's weights are none at all.
    with pytest.raises(ValueError, match="valid checkpoint"):
        trainer_of(Trainer, make_guarded(), samples, tmp_path / "again").train(
            resume_from_checkpoint=checkpoint
        )
    state = {k: v for k, v in trained.state_dict().items() if not k.startswith("vqguard.")}
    with pytest.raises(ConfigError, match="GuardedCheckpoints"):
        make_guarded().load_state_dict(state)


def test_other_checkpoints_are_refused(
    trained: Any, make_llava: Make, make_guarded: Make, samples: Any, tmp_path: Path
) -> None:
    trainer_of(Trainer, make_llava(), samples, tmp_path / "plain", steps=2).train()
    trainer = trainer_of(GuardedTrainer, make_guarded(), samples, tmp_path / "again")
    with pytest.raises(ArtefactError, match="no guard"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-2"))
    other = make_guarded(site="encoder")
    trainer = trainer_of(GuardedTrainer, other, samples, tmp_path / "again")
    with pytest.raises(ConfigError, match="another configuration"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_load_best_model_at_end_is_refused_before_training_where_it_cannot_work(
    make_guarded: Make, make_llava: Make, samples: Any, tmp_path: Path
) -> None:
    steps: list[int] = []

    class Counted(Trainer):
        def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
            steps.append(1)
            return super().training_step(*arguments, **keywords)

    class CountedAndGuarded(GuardedCheckpoints, Counted):
        pass

    def train(cls: type[Trainer], model: Any) -> None:
        trainer = trainer_of(cls, model, samples, tmp_path / "run")
        trainer.args.load_best_model_at_end = True
        trainer.train()

    with pytest.raises(ConfigError, match="GuardedCheckpoints"):
        train(Counted, make_guarded())
    assert steps == []
    train(CountedAndGuarded, make_guarded())
    train(Counted, make_llava())
    assert len(steps) == 8


def test_the_best_checkpoint_is_restored_whole(
    trained: Any, make_guarded: Make, samples: Any, tmp_path: Path
) -> None:
    again = make_guarded()
    trainer: Any = trainer_of(GuardedTrainer, again, samples, tmp_path / "again")
    trainer.state.best_model_checkpoint = str(tmp_path / "run" / "checkpoint-4")
    trainer._load_best_model()
    expected = trained.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
