"""Stage 1, quantiser pre-training: projector and both codebooks learn, all else is frozen.

L = L_generative + lambda_1 (L_vq^patch + L_vq^cls) + lambda_2 L_semantic
(Q-MLLM, arXiv 2511.16229).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.trainer_callback import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments

from vqguard import straight_through
from vqguard.codebooks.guard_output import GuardOutput
from vqguard.codebooks.losses import semantic_loss
from vqguard.codebooks.quantizer import VectorQuantizer
from vqguard.errors import CodebookCollapseError
from vqguard.guard import VQGuard, recording
from vqguard.recipes.data.encoding import CAPTION
from vqguard.recipes.recipe import Stage1Recipe
from vqguard.recipes.training.trainer import StageTrainer

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
LEAST_PERPLEXITY = 0.1  # share of a codebook's size under which it has collapsed


class Stage1Trainer(StageTrainer):
    """Trains F_h, C_cls and C_patch. Dead entries are revived from the step's samples."""

    stage: ClassVar[str] = "stage1"
    any_order: ClassVar[bool] = False  # entries are revived on features drawn by their place
    recipe: Stage1Recipe

    def __init__(self, model: PreTrainedModel, recipe: Stage1Recipe, *args: Any, **kw: Any) -> None:
        super().__init__(model, recipe, *args, **kw)
        self.add_callback(_Revival(self))

    @property
    def guard(self) -> VQGuard:
        model: Any = self.accelerator.unwrap_model(self.model)
        guard: VQGuard = model.vqguard
        return guard

    def trainable(self, model: PreTrainedModel) -> list[tuple[str, nn.Parameter]]:
        return self.adapter.stage1_trainable(model)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        # The codebooks have a rate of their own: they start on k-means centres, not at random.
        codebooks = {id(p) for p in self.guard.parameters()}
        target: Any = self.model
        trained = [p for p in target.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if id(p) not in codebooks]},
            {
                "params": [p for p in trained if id(p) in codebooks],
                "lr": self.recipe.codebook_learning_rate,
            },
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
        )
        return self.optimizer

    def losses(
        self, model: nn.Module, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        caption_ids, caption_mask, pictures, videos = (inputs.pop(name) for name in CAPTION)
        base: Any = self.accelerator.unwrap_model(model)
        hidden = self.adapter.caption_hidden
        caption = self.engine.run_part(base, hidden, caption_ids, caption_mask)
        reading = self.reading(inputs["labels"])
        with straight_through(self.guard), recording(self.guard) as outputs, reading:
            generative = self.by_tokens(model(**inputs, use_cache=False).loss)
        vq_patch, vq_semantic = map(self.by_samples, vq_losses(outputs))
        units = [self._global_codewords(base, output) for output in outputs]
        turns = of_turns(torch.cat(units), pictures, videos)
        semantic = self.by_turns(semantic_loss(turns, caption))
        loss = (
            generative
            + self.recipe.vq_weight * (vq_patch + vq_semantic)
            + self.recipe.semantic_weight * semantic
        )
        parts = {
            "generative": generative,
            "vq_patch": vq_patch,
            "vq_semantic": vq_semantic,
            "semantic": semantic,
        }
        return loss, parts

    def _global_codewords(self, base: Any, output: GuardOutput) -> torch.Tensor:
        """(B, d): one of each picture, or of each video, as wide as the caption's states."""
        codewords = output.semantic_tokens
        if self.guard.config.site == "encoder":
            codewords = self.adapter.projector(base)(codewords)
        return of_images(codewords, output.semantic_mask)

    def _figures(self) -> dict[str, float]:
        figures = super()._figures()
        for name, level in (("patch", self.guard.patch), ("semantic", self.guard.semantic)):
            book = level.codebook
            figures[f"{name}_perplexity"] = book.perplexity(book.shared_counts())
        return figures


def of_images(codewords: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, d): the mean of each image's own codewords out of (B, S, d).

    `mask` (B, S) bool is True for them, None where all are.
    """
    if mask is None:
        return codewords.mean(1)
    own = mask.unsqueeze(-1).to(codewords)
    # not a product: what stands at padding may be anything
    return codewords.where(own.bool(), 0.0).sum(1) / own.sum(1)


def of_turns(
    codewords: torch.Tensor, pictures: torch.Tensor, videos: torch.Tensor | None = None
) -> torch.Tensor:
    """(G, d): each turn's global codeword, the mean of those of what it shows.

    `codewords` (B, d), one a picture, then one a video; `pictures` (G,) and `videos` (G,) that each
    turn shows, in order. An answer speaks of all that its turn shows, so it is their mean that is
    drawn to it; with one picture this is the paper's loss (docs/decisions, 0070).
    """
    kinds = [pictures] if videos is None else [pictures, videos]
    numbers = torch.arange(len(pictures), device=codewords.device)
    turns = torch.cat([torch.repeat_interleave(numbers, n.to(codewords.device)) for n in kinds])
    total = codewords.new_zeros(len(pictures), codewords.shape[-1]).index_add(0, turns, codewords)
    return total / torch.stack(kinds).sum(0).to(total).unsqueeze(-1)


def vq_losses(outputs: Sequence[GuardOutput]) -> tuple[torch.Tensor, torch.Tensor]:
    """The patch and the semantic VQ loss of a batch, each a mean over its vectors.

    The guard is asked once for the batch's pictures and once for its videos.

    Raises:
        RuntimeError: it computed none.
    """
    losses = [output.losses for output in outputs if output.losses is not None]
    if not losses or len(losses) < len(outputs):
        raise RuntimeError("the guard computed no losses: stage 1 needs it in training mode")
    codes = [list(output.codes) for output in outputs]
    vectors = [sum(unit.numel() for unit in units) for units in codes]
    units = [int((output.semantic_codes >= 0).sum()) for output in outputs]
    return (
        _mean([loss.vq_patch for loss in losses], vectors),
        _mean([loss.vq_semantic for loss in losses], units),
    )


def _mean(means: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """The mean over all vectors, from means over some of them; a single one as it is."""
    if len(means) == 1:
        return means[0]
    weighted = [mean * (count / sum(counts)) for mean, count in zip(means, counts, strict=True)]
    return torch.stack(weighted).sum()


class _Revival(TrainerCallback):
    """Every few steps, unused entries become random features of the step's samples.

    Of all its micro batches, in all processes.
    """

    def __init__(self, trainer: Stage1Trainer) -> None:
        self.trainer = trainer
        self.levels = (trainer.guard.patch, trainer.guard.semantic)
        self.features: dict[int, list[torch.Tensor]] = {}
        self.hooks: list[RemovableHandle] = []

    def _due(self, step: int, state: TrainerState) -> bool:
        recipe = self.trainer.recipe
        if not recipe.revive_every or step % recipe.revive_every:
            return False
        return step <= recipe.revive_until * state.max_steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._due(state.global_step + 1, state):
            self.features = {id(level): [] for level in self.levels}
            self.hooks = [level.register_forward_pre_hook(self._keep) for level in self.levels]

    def _keep(self, level: nn.Module, arguments: tuple[Any, ...]) -> None:
        features = arguments[0].detach()
        self.features[id(level)].append(features.reshape(-1, features.shape[-1]))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._due(state.global_step, state):
            return
        for hook in self.hooks:
            hook.remove()
        # Seeded by the step, so that a resumed run revives what an uninterrupted one revives.
        generator = torch.Generator().manual_seed(args.seed + state.global_step)
        for level in self.levels:
            self._revive(level, generator)
        self.features = {}

    def _revive(self, level: VectorQuantizer, generator: torch.Generator) -> None:
        weight = level.codebook.weight
        dead = level.codebook.shared_counts() == 0
        level.codebook.revive(self.features[id(level)], 1, generator)
        # An entry that moved has no use for the momentum of where it was.
        self.trainer.engine.restart_rows(weight, dead, MOMENTS)


def refuse_collapsed(name: str, perplexity: float, codes: int) -> None:
    """Stop a run whose codebook is used by a few entries only.

    Raises:
        CodebookCollapseError: the perplexity is under 10 % of the codebook's size.
    """
    if not perplexity >= LEAST_PERPLEXITY * codes:
        raise CodebookCollapseError(
            f"the {name} codebook has collapsed: perplexity {perplexity:.1f} of {codes} entries, "
            f"expected at least {LEAST_PERPLEXITY * codes:.0f}. Use a larger stage1.batch, revive "
            f"more often (stage1.revive_every), lower stage1.learning_rate, or make the codebook "
            f"smaller (guard.{name}_codes)."
        )
