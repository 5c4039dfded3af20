"""The entry point `vllm.general_plugins`: vLLM calls it in every process that it starts."""

from __future__ import annotations

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from vllm import ModelRegistry
from vllm.entrypoints.common.offline import OfflineInferenceMixin
from vllm.renderers.base import BaseRenderer
from vllm.transformers_utils import config as vllm_configs
from vllm.v1.engine.input_processor import InputProcessor

from vqguard.adapters.storage.closed_config import GUARDED, MODEL_TYPE
from vqguard.adapters.vllm_engine.admission import guard_admission
from vqguard.adapters.vllm_engine.chats import have_chats_wait
from vqguard.adapters.vllm_engine.configuration import EngineConfig
from vqguard.adapters.vllm_engine.waiting import have_requests_wait

NATIVE = {
    "LlavaForConditionalGeneration": "GuardedLlava",
    "Qwen2_5_VLForConditionalGeneration": "GuardedQwen2_5VL",
    "Qwen3VLForConditionalGeneration": "GuardedQwen3VL",
}
"""vLLM's own classes that are proven with the guard in them."""
REST = "TransformersMultiModal"
"""What the Transformers backend is called where an operator asks for it by `--hf-overrides`."""


def register() -> None:
    """Have vLLM know guarded folders. May be called any number of times."""
    guard_admission(InputProcessor)
    have_requests_wait(BaseRenderer, OfflineInferenceMixin)
    have_chats_wait(BaseRenderer, OfflineInferenceMixin)
    module = "vqguard.adapters.vllm_engine.models"
    architectures = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values(), REST}
    for name in sorted(architectures | NATIVE.keys()):
        made = NATIVE.get(name, "GuardedTransformers")
        ModelRegistry.register_model(f"{GUARDED}{name}", f"{module}:{made}")
    vllm_configs._CONFIG_REGISTRY[MODEL_TYPE] = EngineConfig
