"""vLLM's processors with the guard in them: codes go to the workers in place of pixels."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems

from vqguard.adapters.vllm_engine.configuration import folder_of
from vqguard.adapters.vllm_engine.judging import NOTHING, PictureJudge, Seen, judge_of
from vqguard.adapters.vllm_engine.marks import WIDTH
from vqguard.adapters.vllm_engine.prepared import (
    CODES,
    MADE,
    VERDICT,
    Prepared,
    contents_of,
    fit,
    holds_pixels,
    joined,
    one_reading,
    parted,
)
from vqguard.adapters.vllm_engine.start import keep_addresses_off, require_guardable_model
from vqguard.adapters.vllm_engine.waiting import Line, Waiting, whose_turn
from vqguard.errors import VQGuardError

PICTURES = 16
"""As many are looked at together at most, unless one request has more."""
VALUES = 2**23
"""Numbers in the pixels of these at most, unless one request has more; 32 MiB."""
logger = logging.getLogger(__name__)

_UNSEEN: ContextVar[bool] = ContextVar("vqguard_unseen", default=False)
"""Whether pictures are made up, to measure memory with: they have no codes and are not judged."""

_CACHE: ContextVar[Any] = ContextVar("vqguard_cache", default=None)
"""Of processed pictures, where the request that is prepared has one."""


def judge_for(model_config: Any) -> PictureJudge:
    """The judge of the folder that an engine serves: on a GPU if there is one."""
    return judge_of(folder_of(model_config), "cuda" if torch.cuda.is_available() else "cpu")


class GuardedInfo:
    """Mixed into what a processor knows of its model: pictures are all that it takes."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()  # type: ignore[misc]
        return {name: most if name == "image" else 0 for name, most in limits.items()}

    def _get_supported_modalities(self) -> list[str]:
        return ["image"]


class GuardedProcessing:
    """Mixed into a processor: judges what it prepared, and marks the placeholders."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.line = Line()
        processor: Any = self
        tokenizer = getattr(processor.info.get_hf_processor(), "tokenizer", None)
        warned = getattr(tokenizer, "deprecation_warnings", {})
        # several requests have more placeholders together than the model takes; it never sees them
        warned["sequence-length-is-longer-than-the-specified-maximum"] = True

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        with _made_up():
            return super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        if inputs.hf_processor_mm_kwargs or inputs.media_io_kwargs:
            raise VLLMValidationError(
                "mm_processor_kwargs and media_io_kwargs are not taken: the guard judges pictures "
                "as its own processor prepares them"
            )
        for modality, items in inputs.mm_data_items.items():
            if not isinstance(items, ImageProcessorItems):
                raise VLLMValidationError(
                    f"{modality}: a guarded model takes pictures and nothing else"
                )
        token = _CACHE.set(inputs.cache)
        try:
            with one_reading():
                return super().apply(inputs, timing_ctx)  # type: ignore[misc]
        finally:
            _CACHE.reset(token)

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Of the pixels, all of them: what a file or a request (`uuid`) calls a picture is no key.

        vLLM gives names of its own where it caches nothing.
        """
        return {modality: contents_of(items) for modality, items in inputs.mm_data_items.items()}

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        """Codes in place of pixels, which are looked at together with those of others that wait."""
        made_up = _UNSEEN.get() or bool(hf_kwargs)
        content = () if made_up else tuple(contents_of(mm_items.get("image")))
        turn = whose_turn()
        ready = turn is not None and turn.prepared is not None and turn.content == content
        own = turn.prepared if turn is not None and ready else self._normalised(mm_items, hf_kwargs)
        try:
            if own.seen is None:
                self._look(own, self._behind(own, content))
            return own.shown(self._judge)
        except VQGuardError as error:  # a server answers vLLM's own with a 400
            raise VLLMValidationError(str(error)) from error

    def _normalised(self, mm_items: Any, hf_kwargs: Any) -> Prepared:
        data = super()._apply_hf_processor_main(mm_items, hf_kwargs)  # type: ignore[misc]
        if not any(holds_pixels(name) for name in data):
            return Prepared(data, 0, [])
        made_up = _blank(self._places(mm_items, hf_kwargs, data)) if _UNSEEN.get() else None
        return Prepared(data, mm_items.get_count("image"), made_up)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        ours = {name: hf_inputs.pop(name) for name in (CODES, VERDICT, MADE) if name in hf_inputs}
        config = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)  # type: ignore[misc]
        hf_inputs.update(ours)
        added = {
            name: MultiModalFieldConfig.batched("image", keep_on_cpu=name != CODES) for name in ours
        }
        return {**config, **added}

    def _get_mm_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, items: Any) -> Any:
        updates = super()._get_mm_prompt_updates(  # type: ignore[misc]
            mm_items, hf_processor_mm_kwargs, items
        )
        if _UNSEEN.get():
            return updates
        pictures = items.get("image", [])
        return {
            modality: [
                [self._marked(update, pictures[i]) for update in of_item]
                for i, of_item in enumerate(of_modality)
            ]
            for modality, of_modality in updates.items()
        }

    @cached_property
    def _judge(self) -> PictureJudge:
        processor: Any = self
        return judge_for(processor.info.ctx.model_config)

    def _places(self, mm_items: Any, hf_kwargs: Any, data: Any) -> list[int]:
        """How many placeholders each picture will have that is made up."""
        above: Any = super()
        items = MultiModalKwargsItems.from_hf_inputs(
            data, above._get_mm_fields_config(data, hf_kwargs)
        )
        updates = above._get_mm_prompt_updates(mm_items, hf_kwargs, items)
        return [int(_embedded(of_item[0].content).sum()) for of_item in updates["image"]]

    def _behind(self, own: Prepared, content: tuple[str, ...]) -> list[tuple[Waiting, Prepared]]:
        """Those that wait whose pictures can be looked at together with `own`."""
        if not content or not fit(own.inputs, own.inputs):
            return []
        known = set(content)
        pictures, values, each = own.count, own.values, own.values / own.count
        waiting: list[Waiting] = []
        asked: list[tuple[Waiting, Any]] = []
        for request in self.line.behind():
            ahead = request.prepared
            if request.by_itself or (ahead is not None and not self._joins(own, ahead)):
                continue
            items = self._asked(request, known) if ahead is None else None
            if ahead is None and items is None:
                continue
            pictures += len(request.content)
            if pictures > PICTURES or each * pictures > VALUES:
                break
            known.update(request.content)
            waiting.append(request)
            asked += [(request, items)] if ahead is None else []
        self._prepare(asked)
        others: list[tuple[Waiting, Prepared]] = []
        for request in waiting:
            ahead = request.prepared
            if ahead is None or not self._joins(own, ahead):
                continue
            values += ahead.values
            if values > VALUES:
                break
            others.append((request, ahead))
        return others

    @staticmethod
    def _joins(own: Prepared, ahead: Prepared) -> bool:
        return ahead.seen is None and fit(own.inputs, ahead.inputs)

    def _asked(self, request: Waiting, known: set[str]) -> Any:
        """The pictures that its own turn will ask for, as far as they are not known or cached then.

        None where there are none, and where it is left to its own turn.
        """
        processor: Any = self
        cache = _CACHE.get()
        try:
            items = processor.info.parse_mm_data(request.data)
            contents = contents_of(items["image"]) if list(items) == ["image"] else []
            asked = [
                index
                for index, content in enumerate(contents)
                if cache is None or not (content in known or cache.is_cached_item(content))
            ]
            if asked and isinstance(items["image"], ImageProcessorItems):
                if len(asked) < len(contents):
                    pictures = [items["image"].get(index) for index in asked]
                    items = processor.info.parse_mm_data({"image": pictures}, validate=False)
                request.content = tuple(contents[index] for index in asked)
                return items
        except Exception:  # whatever it is, its own turn says it to whom it concerns
            logger.debug("a picture is left to its own turn", exc_info=True)
        request.by_itself = True
        return None

    def _prepare(self, asked: Sequence[tuple[Waiting, Any]]) -> None:
        """Have their pictures normalised: those of one size in one go, which costs about as much.

        Where sizes differ, a processor may pad a picture to the largest beside it.
        """
        alike: dict[Any, list[tuple[Waiting, Any]]] = {}
        for request, items in asked:
            alike.setdefault(_form(items["image"]) or id(request), []).append((request, items))
        for several in alike.values():
            if len(several) > 1 and self._prepare_together(several):
                continue
            for request, items in several:
                try:
                    request.prepared = self._normalised(items, {})
                except Exception:
                    logger.debug("a picture is left to its own turn", exc_info=True)
                    request.by_itself = True

    def _prepare_together(self, asked: Sequence[tuple[Waiting, Any]]) -> bool:
        """Whether that could be done."""
        processor: Any = self
        of_each = [items["image"] for _, items in asked]
        pictures = [items.get(i) for items in of_each for i in range(items.get_count())]
        try:
            together = processor.info.parse_mm_data({"image": pictures}, validate=False)
            data = self._normalised(together, {}).data
            fields = super()._get_mm_fields_config(data, {})  # type: ignore[misc]
            parts = parted(data, fields, [items.get_count() for items in of_each])
        except Exception:  # a broken picture among them
            logger.debug("pictures are normalised one request at a time", exc_info=True)
            return False
        for (request, _), part in zip(asked, parts, strict=True):
            request.prepared = part
        return True

    def _look(self, own: Prepared, others: Sequence[tuple[Waiting, Prepared]]) -> None:
        """Judge pictures together; `own` by itself where that fails, and the others at their turn.

        Raises `VQGuardError` for what is wrong with `own`.
        """
        if others:
            together = [own, *(prepared for _, prepared in others)]
            try:
                inputs = joined([prepared.inputs for prepared in together])
                seen = iter(self._judge.look_at(inputs, sum(p.count for p in together)))
                for prepared in together:
                    prepared.seen = [next(seen) for _ in range(prepared.count)]
                return
            except Exception:  # memory among them
                logger.debug("pictures are looked at one request at a time", exc_info=True)
                for request, _ in others:
                    request.by_itself = True
        if not own.ragged:
            own.seen = self._judge.look_at(own.inputs, own.count)
            return
        rows = [
            {name: _row(value, index) for name, value in own.inputs.items()}
            for index in range(own.count)
        ]
        own.seen = [picture for row in rows for picture in self._judge.look_at(row, 1)]

    def _marked(self, update: Any, picture: Any) -> Any:
        """A prompt update whose first placeholders say what is to be done about the picture."""
        places = _embedded(update.content)
        shown, room = len(picture[CODES].data), int(places.sum())
        if shown != room or shown < WIDTH:
            raise VLLMValidationError(
                f"a picture of {shown} visual tokens would be shown at {room} places: expected as "
                f"many, and at least {WIDTH}"
            )
        action = int(picture[VERDICT].data[0])
        full = list(update.content.full)
        for place, token in zip(
            places.nonzero().flatten().tolist(), self._judge.marks.write(action), strict=False
        ):
            full[place] = token
        content = replace(update.content, full=full, is_embed=lambda _: places)
        return replace(update, content=content)


def guarded_processing(model_class: Any) -> Any:
    """Class decorator: vLLM's processor of the class below, with the guard in it."""
    below = model_class._processor_factory

    def info(ctx: Any) -> Any:
        require_guardable_model(ctx.model_config)
        keep_addresses_off(ctx.model_config)
        return _mixed(GuardedInfo, below.info(ctx))(ctx)

    def processor(of: Any, dummy_inputs: Any) -> Any:
        return _mixed(GuardedProcessing, below.processor(of, dummy_inputs))(of, dummy_inputs)

    return MULTIMODAL_REGISTRY.register_processor(
        processor, info=info, dummy_inputs=below.dummy_inputs
    )(model_class)


def _mixed(mixin: type, made: Any) -> Any:
    """The class of what vLLM made, with a mixin: vLLM chooses it by the configuration."""
    return type(f"Guarded{type(made).__name__}", (mixin, type(made)), {})


@contextmanager
def _made_up() -> Iterator[None]:
    token = _UNSEEN.set(True)
    try:
        yield
    finally:
        _UNSEEN.reset(token)


def _form(items: Any) -> Any:
    """The mode and size of all of these pictures; None where they differ, or are no PIL images."""
    pictures = [items.get(i) for i in range(items.get_count())]
    if not all(isinstance(picture, Image.Image) for picture in pictures):
        return None
    forms = {(picture.mode, picture.size) for picture in pictures}
    return forms.pop() if len(forms) == 1 else None


def _blank(sizes: Sequence[int]) -> list[Seen]:
    return [Seen(torch.full((size, 1), NOTHING, dtype=torch.int32), 0) for size in sizes]


def _embedded(content: Any) -> Tensor:
    """(length,) bool: at which tokens of an update embeddings stand."""
    if content.is_embed is None:
        return torch.ones(len(content.full), dtype=torch.bool)
    places: Tensor = content.is_embed(content.full)
    return places


def _row(value: Any, index: int) -> Any:
    picked = value[index : index + 1]
    return torch.stack(picked) if isinstance(picked, list) else picked
