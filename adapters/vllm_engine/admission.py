"""What every request passes on its way into the engine: its pictures' marks become its answer."""

from __future__ import annotations

import functools
from typing import Any

from vllm import envs
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import BeamSearchParams

from vqguard.adapters.vllm_engine.configuration import is_guarded
from vqguard.adapters.vllm_engine.judging import Action, PictureJudge
from vqguard.adapters.vllm_engine.prepared import CODES, MADE
from vqguard.adapters.vllm_engine.processing import judge_for
from vqguard.adapters.vllm_engine.start import require_guardable

STAMP = "vqguard"
"""In a request's `extra_args`: the tokens that it must say first. Only admission writes it."""


def guard_admission(processor_class: Any) -> None:
    """Have vLLM's `InputProcessor` stamp what it lets in; does nothing the second time.

    Raises AttributeError on a vLLM that has it in another form: its plugins must not load there.
    """
    start, original = processor_class.__init__, processor_class.process_inputs
    resolve = processor_class.resolve_watermarking
    if getattr(original, "vqguard", False):
        return

    @functools.wraps(start)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if is_guarded(vllm_config.model_config):
            require_guardable(vllm_config)
            judge = judge_for(vllm_config.model_config)  # what is wrong with the folder is said now
            self.vqguard_judge = judge  # looking it up takes as long as admitting a request
            if envs.VLLM_ENABLE_V1_MULTIPROCESSING:
                judge.warm_up()  # in one process, numba before vLLM's kernels breaks these
        start(self, vllm_config, *args, **kwargs)

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, *args, **kwargs)
        if is_guarded(self.model_config):
            admit(self.vqguard_judge, request)
        return request

    @functools.wraps(resolve)
    def resolve_watermarking(self: Any, params: Any) -> Any:
        # the one thing that a beam search, online or not, asks of admission
        if isinstance(params, BeamSearchParams) and is_guarded(self.model_config):
            raise VLLMValidationError(
                "beam search chooses by probabilities that no refusal changes: leave "
                "use_beam_search out"
            )
        return resolve(self, params)

    process_inputs.vqguard = True  # type: ignore[attr-defined]
    processor_class.__init__ = __init__
    processor_class.process_inputs = process_inputs
    processor_class.resolve_watermarking = resolve_watermarking


def admit(judge: PictureJudge, request: Any) -> None:
    """Stamp a request with what it must say.

    Raises:
        VLLMValidationError: a picture of it did not come through the guard, or it has no answer.
    """
    if request.prompt_embeds is not None or request.sampling_params is None:
        raise VLLMValidationError("a guarded model takes texts and pictures, and answers in text")
    actions = [_action(judge, request, picture) for picture in request.mm_features or []]
    said = judge.together(actions)
    params = request.sampling_params
    if said.tokens and not said.refuses and params.structured_outputs is not None:
        said = judge.actions[1]  # a grammar has no room for a warning
    if said.refuses:
        said = _refusal(said, params)
    params.extra_args = {**(params.extra_args or {}), STAMP: list(said.tokens)}


def _action(judge: PictureJudge, request: Any, picture: Any) -> int:
    """What is to be done about one picture of a request."""
    place = picture.mm_position
    ids = request.prompt_token_ids[place.offset : place.offset + place.length]
    if place.is_embed is not None:
        ids = [token for token, shown in zip(ids, place.is_embed.tolist(), strict=True) if shown]
    action = judge.marks.read(ids)
    data = picture.data
    # None: the engine has it already, from an earlier request that was admitted
    known = data is None or (
        CODES in data and MADE in data and judge.tag(data[CODES].data).equal(data[MADE].data)
    )
    if action is None or not known or picture.modality != "image":
        raise VLLMValidationError("a picture did not come through the guard; nothing was answered")
    return action


def _refusal(said: Action, params: Any) -> Action:
    """The refusal with its end; whatever else was asked of the answer is left out."""
    params.structured_outputs = None
    params.thinking_token_budget = None
    params.trace_decode_token_ids = None
    params.min_tokens = 0
    params.ignore_eos = False
    params.stop = []
    params.stop_token_ids = []
    tokens = said.tokens
    end = _end(params)
    if end is not None:
        tokens = (*tokens, end)
    params.max_tokens = min(params.max_tokens, max(1, len(tokens)))
    return Action(tokens, refuses=True)


def _end(params: Any) -> int | None:
    if params._eos_token_id is None and params._all_stop_token_ids:
        params._eos_token_id = min(params._all_stop_token_ids)
    end: int | None = params._eos_token_id
    return end
