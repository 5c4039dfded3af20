"""vLLM's processors with the guard in them: codes go to the workers in place of pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from vllm.exceptions import VLLMValidationError
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import ImageProcessorItems

from vqguard.adapters.seams import names_pixels
from vqguard.adapters.vllm_engine.configuration import folder_of
from vqguard.adapters.vllm_engine.judging import NOTHING, PictureJudge, Seen, judge_of
from vqguard.adapters.vllm_engine.marks import WIDTH
from vqguard.adapters.vllm_engine.start import keep_addresses_off, require_guardable_model
from vqguard.errors import VQGuardError

CODES, VERDICT, MADE = "vqguard_codes", "vqguard_verdict", "vqguard_made"
"""Of each picture: its codes, what is to be done about it, and by whom that was found."""

_UNSEEN: ContextVar[bool] = ContextVar("vqguard_unseen", default=False)
"""Whether pictures are made up, to measure memory with: they have no codes and are not judged."""


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
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        """Of the pixels, all of them: what a file or a request (`uuid`) calls a picture is no key.

        vLLM gives names of its own where it caches nothing.
        """
        return {
            modality: [_content(items.get(index)) for index in range(items.get_count())]
            for modality, items in inputs.mm_data_items.items()
        }

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Any) -> Any:
        data = super()._apply_hf_processor_main(mm_items, hf_kwargs)  # type: ignore[misc]
        if not any(_holds_pixels(name) for name in data):
            return data
        sizes = self._places(mm_items, hf_kwargs, data)
        seen = _blank(sizes) if _UNSEEN.get() else self._look(data, len(sizes))
        for name in [name for name in data if _holds_pixels(name)]:
            del data[name]
        shown = [len(picture.codes) for picture in seen]
        if shown != sizes:
            raise VLLMValidationError(
                f"pictures of {shown} visual tokens would be shown at {sizes} places"
            )
        if min(sizes) < WIDTH:
            raise VLLMValidationError(
                f"a picture of {min(sizes)} visual tokens is too small to be judged"
            )
        data[CODES] = [picture.codes for picture in seen]
        data[VERDICT] = torch.tensor([[picture.action] for picture in seen])
        if not _UNSEEN.get():
            data[MADE] = torch.stack([self._judge.tag(picture.codes) for picture in seen])
        return data

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
                [self._marked(update, int(pictures[i][VERDICT].data[0])) for update in of_item]
                for i, of_item in enumerate(of_modality)
            ]
            for modality, of_modality in updates.items()
        }

    @property
    def _judge(self) -> PictureJudge:
        processor: Any = self
        return judge_for(processor.info.ctx.model_config)

    def _places(self, mm_items: Any, hf_kwargs: Any, data: Any) -> list[int]:
        """How many placeholders each picture will have."""
        above: Any = super()
        items = MultiModalKwargsItems.from_hf_inputs(
            data, above._get_mm_fields_config(data, hf_kwargs)
        )
        updates = above._get_mm_prompt_updates(mm_items, hf_kwargs, items)
        return [int(_embedded(of_item[0].content).sum()) for of_item in updates["image"]]

    def _look(self, data: Mapping[str, Any], pictures: int) -> list[Seen]:
        """Judge them together; one by one where the processor left them of different sizes."""
        values = {name: value for name, value in data.items() if not name.startswith("num_")}
        try:
            if not any(names_pixels(n) and isinstance(v, list) for n, v in values.items()):
                return self._judge.look(values, pictures)
            return [
                seen
                for index in range(pictures)
                for seen in self._judge.look({n: _row(v, index) for n, v in values.items()}, 1)
            ]
        except VQGuardError as error:  # a server answers vLLM's own with a 400
            raise VLLMValidationError(str(error)) from error

    def _marked(self, update: Any, action: int) -> Any:
        """A prompt update whose first placeholders say what is to be done about the picture."""
        places = _embedded(update.content)
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


def _blank(sizes: Sequence[int]) -> list[Seen]:
    return [Seen(torch.full((size, 1), NOTHING, dtype=torch.int32), 0) for size in sizes]


def _embedded(content: Any) -> Tensor:
    """(length,) bool: at which tokens of an update embeddings stand."""
    if content.is_embed is None:
        return torch.ones(len(content.full), dtype=torch.bool)
    places: Tensor = content.is_embed(content.full)
    return places


def _holds_pixels(name: str) -> bool:
    """Whether a field has pixels in it, and does not count them."""
    return names_pixels(name) and not name.startswith("num_")


def _row(value: Any, index: int) -> Any:
    picked = value[index : index + 1]
    return torch.stack(picked) if isinstance(picked, list) else picked


def _content(picture: Any) -> str:
    """SHA-256 of a picture's pixels and of what says how to read them."""
    if isinstance(picture, Image.Image):
        palette = picture.getpalette() if picture.mode == "P" else None
        transparent = picture.info.get("transparency")
        form: Any = (picture.mode, picture.size, palette, transparent)
        pixels = picture.tobytes()
    else:
        values = np.ascontiguousarray(np.asarray(picture))
        form, pixels = (values.dtype.str, values.shape), values.tobytes()
    return hashlib.sha256(repr(form).encode() + b"\0" + pixels).hexdigest()
