"""Refusals: what a guarded model's `generate` does with flagged images, and `screen`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.generation.logits_process import LogitsProcessorList
from transformers.utils.generic import ModelOutput

from vqguard.adapters.codes import VisualCodes
from vqguard.adapters.features import VisualFeatures
from vqguard.adapters.runtime.answers import ForcedTokens, Settings, refusal_output
from vqguard.adapters.runtime.blanking import blanked_tokens
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
from vqguard.adapters.runtime.quantise import majority, visual_features
from vqguard.adapters.seams import bind, original_method
from vqguard.errors import BypassError, ConfigError, FlaggedImageError, InputError
from vqguard.safety_map import SafetyMap, Verdict  # transformers resolves the annotation below
from vqguard.scopes.modes import evaluating


@dataclass
class Judgement:
    """What `generate` does about B rows."""

    refused: Tensor
    """(B,) bool."""
    refusals: dict[int, tuple[int, ...]]
    """The refusal of each refused row that has another than the guard's own."""
    warnings: dict[int, tuple[int, ...]]
    """The warning that a row's answer begins with."""
    verdicts: list[Verdict]


def refusal_tokens(link: GuardLink, settings: Settings, own: tuple[int, ...] | None) -> list[int]:
    """The refusal with its end token, cut to the allowed length; `own`: the category's, if any.

    Without refusal ids it is the end token alone.

    Raises:
        ConfigError: when there is neither.
    """
    tokens = list(own or link.refusal_ids)
    if settings.eos is not None:
        tokens.append(settings.eos)
    if not tokens:
        raise ConfigError(
            "an image was flagged but there is nothing to answer: the model has no eos_token_id "
            "and no refusal ids; call guard_model(model, guard, processor)"
        )
    return tokens[: settings.new_tokens]


_LAST: ContextVar[Mapping[str, list[Verdict]]] = ContextVar(
    "vqguard_last_verdicts", default=MappingProxyType({})
)
"""By the identity of each guarded model's link: what its last `generate` in this context judged."""


class GuardedModel:
    """Mixed into the class of a guarded model. Arguments are those of the original methods."""

    @property
    def last_verdicts(self) -> list[Verdict]:
        """One verdict an image of the last `generate` of this thread or task, in their order.

        While one decodes they are its own: a streamer or a stopping criterion may read them. Empty
        after a call that raised. Verdicts of a call elsewhere are in what it returned:
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
            site = link.guard.config.site
            features = visual_features(model, site, **given)
            judged = majority(
                link.guard,
                [name for seam in link.adapter.given(model, given) for name in seam.pixels],
                given,
                lambda changed: visual_features(model, site, **changed),
            )
            if judged is None:
                judged = link.guard.judged(
                    features.semantic, features.semantic_mask, features.tokens, features.layouts
                )
            verdicts = link.guard.judge_codes(*judged)
            return link.guard.located(verdicts, features.layouts, features.unit_parts)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the original `generate`; rows that show a flagged image answer with the refusal.

        The policy of the image's category may ask for something else: `blank` replaces the visual
        tokens under the flagged regions, or all of that picture, and answers about the rest; `warn`
        begins the answer with a fixed text, `raise` raises before anything runs, `report` changes
        nothing.

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
            FlaggedImageError: for an image whose policy is to raise.
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
        judged = self._judge(link, call, scope)
        flags, verdicts = judged.refused, judged.verdicts
        if before is not None:
            known = merge_flags(before.flagged, flags)
            if known is None:
                raise BypassError(
                    "past_key_values holds an image that was never judged: it was filled before "
                    "the guard had a safety map, or by a training step; start again with an empty "
                    "cache"
                )
            judged.refused = flags = known
        _remember(link, verdicts)
        try:
            with serving(scope):
                acts = bool(flags.any()) or bool(judged.warnings)
                output = self._answer(method, call, judged) if acts else method(**call)
        except BaseException:
            _remember(link, [])
            raise
        result = cache if cache is not None else cache_in(_as_mapping(output))
        write_tag(link, result, before, flags)
        if isinstance(output, ModelOutput):
            output.verdicts = verdicts
        return output

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `BypassError`: its loop cannot refuse a row. `generate_batch` comes here too."""
        refuse_continuous_batching("continuous batching")

    def _judge(self, link: GuardLink, call: dict[str, Any], scope: Call) -> Judgement:
        """What is to be done about each row, and all verdicts.

        Leaves quantised features in `scope`, of refused rows and blanked pictures without content.

        Raises:
            FlaggedImageError: for an image whose policy is to raise.
        """
        model = _module(self)
        if isinstance(scope.features, VisualFeatures):
            call[link.seams[0].pixels[0]] = scope.features.semantic
        if not any(link.adapter.has_pixels(seam, call) for seam in link.seams):
            prompt = link.adapter.prompt_ids(call)
            rows = len(prompt) if prompt is not None else 1
            return Judgement(torch.zeros(rows, dtype=torch.bool), {}, {}, [])
        safety_map = require_map(link)
        done = Judgement(torch.zeros(batch_size(link, call), dtype=torch.bool), {}, {}, [])
        shown: list[tuple[list[int], list[Verdict]]] = []
        with evaluating(model.modules()):  # the guard too: asking is no use of a codeword
            link.prepare(model, scope, inner_only=False)
        for seam, result in scope.seen:
            guarded = result.guarded
            judged = link.located(seam, link.guard.judge_codes(*guarded.judged), guarded.layouts)
            shown.append((link.adapter.rows(model, seam, call, result.counts), judged))
            done.verdicts += judged
        require_no_raise(done.verdicts)
        for rows_of, judged in shown:
            for verdict, row in zip(judged, rows_of, strict=True):
                _act(link, safety_map, done, verdict, row)
        for (seam, result), (rows_of, judged) in zip(scope.seen, shown, strict=True):
            blanked = {
                i: None if done.refused[row] else blanked_tokens(link, seam, result, i)
                for i, (verdict, row) in enumerate(zip(judged, rows_of, strict=True))
                if done.refused[row] or verdict.action == "blank"
            }
            link.blank(model, seam, result, blanked)
        return done

    def _answer(self, method: Any, call: dict[str, Any], judged: Judgement) -> Any:
        """Refusals in the refused rows, warnings before the answers of others."""
        model = _module(self)
        link = link_of(model)
        prompt = link.adapter.answer_prompt(model, call)
        if prompt is None:
            raise InputError("expected input_ids: the cache holds a flagged image")
        config = link.adapter.generation_config(model)
        settings = Settings.read(config, call, prompt.shape[1])
        flags = judged.refused
        refused = flags.nonzero().flatten().tolist()
        said = {row: refusal_tokens(link, settings, judged.refusals.get(row)) for row in refused}
        filler = settings.pad
        if filler is None:
            filler = next((tokens[-1] for tokens in said.values()), 0)
        end = filler if settings.eos is None else settings.eos
        if flags.all():
            longest = max(map(len, said.values()))
            answers = [said[row] + [filler] * (longest - len(said[row])) for row in refused]
            return refusal_output(model, prompt, answers, settings)
        forced: dict[int, Sequence[int]] = {
            row: tokens + [end] * settings.new_tokens for row, tokens in said.items()
        }
        forced |= {row: tokens for row, tokens in judged.warnings.items() if not flags[row]}
        processors = LogitsProcessorList(call.get("logits_processor") or [])
        processors.append(ForcedTokens(len(flags), forced))
        output = method(**{**call, "logits_processor": processors})
        sequences = output if isinstance(output, Tensor) else output.sequences
        length = sequences.shape[1] - prompt.shape[1]
        for row, tokens in said.items():
            # Lower beams of a flagged row hold leftovers of the search.
            rows = slice(row * settings.expand, (row + 1) * settings.expand)
            tail = (tokens + [filler] * length)[:length]
            sequences[rows, prompt.shape[1] :] = sequences.new_tensor(tail)
        return output


def _act(
    link: GuardLink, safety_map: SafetyMap, done: Judgement, verdict: Verdict, row: int
) -> None:
    """Note what one image of a row asks for. A row that must be refused is, whatever else it has.

    A warning without tokens, of a map that was set after the model was guarded, refuses.
    """
    acting = safety_map.judging.acting(verdict)
    warning = link.texts.warning(safety_map, acting)
    if verdict.action == "refuse" or (verdict.action == "warn" and warning is None):
        own = link.texts.refusal(safety_map, acting)
        if own is not None and not done.refused[row]:
            done.refusals[row] = own
        done.refused[row] = True
    elif verdict.action == "warn" and warning is not None:
        done.warnings.setdefault(row, warning)


def require_no_raise(verdicts: Sequence[Verdict]) -> None:
    """Raise `FlaggedImageError` for images whose policy is to raise."""
    reasons = {i: v.reason for i, v in enumerate(verdicts) if v.action == "raise" and v.reason}
    if reasons:
        named = ", ".join(f"image {i}: {reason.category}" for i, reason in reasons.items())
        raise FlaggedImageError(
            f"flagged by a policy that raises ({named}); nothing was generated. The reasons are in "
            "the error's `reasons`",
            tuple(reasons.values()),
        )


def _remember(link: GuardLink, verdicts: list[Verdict]) -> None:
    _LAST.set({**_LAST.get(), link.identity: verdicts})


def _as_mapping(output: Any) -> Mapping[str, Any]:
    return output if isinstance(output, Mapping) else {}


def _module(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a module, got {type(model).__name__}")
    return model


def require_map(link: GuardLink) -> SafetyMap:
    """The safety map; `ConfigError` when no verdict is possible."""
    if link.guard.safety_map is None:
        raise ConfigError(
            "the guard has no safety map, so no image can be judged: calibrate it (SafetyMap."
            "calibrate, or `vqguard calibrate`), or load a calibrated guard"
        )
    return link.guard.safety_map
