"""What the two stages share: transformers.Trainer with frozen parts that are proven frozen.

A stage says what it trains and what its loss is. Here is the rest but checkpoints (`checkpoints`):
engines, checksums of everything frozen, one line of figures a step, progress on stderr. In several
processes (DDP, FSDP2, DeepSpeed) every decision is taken from figures of all of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from vqguard.adapters import VisualFeatures, encoder_features, get_adapter
from vqguard.adapters.base import Adapter
from vqguard.adapters.passes.where_read import only_where_read
from vqguard.adapters.runtime.code_training import training_codes
from vqguard.distributed import rank_and_world, shared_sum
from vqguard.errors import ConfigError, FrozenTensorMovedError, TrainingError
from vqguard.files import checksums
from vqguard.recipes.data.encoding import (
    CODES,
    ENCODER_SEMANTIC,
    ENCODER_TOKENS,
    IGNORED,
    Collator,
    EncodedSamples,
    pad_id,
)
from vqguard.recipes.processes import is_first, launched, wait
from vqguard.recipes.recipe import StageRecipe
from vqguard.recipes.training.arguments import training_arguments
from vqguard.recipes.training.batches import Share, SharedBatches, by_length, shares
from vqguard.recipes.training.checkpoints import CheckpointedTrainer, last_checkpoint, step_of
from vqguard.recipes.training.engines.engine import choose_engine
from vqguard.recipes.training.nf4 import hold_in_4_bits, take_back
from vqguard.recipes.training.progress import StepLog
from vqguard.recipes.training.step import (
    hold_in_bf16,
    in_halves,
    micro_batches,
    vision_at_rest,
    warn_of_slow_bf16,
)
from vqguard.recipes.training.vision_aside import vision_aside

log = logging.getLogger(__name__)

VISION = "vision.safetensors"


class StageTrainer(CheckpointedTrainer):
    """One stage over a guarded (or, for a control, plain) model.

    Args:
        model: changed in place; `run` returns it.
        recipe: the stage's numbers.
        data: encoded samples, the same in every process.
        folder: where checkpoints (`checkpoint-N`) and `metrics.jsonl` go.
        seed: order of the samples.
    """

    stage: ClassVar[str]
    any_order: ClassVar[bool] = True
    """Whether a step is the same in any order of its samples, but for rounding."""

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: StageRecipe,
        data: EncodedSamples,
        folder: Path,
        *,
        seed: int,
    ) -> None:
        if self.any_order and launched() == 1 and not torch.cuda.is_available():
            recipe = in_halves(recipe)
        self.recipe = recipe
        self.folder = folder
        self.adapter: Adapter = get_adapter(model)
        self.parts: list[dict[str, float]] = []
        self.shares: list[Share] = []
        self.whole_layers = hold_in_4_bits(model, self.adapter, recipe) if recipe.nf4 else {}
        trained = self.trainable(model)
        names = {name for name, _ in trained}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        if recipe.bf16:
            warn_of_slow_bf16()
            hold_in_bf16(model)
        if launched() != rank_and_world()[1]:
            raise ConfigError(
                f"{launched()} processes were launched and {rank_and_world()[1]} are in the "
                "group: train inside vqguard.recipes.processes.together()"
            )
        each, _ = micro_batches(recipe, launched())
        self.batches = SharedBatches(len(data), recipe.batch, each, seed)
        self.steps = math.ceil(recipe.epochs * self.batches.steps)
        arguments = training_arguments(
            recipe, folder, seed=seed, devices=launched(), steps=self.batches.steps
        )
        settings = vars(model.config)
        use_cache = settings.get("use_cache")
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=Collator(pad_id(data.processor)),
        )
        # The trainer turns the cache off in the config, where it would stay in the saved model. The
        # steps here say so themselves.
        if use_cache is None:
            settings.pop("use_cache", None)
        else:
            settings["use_cache"] = use_cache
        self.engine = choose_engine(self)
        self.engine.prepare(recipe)
        # The losses are means over a micro batch: the trainer must divide by their number.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.step_log = StepLog(
            self.stage, folder / "metrics.jsonl", self._figures, shown=is_first()
        )
        self.add_callback(self.step_log)
        self.add_callback(_Epochs(self.batches, data))

    # -- what a stage says

    @abstractmethod
    def trainable(self, model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
        """The parameters that this stage trains; all others are frozen and checked."""

    @abstractmethod
    def losses(
        self, model: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The stage's loss (a scalar) and its parts, for the log."""

    # -- the run

    def run(self, *, resume: bool) -> PreTrainedModel:
        """Train, from the last whole checkpoint if asked to, and return the trained model.

        It is the model that was given; with FSDP another one, whole and on the CPU, in every
        process, as the given one's weights were taken apart. Where the data are codes it trains
        without its vision encoder, whose weights wait on disk.

        Raises:
            ConfigError: there are checkpoints already and `resume` is false.
            FrozenTensorMovedError: a frozen tensor changed.
            TrainingError: a loss is not finite, or a checkpoint could not be written.
        """
        data: Any = self.train_dataset
        if data.codes is None:
            return self._run(resume=resume)
        with vision_aside(self.model, self.folder / VISION) as aside:
            trained = self._run(resume=resume)
            if aside is not None:
                aside.put_back(trained, torch.bfloat16 if self.recipe.bf16 else None)
        return trained

    def _run(self, *, resume: bool) -> PreTrainedModel:
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint = last_checkpoint(self.folder)
        wait()  # nobody writes a checkpoint before all have looked
        if checkpoint is not None and not resume:
            raise ConfigError(
                f"{self.folder} holds checkpoints of an earlier run. Go on with --resume, or name "
                "another --output."
            )
        if checkpoint is not None:
            self.check_engine_of(checkpoint)
            log.info("%s: resuming from %s", self.stage, checkpoint.name)
        before = self._frozen_checksums()
        given: Any = self.model
        if checkpoint is not None and step_of(checkpoint) >= self.steps:
            # Stopped behind its last step: the trainer would take one more where the last epoch
            # is not a whole one.
            self._load_from_checkpoint(str(checkpoint), given)
        else:
            self.engine.before_training(given)
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        after = self._frozen_checksums()
        moved = [name for name, value in after.items() if before[name] != value]
        if moved:
            raise FrozenTensorMovedError(
                f"{self.stage} must leave these tensors as they were, and they changed: "
                f"{', '.join(moved[:5])}{' …' if len(moved) > 5 else ''}. Nothing of this stage "
                "was kept. Look for code that writes to them (a callback, tied weights)."
            )
        trained = self.engine.trained_model(given)
        self.after_training(trained)
        if self.recipe.bf16:
            # Under autocast the trained weights were rounded to this for every product anyway.
            trained.to(torch.bfloat16)
        result: PreTrainedModel = trained
        return result

    def after_training(self, model: PreTrainedModel) -> None:
        """What a stage does with its result."""
        take_back(model, self.whole_layers)

    def _frozen_checksums(self) -> dict[str, str]:
        """Of each frozen tensor; a collective call where weights are sharded."""
        model: Any = self.model
        frozen = {
            name: checksums({name: self.engine.whole(p.detach())})[name]
            for name, p in model.named_parameters()
            if not p.requires_grad
        }
        # Statistics of a batch normalisation move without any gradient.
        base: Any = self.accelerator.unwrap_model(model)
        for number, module in enumerate(self.adapter.vision_modules(base)):
            buffers = {f"vision encoder {number}, {n}": b for n, b in module.named_buffers()}
            frozen |= checksums(buffers)
        return frozen

    def get_train_dataloader(self) -> DataLoader[Any]:
        data: Any = self.train_dataset
        return DataLoader(
            data,
            batch_sampler=self.batches,
            collate_fn=list,  # put together once a whole step is known, in `get_batch_samples`
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        examples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        cut = by_length(examples) if self.any_order else examples
        batches = [self.data_collator(micro) for micro in cut]
        if batches:
            self.shares = shares(batches, device)
        return batches, items

    def by_tokens(self, mean: torch.Tensor) -> torch.Tensor:
        """A mean over this micro batch's answer tokens as its part of the step's mean."""
        factor = self.shares[len(self.parts)].tokens
        return mean if factor == 1.0 else mean * factor

    def by_samples(self, mean: torch.Tensor) -> torch.Tensor:
        """A mean over this micro batch's samples as its part of the step's mean."""
        factor = self.shares[len(self.parts)].samples
        return mean if factor == 1.0 else mean * factor

    def by_turns(self, mean: torch.Tensor) -> torch.Tensor:
        """A mean over this micro batch's turns with pictures as its part of the step's mean."""
        factor = self.shares[len(self.parts)].turns
        return mean if factor == 1.0 else mean * factor

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*arguments, **keywords)
        if self.accelerator.sync_gradients:
            self.engine.after_backward()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if return_outputs:
            raise TrainingError("this trainer trains; it does not evaluate")
        given = dict(inputs)
        # The trainer puts the whole model into training mode at every step.
        vision_at_rest(self.accelerator.unwrap_model(model), self.adapter)
        with self._features(model, given):
            loss, parts = self.losses(model, given)
        named = {"loss": loss, **parts}
        values = torch.stack([value.detach().double() for value in named.values()])
        # Of all processes: a figure that is not finite in one of them stops them all.
        means = (shared_sum(values) / rank_and_world()[1]).tolist()
        figures = dict(zip(named, means, strict=True))
        bad = [name for name, value in figures.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{self.stage}, step {self.state.global_step}: {', '.join(bad)} is not finite "
                f"({figures}). Lower {self.stage}.learning_rate (now "
                f"{self.recipe.learning_rate:g}) and go on with --resume."
            )
        self.parts.append(figures)
        return loss

    def _features(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Take codes or the vision encoder's kept outputs out of a batch, and use them for pixels.

        A batch that has none keeps its pixels.
        """
        codes = inputs.pop(CODES, None)
        if codes is not None:
            return training_codes(self.accelerator.unwrap_model(model), codes)
        tokens, semantic = inputs.pop(ENCODER_TOKENS, None), inputs.pop(ENCODER_SEMANTIC, None)
        if tokens is None:
            return contextlib.nullcontext()
        base: Any = self.accelerator.unwrap_model(model)
        return encoder_features(base, VisualFeatures(tokens, semantic))

    def reading(self, labels: torch.Tensor) -> contextlib.AbstractContextManager[None]:
        """Inside, a processor's forward pass computes logits (B, L) only where a label is.

        Not where weights are shared out, or activations are computed again in the backward pass.
        """
        many = launched() > 1 or self.recipe.gradient_checkpointing
        if many or labels.device.type != "cpu":
            return contextlib.nullcontext()
        read = torch.zeros_like(labels, dtype=torch.bool)
        read[:, :-1] = labels[:, 1:] != IGNORED
        return only_where_read(self.accelerator.unwrap_model(self.model), read)

    def _figures(self) -> dict[str, float]:
        """The step's figures: means over its micro batches. A collective call in some stages."""
        steps, self.parts = self.parts, []
        return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}


class _Epochs(TrainerCallback):
    """Tells batches and data which epoch begins; a resumed run begins in the middle."""

    def __init__(self, batches: SharedBatches, data: EncodedSamples) -> None:
        self.batches = batches
        self.data = data

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.batches.epoch = self.data.epoch = state.global_step // self.batches.steps
