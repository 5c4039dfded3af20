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
from torch import Tensor, nn

from vqguard.adapters.passes.where_read import only_where_read
from vqguard.adapters.target_pixels import Normalise
from vqguard.adapters.target_requests import EncodedRequests
from vqguard.codebooks.quantizer import use_estimator
from vqguard.codebooks.surrogate import with_gradient_of
from vqguard.errors import ConfigError, InputError
from vqguard.guard import recording
from vqguard.redteam.gradients import GradientPath, crossing, stopped_estimator
from vqguard.redteam.judges import Judge, StartsWith, words
from vqguard.redteam.modes import GradientMode
from vqguard.redteam.pixels import pictures_of, to_8_bit
from vqguard.redteam.verdict import rule_excess, verdict_hinge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERDICT_WEIGHT = 10.0
"""Weight of the verdict's hinge (0 to about 1) against a cross-entropy in nats."""

SPARE_TOKENS = 4
"""Tokens generated beyond the longest opening: the same words may take more tokens."""


Aim = Literal["nats", "margin", "semantic"]


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
        prompts: the R requests as the model reads them, chat template applied, one image each, or
            the same number of images each.
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

    pictures: int = 1
    """How many each prompt shows; several are attacked as a strip, (B, 3, pictures H, W)."""
    defense: Callable[[Tensor], Tensor] | None = None
    """What stands in front of the model and may be set: pixels to pixels, differentiable."""
    aim: Aim = "nats"
    """What the loss measures of the opening, and may be set: its mean cross-entropy in nats a
    token, or how far greedy decoding is from it ("margin"): the sum over its tokens of
    max(0, best other logit - own + 1). A model that is sure of its first word has a low mean while
    it refuses (Carlini & Wagner 2017, arXiv 1608.04644, f_6). "semantic" is the mean over its
    tokens of 1 - cosine, in [0, 2], between the token's embedding and the one that is expected of
    the next token: words of like meaning count too, which other models share more than exact words
    (after arXiv 2602.01025)."""

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
        token = getattr(processor, "image_token", None)
        self.pictures = 1 if token is None else max(1, prompts[0].count(token))
        self._text = EncodedRequests(
            processor,
            prompts,
            self.openings,
            self._preprocess.probe,
            self._forward_names,
            self.pictures,
        )
        self.max_new_tokens = max_new_tokens or self._text.longest_opening + SPARE_TOKENS
        self._flagged_cells = _flagged_cells(model) if evade_verdict else None
        self._entered = 0
        self._state = contextlib.ExitStack()

    @property
    def requests(self) -> int:
        """How many requests there are."""
        return len(self._text)

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
        self,
        pixels: Tensor,
        request: Tensor,
        path: contextlib.AbstractContextManager[object],
        *,
        verdict: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """The two parts of `loss`, (B,) float32 each: the opening's, and the verdict's if any.

        `path`: entered around the model's pass, it says how the gradient crosses the quantiser.
        `verdict`: whether its part is wanted.
        """
        rows = request.cpu()
        semantic: list[_Judged] = []
        judged = verdict and self._flagged_cells is not None
        with path, self._recording_semantic(semantic) if judged else contextlib.nullcontext():
            seen, wanted, real = self._opening_logits(self._shown(pixels), rows)
        loss = self._missed(seen, wanted, real)
        return loss, self._hinge(semantic, len(rows)) if judged else None

    def _missed(self, seen: Tensor, wanted: Tensor, real: Tensor) -> Tensor:
        """(B,) by `aim`, of what `_opening_logits` gives."""
        if self.aim == "margin":
            return ((1.0 - _leads(seen, wanted)).clamp_min(0.0) * real).sum(dim=1)
        if self.aim == "semantic":
            words = self.model.get_input_embeddings().weight.detach().float()
            missed = 1.0 - F.cosine_similarity(seen.softmax(dim=2) @ words, words[wanted], dim=2)
        else:
            missed = F.cross_entropy(seen.transpose(1, 2), wanted, reduction="none")
        return (missed * real).sum(dim=1) / real.sum(dim=1)

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
        given = self._text.with_openings(rows)
        keep, where = torch.unique(given.positions, return_inverse=True)
        inputs: dict[str, Any] = {
            "input_ids": given.ids.to(device),
            "attention_mask": given.mask.to(device),
            "use_cache": False,
            **shown,
        }
        if "logits_to_keep" in self._forward_names:
            inputs["logits_to_keep"] = keep.to(device)
        else:
            where = given.positions
        read = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        read.scatter_(1, given.positions.to(device), True)
        with self, only_where_read(self.model, read):
            logits = self.model(**inputs).logits.float()
        index = where.to(device).unsqueeze(-1).expand(-1, -1, logits.shape[-1])
        return logits.gather(1, index), given.wanted.to(device), given.real.to(device)

    def answers(self, pixels: Tensor, request: Tensor) -> list[str]:
        """What the model generates greedily for these pixels, rounded to 8 bits: B texts."""
        return self._answered(*self._text.prompts(request.cpu()), pixels)

    def _answered(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> list[str]:
        """What is generated behind left-padded prompts (B, L) with these pixels."""
        device = self.model.device
        with self, torch.no_grad():
            out = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                pixel_values=self._pixel_values(to_8_bit(pixels.detach())),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=self._text.pad,
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
        """(B,) bool: the guard flags a picture of these, rounded to 8 bits; false without a map."""
        guard = getattr(self.model, "vqguard", None)
        if guard is None or guard.safety_map is None:
            return torch.zeros(len(pixels), dtype=torch.bool)
        with self, torch.no_grad():
            values = self._pixel_values(to_8_bit(pixels.detach()))
            verdicts = self.model.screen(pixel_values=values)
        flagged = torch.tensor([bool(verdict.flagged) for verdict in verdicts])
        return flagged.reshape(len(pixels), -1).any(dim=1)

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
        seen = pixels if self.pictures == 1 else pictures_of(pixels, self.pictures)
        seen = seen if self.defense is None else self.defense(seen)
        return self._preprocess(seen).to(device=self.model.device, dtype=self.model.dtype)

    @contextlib.contextmanager
    def _recording_semantic(self, into: list[_Judged]) -> Iterator[None]:
        """Collect the features that the judging quantiser sees: no second pass of the encoder."""
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
