"""Refusals: what a guarded model's `generate` does with flagged images, and `screen`."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.utils import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils.generic import ModelOutput

from vqguard.adapters.codes import VisualCodes
from vqguard.adapters.features import VisualFeatures
from vqguard.adapters.runtime.bypass import (
    name_inputs,
    refuse_arguments,
    refuse_continuous_batching,
    refuse_generation,
)
from vqguard.adapters.runtime.cache_verdicts import cache_in, merge_flags, read_tag, write_tag
from vqguard.adapters.runtime.guard_link import (
    Call,
    GuardLink,
    batch_size,
    current_call,
    link_of,
    serving,
)
from vqguard.adapters.runtime.guarded_modules import require_intact
from vqguard.adapters.runtime.known_arguments import refuse_options
from vqguard.adapters.runtime.quantise import visual_features
from vqguard.adapters.seams import bind, original_method
from vqguard.errors import BypassError, ConfigError, InputError
from vqguard.safety_map import Verdict  # transformers resolves the annotation below
from vqguard.scopes.modes import evaluating

_DEFAULT_NEW_TOKENS = 20  # what generate uses when no length is set anywhere


@dataclass(frozen=True)
class Settings:
    """The generation settings that a refusal depends on."""

    expand: int
    beams: int
    new_tokens: int
    eos: int | None
    pad: int | None
    as_dict: bool
    scores: bool
    streamer: Any

    @classmethod
    def read(cls, model: Any, call: Mapping[str, Any], prompt_length: int) -> Settings:
        """As `generate` resolves them: the call, then its config, then the `model`'s config."""
        sources = [call.get("generation_config"), model]

        def setting(name: str, default: Any = None) -> Any:
            if call.get(name) is not None:
                return call[name]
            values = (getattr(source, name, None) for source in sources if source is not None)
            return next((value for value in values if value is not None), default)

        new_tokens = setting("max_new_tokens")
        if new_tokens is None:
            total = setting("max_length")
            new_tokens = _DEFAULT_NEW_TOKENS if total is None else max(total - prompt_length, 0)
        eos, pad = _first(setting("eos_token_id")), _first(setting("pad_token_id"))
        beams = int(setting("num_beams", 1))
        return cls(
            expand=int(setting("num_return_sequences", 1)),
            beams=beams,
            new_tokens=int(new_tokens),
            eos=eos,
            pad=eos if pad is None else pad,
            as_dict=bool(setting("return_dict_in_generate", False)),
            scores=bool(setting("output_scores", False)),
            streamer=call.get("streamer"),
        )


def _first(token: Any) -> int | None:
    if isinstance(token, Tensor):
        token = token.flatten().tolist()
    if isinstance(token, (list, tuple)):
        token = token[0] if token else None
    return None if token is None else int(token)


def refusal_tokens(link: GuardLink, settings: Settings) -> list[int]:
    """The refusal with its end token, cut to the allowed length.

    Without refusal ids it is the end token alone.

    Raises:
        ConfigError: when there is neither.
    """
    tokens = list(link.refusal_ids)
    if settings.eos is not None:
        tokens.append(settings.eos)
    if not tokens:
        raise ConfigError(
            "an image was flagged but there is nothing to answer: the model has no eos_token_id "
            "and no refusal ids; call guard_model(model, guard, processor)"
        )
    return tokens[: settings.new_tokens]


class RefusalProcessor(LogitsProcessor):
    """Forces the refusal on flagged rows, whatever the decoding strategy."""

    def __init__(self, flagged: Tensor, tokens: list[int], filler: int) -> None:
        self.flagged = flagged
        self.tokens = tokens
        self.filler = filler
        self.start: int | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.start is None:
            self.start = input_ids.shape[1]
        step = input_ids.shape[1] - self.start
        token = self.tokens[step] if step < len(self.tokens) else self.filler
        rows = self.flagged.repeat_interleave(len(input_ids) // len(self.flagged))
        rows = rows.to(scores.device)
        forced = torch.full_like(scores[:1], float("-inf"))
        forced[:, token] = 0.0
        return torch.where(rows.unsqueeze(1), forced, scores)


_LAST: ContextVar[Mapping[str, list[Verdict]]] = ContextVar(
    "vqguard_last_verdicts", default=MappingProxyType({})
)
"""By the identity of each guarded model's link: what its last `generate` in this context judged."""


class GuardedModel:
    """Mixed into the class of a guarded model. Arguments are those of the original methods."""

    @property
    def last_verdicts(self) -> list[Verdict]:
        """One verdict an image of the last `generate` of this thread or task, in their order.

        Empty after a call that raised. Verdicts of a call elsewhere are in what it returned:
        `return_dict_in_generate=True` gives `.verdicts`.

        Raises:
            InputError: where this thread or task has called no `generate`.
        """
        known = _LAST.get().get(link_of(_module(self)).identity)
        if known is None:
            raise InputError(
                "expected a generate of this model in this thread or task before last_verdicts, "
                "found none: read .verdicts of what generate(..., return_dict_in_generate=True) "
                "returned where it was called"
            )
        return list(known)

    def screen(self, pixel_values: Tensor | None = None, **inputs: Any) -> list[Verdict]:
        """One verdict an image. The language model does not run.

        `pixel_values` and the rest (`image_sizes`, ...) as the model's processor returns them.

        Raises:
            BypassError: for encoder options other than the config's, and for padding marks over
                pixels that show something.
            ConfigError: without a safety map.
            InputError: without pixels.
            NonFiniteError: for NaN or infinite features.
        """
        model = _module(self)
        link = link_of(model)
        require_map(link)
        with torch.no_grad():
            given = {"pixel_values": pixel_values, **inputs}
            refuse_options(link, model, given, original_method(model, "forward"))
            features = visual_features(model, link.guard.config.site, **given)
            return link.guard.judge(features.semantic, features.semantic_mask)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the original `generate`; rows that show a flagged image answer with the refusal.

        The visual tokens of a flagged row are replaced by codeword 0 before the language model
        sees them, so its neighbours answer as they would without it. When every row is flagged the
        language model does not run: `logits`, attentions, hidden states and the cache are None in
        a dictionary output, `scores` are those of the forced tokens. A refusal longer than
        `max_new_tokens` is cut. What is judged runs in eval mode, whatever mode the model is in.

        A dictionary output (`return_dict_in_generate=True`) carries `verdicts`, one an image in the
        order of the images; `last_verdicts` keeps those of this thread's or task's last call.

        Raises:
            BypassError: for arguments that carry visual vectors around the guard.
            ConfigError: for an image without a safety map.
            InputError: where images and placeholders do not match.
            NonFiniteError: for NaN or infinite features.
        """
        model = _module(self)
        link = link_of(model)
        _remember(link, [])
        method = original_method(model, "generate")
        call = name_inputs(link, model, bind(method, args, kwargs))
        require_intact(model, link)
        refuse_arguments(link, model, call, original_method(model, "forward"), generating=True)
        seen = any(link.adapter.has_pixels(seam, call) for seam in link.seams)
        refuse_generation(call, pixels=seen)
        cache = cache_in(call)
        before = read_tag(link, cache)
        outer = current_call(link)
        features = outer.features if outer is not None else None
        if isinstance(features, VisualCodes):
            raise BypassError(
                "generate inside of training_codes: codes stand for pixels in training alone, and "
                "have no verdicts; pass pixels"
            )
        scope = Call(link, checked=True, generating=True, features=features, arguments=call)
        flags, verdicts = self._judge(link, call, scope)
        if before is not None:
            known = merge_flags(before.flagged, flags)
            if known is None:
                raise BypassError(
                    "past_key_values holds an image that was never judged: it was filled before "
                    "the guard had a safety map, or by a training step; start again with an empty "
                    "cache"
                )
            flags = known
        with serving(scope):
            output = self._refuse(method, call, flags) if flags.any() else method(**call)
        result = cache if cache is not None else cache_in(_as_mapping(output))
        write_tag(link, result, before, flags)
        if isinstance(output, ModelOutput):
            output.verdicts = verdicts
        _remember(link, verdicts)
        return output

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `BypassError`: its loop cannot refuse a row. `generate_batch` comes here too."""
        refuse_continuous_batching("continuous batching")

    def _judge(
        self, link: GuardLink, call: dict[str, Any], scope: Call
    ) -> tuple[Tensor, list[Verdict]]:
        """(B,) rows that show a flagged image, and all verdicts.

        Leaves quantised features in `scope`.
        """
        model = _module(self)
        if isinstance(scope.features, VisualFeatures):
            call[link.seams[0].pixels[0]] = scope.features.semantic
        if not any(link.adapter.has_pixels(seam, call) for seam in link.seams):
            prompt = link.adapter.prompt_ids(call)
            return torch.zeros(len(prompt) if prompt is not None else 1, dtype=torch.bool), []
        require_map(link)
        flags = torch.zeros(batch_size(link, call), dtype=torch.bool)
        shown: list[list[int]] = []
        verdicts: list[Verdict] = []
        with evaluating(model.modules()):  # the guard too: asking is no use of a codeword
            link.prepare(model, scope, inner_only=False)
        for seam, result in scope.seen:
            guarded = result.guarded
            judged = link.guard.judge_codes(
                guarded.semantic_codes, guarded.semantic_mask, guarded.semantic_distances
            )
            shown.append(link.adapter.rows(model, seam, call, result.counts))
            for verdict, row in zip(judged, shown[-1], strict=True):
                flags[row] |= verdict.flagged
            verdicts += judged
        for (seam, result), rows in zip(scope.seen, shown, strict=True):
            link.blank(model, seam, result, [i for i, row in enumerate(rows) if flags[row]])
        return flags, verdicts

    def _refuse(self, method: Any, call: dict[str, Any], flags: Tensor) -> Any:
        model = _module(self)
        link = link_of(model)
        prompt = link.adapter.answer_prompt(model, call)
        if prompt is None:
            raise InputError("expected input_ids: the cache holds a flagged image")
        config = link.adapter.generation_config(model)
        settings = Settings.read(config, call, prompt.shape[1])
        tokens = refusal_tokens(link, settings)
        if flags.all():
            return refusal_output(model, prompt, tokens, settings)
        filler = settings.pad if settings.pad is not None else tokens[-1]
        processors = LogitsProcessorList(call.get("logits_processor") or [])
        processors.append(
            RefusalProcessor(flags, tokens, filler if settings.eos is None else settings.eos)
        )
        output = method(**{**call, "logits_processor": processors})
        sequences = output if isinstance(output, Tensor) else output.sequences
        length = sequences.shape[1] - prompt.shape[1]
        tail = (tokens + [filler] * length)[:length]
        # Lower beams of a flagged row hold leftovers of the search.
        refused = flags.repeat_interleave(settings.expand).to(sequences.device)
        sequences[refused, prompt.shape[1] :] = sequences.new_tensor(tail)
        return output


def _remember(link: GuardLink, verdicts: list[Verdict]) -> None:
    _LAST.set({**_LAST.get(), link.identity: verdicts})


def _as_mapping(output: Any) -> Mapping[str, Any]:
    return output if isinstance(output, Mapping) else {}


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    return model


def require_map(link: GuardLink) -> None:
    """Raise `ConfigError` when no verdict is possible."""
    if link.guard.safety_map is None:
        raise ConfigError(
            "the guard has no safety map, so no image can be judged: calibrate it (SafetyMap."
            "calibrate, or `vqguard calibrate`), or load a calibrated guard"
        )


def refusal_output(model: Any, prompt: Tensor, tokens: list[int], settings: Settings) -> Any:
    """What `generate` returns when every row refuses: prompts, each followed by the refusal."""
    sequences = prompt.repeat_interleave(settings.expand, dim=0)
    answer = sequences.new_tensor(tokens).expand(len(sequences), -1)
    if settings.streamer is not None:
        settings.streamer.put(sequences.cpu())
        for column in answer.T:
            settings.streamer.put(column.cpu())
        settings.streamer.end()
    sequences = torch.cat([sequences, answer], dim=1)
    if not settings.as_dict:
        return sequences
    scores = None
    if settings.scores:
        width = model.config.get_text_config().vocab_size
        rows = len(prompt) * max(settings.expand, settings.beams)
        scores = tuple(_forced(rows, width, token, prompt.device) for token in tokens)
    output: dict[str, Any] = {"sequences": sequences, "scores": scores}
    if settings.beams == 1:
        return GenerateDecoderOnlyOutput(**output)
    if settings.scores:
        output["sequences_scores"] = torch.zeros(len(sequences), device=prompt.device)
    return GenerateBeamDecoderOnlyOutput(**output)


def _forced(rows: int, width: int, token: int, device: torch.device) -> Tensor:
    scores = torch.full((rows, width), float("-inf"), device=device)
    scores[:, token] = 0.0
    return scores
