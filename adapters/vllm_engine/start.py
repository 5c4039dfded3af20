"""What an engine must not be started with: settings by which something would pass the guard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vqguard.adapters.vllm_engine.configuration import folder_of
from vqguard.errors import ConfigError

NO_ADDRESSES = "addresses-of-pictures-are-off.invalid"
"""The one host that pictures are fetched from where the operator named none; it never resolves."""


def require_guardable_model(model_config: Any) -> None:
    """Check what vLLM's `ModelConfig` says; every process that reads pictures or weights does.

    Raises:
        ConfigError: for a setting that goes round the guard, naming it.
    """
    _refuse(_model_settings(model_config))


def require_guardable(vllm_config: Any) -> None:
    """The same for everything that vLLM's `VllmConfig` says."""
    _refuse(_model_settings(vllm_config.model_config))
    _refuse(_engine_settings(vllm_config))


def keep_addresses_off(model_config: Any) -> None:
    """Have vLLM fetch no picture by its address, unless the operator named hosts."""
    if not model_config.allowed_media_domains:
        model_config.allowed_media_domains = [NO_ADDRESSES]


def _refuse(found: Iterator[str]) -> None:
    reasons = list(found)
    if reasons:
        raise ConfigError(
            "a guarded model is not served with " + "; nor with ".join(reasons) + ". Leave it out"
        )


def _model_settings(model: Any) -> Iterator[str]:
    pictures = model.multimodal_config
    if not folder_of(model).is_dir():
        yield f"an id of a hub ({model.model}): download the folder, and name it"
    if model.trust_remote_code:
        yield "--trust-remote-code, which executes what is loaded"
    if model.enable_prompt_embeds:
        yield "--enable-prompt-embeds: embeddings would stand in for judged pictures"
    if model.runner_type != "generate":
        yield f"--runner {model.runner_type}: a refusal needs an answer"
    if pictures is None:
        return
    if pictures.enable_mm_embeds or pictures.allow_missing_mm_embeddings:
        yield "--enable-mm-embeds: features would come past the guard"
    if pictures.mm_processor_kwargs:
        yield "--mm-processor-kwargs: the judge was calibrated for the processor as it was saved"
    if pictures.media_io_kwargs:
        yield "--media-io-kwargs, for the same reason"
    if pictures.mm_device_do_normalize:
        yield "--mm-device-do-normalize: the judge would be shown other numbers"
    if pictures.mm_encoder_only:
        yield "--mm-encoder-only"
    if pictures.is_multimodal_pruning_enabled():
        yield "--video-pruning-rate"


def _engine_settings(engine: Any) -> Iterator[str]:
    if engine.speculative_config is not None:
        yield "speculative decoding, which leaves out the logits processor that refuses"
    if getattr(engine, "diffusion_config", None) is not None:
        yield "diffusion decoding, which has no next token to force"
    if engine.compilation_config.cudagraph_mm_encoder:
        yield "cudagraph_mm_encoder, which would run an encoder in place of the guard"
    if engine.kv_transfer_config is not None:
        yield "a KV connector: keys and values of an engine without a guard could come in"
    if engine.ec_transfer_config is not None:
        yield "an encoder cache connector: features of an engine without a guard could come in"
    if engine.weight_transfer_config is not None:
        yield "weight transfer: verdicts are calibrated for the weights of the folder"
    lora = engine.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        yield "--enable-tower-connector-lora, for the same reason"
