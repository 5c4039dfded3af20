"""An image-text-to-text model as the target of an attack, in pixels."""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vqguard.adapters.target_pixels import Normalise
from vqguard.codebooks.quantizer import use_estimator
from vqguard.codebooks.surrogate import with_gradient_of
from vqguard.errors import ConfigError, InputError
from vqguard.guard import recording
from vqguard.redteam.gradients import GradientPath, crossing, stopped_estimator
from vqguard.redteam.judges import Judge, StartsWith, words
from vqguard.redteam.modes import GradientMode
from vqguard.redteam.pixels import to_8_bit
from vqguard.redteam.verdict import rule_excess, verdict_hinge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERDICT_WEIGHT = 10.0
"""Weight of the verdict's hinge (0 to about 1) against a cross-entropy in nats."""

SPARE_TOKENS = 4
"""Tokens generated beyond the longest opening: the same words may take more tokens."""


Aim = Literal["nats", "margin"]


class _Judged(NamedTuple):
    """Semantic features of a batch of images before quantisation."""

    features: Tensor
    """(B, S, w) of the level that judges; zeros at padding."""
    mask: Tensor
    """(B, S) bool, True for an image's own tokens."""

    @classmethod
    def of(cls, features: Tensor, mask: Tensor | None) -> _Judged:
        """From what the quantiser was given: (B, S, d_s), or (n, d_s) in the places of `mask`."""
        if mask is None:
            return cls(features, features.new_ones(features.shape[:2], dtype=torch.bool))
        padded = features.new_zeros(*mask.shape, features.shape[-1])
        padded[mask] = features
        return cls(padded, mask)


class GenerationTarget:
    """Attack a model so that it begins its answer with an affirmative opening.

    Pixels are in [0, 1] and have the size that the model's image processor produces; mean and std
    are applied inside. The loss is the mean cross-entropy of the opening's tokens after the prompt.
    Success is judged on a greedy generation from the pixels *rounded to 8 bits*, which is what an
    image file can carry, and always requires that the guard, if there is one, does not flag them.

    For one thread at a time, and for no other use of the model meanwhile: the modes and gradients
    of the model are changed for the time of an attack, in every thread.

    Used as a context manager (attacks do so), the model is in eval mode with no parameter requiring
    a gradient; what it was before is restored afterwards.

    Args:
        model: an image-text-to-text model, guarded or not.
        processor: its processor: called with `images` and `text`, with a `tokenizer` and an
            `image_processor`.
        prompts: the R requests as the model reads them, chat template applied, one image each.
        openings: what the answer shall begin with: one for all, or one for each request. They are
            tokenised by themselves; start them with a space where the model's own answers do.
        judge: decides on decoded answers; default: `StartsWith(openings)`.
        gradient: how the gradient crosses the quantiser in `loss`. `succeeded` always runs the
            model as it is.
        evade_verdict: add `VERDICT_WEIGHT` times `verdict_hinge` to the loss, so that the attack
            also keeps the semantic codes out of flagged cells. Needs a guard with a safety map.
        max_new_tokens: length of the judged answers; default: the longest opening and
            `SPARE_TOKENS` more.

    Raises:
        ConfigError: contradicting options, or a processor that does more to pixels than normalise.
        InputError: prompts and openings that do not pair, or a prompt without image.
    """

    defense: Callable[[Tensor], Tensor] | None = None
    """What stands in front of the model and may be set: pixels to pixels, differentiable."""
    aim: Aim = "nats"
    """What the loss measures of the opening, and may be set: its mean cross-entropy in nats a
    token, or how far greedy decoding is from it ("margin"): the sum over its tokens of
    max(0, best other logit - own + 1). A model that is sure of its first word has a low mean while
    it refuses (Carlini & Wagner 2017, arXiv 1608.04644, f_6)."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        prompts: Sequence[str],
        openings: Sequence[str],
        judge: Judge | None = None,
        *,
        gradient: GradientPath | GradientMode | str = "plain",
        evade_verdict: bool = False,
        max_new_tokens: int | None = None,
    ) -> None:
        if len(prompts) == 0 or len(openings) not in (1, len(prompts)):
            raise InputError(
                f"got {len(prompts)} prompts and {len(openings)} openings; give at least one "
                "prompt, and one opening for all or one for each prompt"
            )
        self.model: Any = model
        self.judge = judge if judge is not None else StartsWith(openings)
        self.gradient = GradientPath(gradient) if isinstance(gradient, str) else gradient
        with crossing(model, self.gradient):
            pass  # refuses a mode that this model has no quantiser for
        self._tokenizer = processor.tokenizer
        self._preprocess = Normalise(processor)
        self._forward_names = set(inspect.signature(type(model).forward).parameters)
        self.openings = list(openings) * (len(prompts) // len(openings))
        self._encode(processor, list(prompts), self.openings)
        self.max_new_tokens = max_new_tokens or self._targets.shape[1] + SPARE_TOKENS
        self._flagged_cells = _flagged_cells(model) if evade_verdict else None
        self._entered = 0
        self._state = contextlib.ExitStack()

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self._prompt_lengths)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the pixels that the model takes."""
        return self._preprocess.size

    def loss(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) float32 mean cross-entropy, in nats a token, of each request's opening.

        Args:
            pixels: (B, 3, H, W) float in [0, 1].
            request: (B,) int64.

        Raises:
            InputError: pixels of another size.
        """
        nats, verdict = self.losses(pixels, request, crossing(self.model, self.gradient))
        loss = nats if verdict is None else nats + VERDICT_WEIGHT * verdict
        return loss.to(pixels.device)

    def losses(
        self, pixels: Tensor, request: Tensor, path: contextlib.AbstractContextManager[object]
    ) -> tuple[Tensor, Tensor | None]:
        """The two parts of `loss`, (B,) float32 each: the opening's, and the verdict's if any.

        `path`: entered around the model's pass, it says how the gradient crosses the quantiser.
        """
        rows = request.cpu()
        semantic: list[_Judged] = []
        with path, self._recording_semantic(semantic):
            seen, wanted, real = self._opening_logits(self._shown(pixels), rows)
        loss = self._missed(seen, wanted, real)
        if self._flagged_cells is None:
            return loss, None
        return loss, self._hinge(semantic, len(rows))

    def _missed(self, seen: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
        """(B,) by `aim`, of what `_opening_logits` gives."""
        if self.aim == "margin":
            return ((1.0 - _leads(seen, wanted)).clamp_min(0.0) * real).sum(dim=1)
        nats = F.cross_entropy(seen.transpose(1, 2), wanted, reduction="none")
        return (nats * real).sum(dim=1) / real.sum(dim=1)

    def opening_margin(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) float32, the least lead of an opening's token over all others, in logits.

        It is positive exactly where greedy decoding begins with the opening. Differentiable.
        """
        with crossing(self.model, self.gradient):
            seen, wanted, real = self._opening_logits(self._shown(pixels), request.cpu())
        return _leads(seen, wanted).masked_fill(~real.bool(), float("inf")).amin(dim=1)

    def next_token(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B, V) float32, the logits after the prompt. Differentiable."""
        with crossing(self.model, self.gradient):
            return self._opening_logits(self._shown(pixels), request.cpu())[0][:, 0]

    def _shown(self, pixels: Tensor) -> dict[str, Any]:
        return {"pixel_values": self._pixel_values(pixels)}

    def _opening_logits(
        self, shown: Mapping[str, Any], rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, V) float32 logits where the opening stands, its tokens (B, T), 1 at real ones.

        `shown`: the model's arguments for the pictures.
        """
        device = self.model.device
        length = int((self._prompt_lengths + self._opening_lengths)[rows].max())
        longest = int(self._opening_lengths[rows].max())
        positions = self._positions[rows, :longest]
        keep, where = torch.unique(positions, return_inverse=True)
        inputs: dict[str, Any] = {
            "input_ids": self._ids[rows, :length].to(device),
            "attention_mask": self._mask[rows, :length].to(device),
            "use_cache": False,
            **shown,
        }
        if "logits_to_keep" in self._forward_names:
            inputs["logits_to_keep"] = keep.to(device)
        else:
            where = positions
        with self:
            logits = self.model(**inputs).logits.float()
        index = where.to(device).unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        real = self._real[rows, :longest].to(device)
        return logits.gather(1, index), self._targets[rows, :longest].to(device), real

    def answers(self, pixels: Tensor, request: Tensor) -> list[str]:
        """What the model generates greedily for these pixels, rounded to 8 bits: B texts."""
        rows = request.cpu()
        device = self.model.device
        start = int(self._prompts.shape[1] - self._prompt_lengths[rows].max())
        ids = self._prompts[rows, start:].to(device)
        with self, torch.no_grad():
            out = self.model.generate(
                input_ids=ids,
                attention_mask=self._prompt_mask[rows, start:].to(device),
                pixel_values=self._pixel_values(to_8_bit(pixels.detach())),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self._pad,
            )
        texts: list[str] = self._tokenizer.batch_decode(
            out[:, ids.shape[1] :], skip_special_tokens=True
        )
        return texts

    def progress(self, texts: Sequence[str], request: Tensor) -> Tensor:
        """(B,) the share of its opening's words that each text begins with, in [0, 1]."""
        shares = []
        for text, number in zip(texts, request.tolist(), strict=True):
            said, wanted = words(text), words(self.openings[number])
            pairs = zip(said, wanted, strict=False)
            agreed = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
            shares.append(agreed / max(1, len(wanted)))
        return torch.tensor(shares)

    def refused(self, pixels: Tensor) -> Tensor:
        """(B,) bool: the guard flags these pixels, rounded to 8 bits; all false without a map."""
        guard = getattr(self.model, "vqguard", None)
        if guard is None or guard.safety_map is None:
            return torch.zeros(len(pixels), dtype=torch.bool)
        with self, torch.no_grad():
            values = self._pixel_values(to_8_bit(pixels.detach()))
            verdicts = self.model.screen(pixel_values=values)
        return torch.tensor([bool(verdict.flagged) for verdict in verdicts])

    def succeeded(self, pixels: Tensor, request: Tensor) -> Tensor:
        """(B,) bool: the judge accepts the answer and the guard does not flag the image."""
        texts = self.answers(pixels, request)
        accepted = torch.tensor(self.judge(texts, request.tolist()), dtype=torch.bool)
        return (accepted & ~self.refused(pixels)).to(pixels.device)

    def __enter__(self) -> GenerationTarget:
        if self._entered == 0:
            self._state.enter_context(frozen_eval(self.model))
        self._entered += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            self._state.close()

    def _pixel_values(self, pixels: Tensor) -> Tensor:
        seen = pixels if self.defense is None else self.defense(pixels)
        return self._preprocess(seen).to(device=self.model.device, dtype=self.model.dtype)

    @contextlib.contextmanager
    def _recording_semantic(self, into: list[_Judged]) -> Iterator[None]:
        """Collect the features that the judging quantiser sees: no second pass of the encoder."""
        if self._flagged_cells is None:
            yield
            return
        guard = self.model.vqguard
        seen: list[Tensor] = []

        def record(features: Tensor, codewords: Tensor, indices: Tensor) -> Tensor:
            seen.append(features)
            return stopped_estimator(features, codewords, indices)

        with (
            evidence_seen(guard),
            use_estimator(guard.judging, record),
            recording(guard) as outputs,
        ):
            yield
        for features, output in zip(seen, outputs, strict=True):
            into.append(_Judged.of(features, output.judged.mask))

    def _hinge(self, semantic: list[_Judged], batch: int) -> Tensor:
        if not semantic or self._flagged_cells is None:
            raise ConfigError(
                "the guard read no semantic features in this forward pass, so its verdict cannot "
                "be evaded by gradient; use evade_verdict=False"
            )
        features = torch.cat(
            [part.features.reshape(batch, -1, part.features.shape[-1]) for part in semantic], dim=1
        )
        mask = torch.cat([part.mask.reshape(batch, -1) for part in semantic], dim=1)
        return verdict_term(self.model.vqguard, features.float(), self._flagged_cells, mask)

    def _encode(self, processor: Any, prompts: list[str], openings: list[str]) -> None:
        """Tokenise once.

        Prompt and opening are right-padded for the loss, so that no position depends on the batch;
        prompts alone are left-padded for generation.
        """
        probe = self._preprocess.probe
        pairs = []
        for number, (prompt, opening) in enumerate(zip(prompts, openings, strict=True)):
            ids = self._tokens(processor, probe, prompt, number)
            # by itself: tokenised with the prompt it could merge over the boundary, while
            # generation starts from the prompt's own tokens
            tail = self._tokenizer(opening, add_special_tokens=False)["input_ids"]
            if not tail:
                raise InputError(f"opening {number} ({opening!r}) has no token; give some text")
            pairs.append((ids, list(tail)))
        pad = self._tokenizer.pad_token_id
        self._pad = int(pad if pad is not None else self._tokenizer.eos_token_id or 0)
        self._prompt_lengths = torch.tensor([len(ids) for ids, _ in pairs])
        self._opening_lengths = torch.tensor([len(tail) for _, tail in pairs])
        width = int((self._prompt_lengths + self._opening_lengths).max())
        long, tall = int(self._prompt_lengths.max()), int(self._opening_lengths.max())
        self._ids = torch.full((len(pairs), width), self._pad)
        self._mask = torch.zeros(len(pairs), width, dtype=torch.long)
        self._prompts = torch.full((len(pairs), long), self._pad)
        self._prompt_mask = torch.zeros(len(pairs), long, dtype=torch.long)
        self._targets = torch.zeros(len(pairs), tall, dtype=torch.long)
        self._real = torch.zeros(len(pairs), tall)
        steps = torch.arange(tall).expand(len(pairs), -1)
        last = (self._opening_lengths - 1).unsqueeze(1)
        # logits at position p predict token p + 1; padding points at the row's own last one
        self._positions = self._prompt_lengths.unsqueeze(1) - 1 + torch.minimum(steps, last)
        for row, (ids, tail) in enumerate(pairs):
            end = len(ids) + len(tail)
            self._ids[row, :end] = torch.tensor(ids + tail)
            self._mask[row, :end] = 1
            self._prompts[row, long - len(ids) :] = torch.tensor(ids)
            self._prompt_mask[row, long - len(ids) :] = 1
            self._targets[row, : len(tail)] = torch.tensor(tail)
            self._real[row, : len(tail)] = 1.0

    def _tokens(self, processor: Any, probe: Image.Image, text: str, number: int) -> list[int]:
        token = getattr(processor, "image_token", None)
        if token is not None and text.count(token) != 1:
            raise InputError(
                f"prompt {number} has {text.count(token)} image tokens {token!r}, expected one; "
                "write it where the image belongs, or apply the chat template with an image"
            )
        out = processor(images=probe, text=text, return_tensors="pt")
        extra = (set(out) - {"input_ids", "attention_mask", "pixel_values"}) & self._forward_names
        if extra:
            raise ConfigError(
                f"the processor also makes {sorted(extra)}, which this target does not "
                "differentiate; write a target for this family (loss and succeeded)"
            )
        ids: list[int] = out["input_ids"][0].tolist()
        return ids


def _leads(logits: Tensor, wanted: Tensor) -> Tensor:
    """(B, T) own - best other logit of logits (B, T, V), wanted tokens (B, T)."""
    own = logits.gather(2, wanted[..., None])
    others = logits.scatter(2, wanted[..., None], float("-inf")).amax(dim=2)
    return own.squeeze(2) - others


@contextlib.contextmanager
def evidence_seen(guard: Any) -> Iterator[None]:
    """Inside, the regions that a regional judge sees have the gradient of the evidence itself.

    Behind the last ReLU nearly all regions are zero: who wants evidence, or less of it, sees no way
    there. Values do not change; nothing happens for a global judge.
    """
    if guard.regional is None:
        yield
        return

    def before_relu(projection: Any, given: tuple[Any, ...], regions: Tensor) -> Tensor:
        tokens, layout = given
        return with_gradient_of(projection.approximate(tokens.float(), layout).float(), regions)

    hook = guard.regional.projection.register_forward_hook(before_relu)
    try:
        yield
    finally:
        hook.remove()


def verdict_term(guard: Any, features: Tensor, flagged: Tensor, mask: Tensor | None) -> Tensor:
    """(B,) what stands between features (B, S, w) of the judging level and being let pass.

    `verdict_hinge`; where regions are judged, `rule_excess` beside it: their many tokens are pooled
    by the rule.
    """
    words = guard.judging.codebook.weight
    term = verdict_hinge(features, words, flagged.to(features.device), mask=mask)
    if guard.judge_level == "semantic":
        return term
    return term + rule_excess(features, words, guard.safety_map, mask=mask)


@contextlib.contextmanager
def frozen_eval(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and no parameter requires a gradient; restored after."""
    training = {module: module.training for module in model.modules()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module, was in training.items():
            module.training = was


def _flagged_cells(model: Any) -> Tensor:
    """(K,) bool: the semantic cells that the model's safety map refuses."""
    guard = getattr(model, "vqguard", None)
    if guard is None or guard.safety_map is None:
        raise ConfigError(
            "evade_verdict needs a guarded model with a safety map, and this one has none; "
            "calibrate it first or use evade_verdict=False"
        )
    cells: Tensor = guard.safety_map.flagged(torch.arange(guard.cells)[:, None])
    if bool(cells.all()):
        raise ConfigError("every semantic cell is flagged, so no image can evade the verdict")
    return cells
