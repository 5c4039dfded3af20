"""What the two stages share: transformers.Trainer with frozen parts that are proven frozen.

A stage says what it trains and what its loss is. Here is the rest: checksums of everything frozen,
checkpoints that survive a kill or a full disk, one line of figures a step, progress on stderr.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from vqguard.adapters import VisualFeatures, encoder_features, get_adapter
from vqguard.adapters.base import Adapter
from vqguard.errors import ConfigError, FrozenTensorMovedError, TrainingError
from vqguard.recipes.checksums import checksums
from vqguard.recipes.encode import ENCODER_SEMANTIC, ENCODER_TOKENS, Collator, EncodedSamples
from vqguard.recipes.progress import StepLog
from vqguard.recipes.recipe import StageRecipe

log = logging.getLogger(__name__)

COMPLETE = "complete.json"
TRAINABLE = "trainable.safetensors"


class StageTrainer(Trainer):
    """One stage over a guarded (or, for a control, plain) model.

    Args:
        model: changed in place.
        recipe: the stage's numbers.
        data: encoded samples.
        folder: where checkpoints (``checkpoint-N``) and ``metrics.jsonl`` go.
        seed: order of the samples.
    """

    stage: ClassVar[str]

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: StageRecipe,
        data: EncodedSamples,
        folder: Path,
        *,
        seed: int,
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.adapter: Adapter = get_adapter(model)
        self.parts: list[dict[str, float]] = []
        trained = self.trainable(model)
        names = {name for name, _ in trained}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        if recipe.bf16:
            hold_in_bf16(model)
        each, times = micro_batches(recipe, int(os.environ.get("WORLD_SIZE", "1")))
        steps = math.ceil(recipe.epochs * math.ceil(len(data) / recipe.batch))
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=each,
            gradient_accumulation_steps=times,
            bf16=recipe.bf16,
            use_cpu=recipe.bf16 and not torch.cuda.is_available(),  # else it insists on a GPU
            **(checkpointing() if recipe.gradient_checkpointing else {}),
            num_train_epochs=recipe.epochs,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=math.ceil(recipe.warmup * steps),
            weight_decay=recipe.weight_decay,
            save_strategy="steps",
            save_steps=recipe.checkpoint_every,
            save_total_limit=2,  # the older one is the fall-back while the newer is written
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
            seed=seed,
            data_seed=seed,
        )
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=data,
            data_collator=Collator(pad_id(data.processor)),
        )
        # The losses are means over a micro batch: the trainer must divide by their number.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.step_log = StepLog(self.stage, folder / "metrics.jsonl", self._figures)
        self.add_callback(self.step_log)

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

    def run(self, *, resume: bool) -> None:
        """Train, from the last whole checkpoint if asked to.

        Raises:
            ConfigError: there are checkpoints already and ``resume`` is false.
            FrozenTensorMovedError: a frozen tensor changed.
            TrainingError: a loss is not finite, or a checkpoint could not be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoint = last_checkpoint(self.folder)
        if checkpoint is not None and not resume:
            raise ConfigError(
                f"{self.folder} holds checkpoints of an earlier run. Go on with --resume, or name "
                "another --output."
            )
        before = checksums(self._frozen())
        if checkpoint is not None:
            log.info("%s: resuming from %s", self.stage, checkpoint.name)
        self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        moved = [name for name, value in checksums(self._frozen()).items() if before[name] != value]
        if moved:
            raise FrozenTensorMovedError(
                f"{self.stage} must leave these tensors as they were, and they changed: "
                f"{', '.join(moved[:5])}{' …' if len(moved) > 5 else ''}. Nothing of this stage "
                "was kept. Look for code that writes to them (a callback, tied weights)."
            )
        self.after_training()
        if self.recipe.bf16:
            # Under autocast the trained weights were rounded to this for every product anyway.
            whole: Any = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            whole.to(torch.bfloat16)

    def after_training(self) -> None:
        """What a stage checks of its result."""

    def _frozen(self) -> dict[str, torch.Tensor]:
        model: Any = self.model
        frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        # Statistics of a batch normalisation move without any gradient.
        base: Any = self.accelerator.unwrap_model(model)
        for number, module in enumerate(self.adapter.vision_modules(base)):
            frozen |= {f"vision encoder {number}, {n}": b for n, b in module.named_buffers()}
        return frozen

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
        found = {"loss": loss.item(), **{name: part.item() for name, part in parts.items()}}
        bad = [name for name, value in found.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"{self.stage}, step {self.state.global_step}: {', '.join(bad)} is not finite "
                f"({found}). Lower {self.stage}.learning_rate (now "
                f"{self.recipe.learning_rate:g}) and go on with --resume."
            )
        self.parts.append(found)
        return loss

    def _features(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """Takes the vision encoder's kept outputs, if there are any, out of a batch and uses them
        in place of pixels."""
        tokens, semantic = inputs.pop(ENCODER_TOKENS, None), inputs.pop(ENCODER_SEMANTIC, None)
        if tokens is None:
            return contextlib.nullcontext()
        base: Any = self.accelerator.unwrap_model(model)
        return encoder_features(base, VisualFeatures(tokens, semantic))

    def _figures(self) -> dict[str, float]:
        """The step's figures: means over its micro batches."""
        steps, self.parts = self.parts, []
        return {name: sum(one[name] for one in steps) / len(steps) for name in steps[0]}

    # -- checkpoints: only what is trained, and a mark when all of it is on the disk

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = self.accelerator.unwrap_model(self.model)
        save_file(self._state(model), folder / TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        target: Any = self.model if model is None else model
        stored = load_file(Path(resume_from_checkpoint) / TRAINABLE)
        state = self._state(target)
        if stored.keys() != state.keys():
            raise ConfigError(
                f"{resume_from_checkpoint} holds other tensors than this stage trains. It belongs "
                "to another recipe: use its resolved configuration, or another --output."
            )
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(stored[name])

    def _state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        counts = {n: b for n, b in model.named_buffers() if n.endswith("codebook.counts")}
        return trained | counts

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            sizes = {p.name: p.stat().st_size for p in sorted(folder.iterdir())}
            (folder / COMPLETE).write_text(json.dumps(sizes))
        except Exception as error:
            shutil.rmtree(folder, ignore_errors=True)
            kept = last_checkpoint(self.folder)
            rest = f"{kept} is whole" if kept else "there was no earlier one"
            raise TrainingError(
                f"the checkpoint at step {self.state.global_step} could not be written to {folder} "
                f"({error}); {rest}. Free some space and go on with --resume."
            ) from error


def micro_batches(recipe: StageRecipe, devices: int) -> tuple[int, int]:
    """Samples that a device holds at a time, and how many times it does so for a step.

    Raises:
        ConfigError: the batch cannot be shared out evenly.
    """
    each = recipe.micro_batch or recipe.batch // devices
    if each == 0 or recipe.batch % (each * devices):
        raise ConfigError(
            f"a batch of {recipe.batch} cannot be shared out to {devices} devices that take "
            f"{recipe.micro_batch or 'all of their share'} at a time: set micro_batch so that "
            "batch = micro_batch x devices x a whole number"
        )
    return each, recipe.batch // (each * devices)


def checkpointing() -> dict[str, Any]:
    """The trainer's arguments that turn on gradient checkpointing, under their present names."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing"
    name = name if name in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def checkpointing_on(model: Any) -> None:
    """Turn on gradient checkpointing as the trainer does."""
    name = next(iter(checkpointing()))
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})


def vision_at_rest(model: nn.Module, adapter: Adapter) -> None:
    """Put the frozen vision encoder into eval mode: no dropout, and batch normalisation by its own
    statistics, which training mode would move and replace by the batch's."""
    for module in adapter.vision_modules(model):
        module.eval()


def hold_in_bf16(model: nn.Module) -> None:
    """Frozen weights to bfloat16, trained ones to float32, where the optimiser keeps its precision.

    Codebooks stay in float32, frozen or not: rounding them would change codes and verdicts. So do
    batch normalisations, whose statistics are not parameters and stay in float32 too.
    """
    kept = {id(p) for p in getattr(model, "vqguard", nn.Module()).parameters()}
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kept |= {id(p) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept and parameter.is_floating_point():
            wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
            parameter.data = parameter.data.to(wanted)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder`` that was written to its end, or None."""
    found = sorted(
        (p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()),
        key=lambda p: int(p.name.rpartition("-")[2]),
        reverse=True,
    )
    return next((p for p in found if _whole(p)), None)


def _whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / COMPLETE).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def pad_id(processor: Any) -> int:
    """The id that fills up shorter sequences: the end of text where there is no padding token."""
    tokenizer = processor.tokenizer
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id)
