"""vLLM's models with codewords in the place of a tower."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.utils import StageMissingLayer

from vqguard.adapters.registry import adapter_or_default
from vqguard.adapters.vllm_engine.codewords import Codewords
from vqguard.adapters.vllm_engine.configuration import folder_of
from vqguard.adapters.vllm_engine.prepared import CODES
from vqguard.adapters.vllm_engine.processing import guarded_processing
from vqguard.adapters.vllm_engine.start import require_guardable
from vqguard.adapters.vllm_engine.vision_alone import require_served
from vqguard.errors import BypassError, SeamError


class GuardedModel:
    """Mixed into a registered multimodal class.

    Pictures come as codes. The tower is taken out before weights are read: there is nothing here
    that could look at pixels.
    """

    supports_encoder_cudagraph = False
    supports_mm_device_do_normalize = False  # the judge is shown pictures as they are normalised
    supports_tower_connector_lora = False
    deep_stack = True
    """Whether the class takes features of later layers beside the tokens, in their width."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        require_guardable(vllm_config)
        model_config = vllm_config.model_config
        require_served(model_config.hf_config.model_type)
        codewords = Codewords(folder_of(model_config))
        if codewords.levels and not self.deep_stack:
            raise SeamError(
                "this model adds features in later layers, which vLLM's Transformers backend leaves"
                " out: serve the folder with `vqguard serve`"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self._codewords = codewords
        self._dtype = model_config.dtype
        model: Any = self
        for path in self._towers():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, StageMissingLayer("vision", None))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        model: Any = self
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        self._codewords.to(next(model.parameters()).device, self._dtype)
        return loaded

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """One (N_i, d) tensor a picture, in the model's dtype."""
        codes = kwargs.get(CODES)
        if codes is None:
            raise BypassError(f"expected pictures as codes, got {', '.join(sorted(kwargs))}")
        return [self._codewords.of(picture) for picture in codes]

    def _towers(self) -> list[str]:
        """Modules that are between pixels and codewords."""
        model: Any = self
        return list(model._tower_model_names)


@guarded_processing
class GuardedLlava(GuardedModel, LlavaForConditionalGeneration):  # type: ignore[misc]
    """LLaVA."""


@guarded_processing
class GuardedQwen2_5VL(GuardedModel, Qwen2_5_VLForConditionalGeneration):  # type: ignore[misc]  # noqa: N801
    """Qwen2.5-VL."""


@guarded_processing
class GuardedQwen3VL(GuardedModel, Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """Qwen3-VL, with its deep-stack."""


@guarded_processing
class GuardedTransformers(GuardedModel, TransformersMultiModalForCausalLM):  # type: ignore[misc]
    """Any other family that has an adapter, by way of transformers' own language model."""

    deep_stack = False

    def _towers(self) -> list[str]:
        model: Any = self
        adapter = adapter_or_default(model.config.model_type)
        inner: nn.Module = model.model
        paths = [getattr(adapter, "vision_path", ""), *adapter.projector_paths]
        return [f"model.{path}" for path in paths if path and _has(inner, path)]


def _has(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True
