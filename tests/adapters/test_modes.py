"""A verdict is computed in eval mode, whatever mode the model is in; a training step trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vqguard.adapters import get_adapter, visual_features
from vqguard.adapters.proof.guarded_subject import flag, guarded
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.errors import BypassError, SeamError
from vqguard.guard import recording

DROPPING = ("blip-2", "instructblip")  # their Q-Formers drop a tenth in training mode


def dropping(kind: str) -> Any:
    model = build_tiny(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return model


def codes_of(model: Any, inputs: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(verdict.semantic_code for verdict in model.screen(**inputs))


@pytest.mark.parametrize("kind", DROPPING)
def test_twenty_screens_of_a_model_in_training_mode(kind: str) -> None:
    model = dropping(kind)
    inputs = make_inputs(model, (1, 1))
    with guarded(model, inputs, "projected"):
        expected = codes_of(model, inputs)
        model.train()
        assert {codes_of(model, inputs) for _ in range(20)} == {expected}
        for _ in range(5):
            model.generate(**inputs, max_new_tokens=1)
            assert tuple(verdict.semantic_code for verdict in model.last_verdicts) == expected
        features = [visual_features(model, **inputs).semantic for _ in range(2)]
        assert torch.equal(*features)
        assert all(module.training for module in model.modules())


def test_generate_uses_no_codeword() -> None:
    model = build_tiny("llava")
    inputs = make_inputs(model, (1, 1))
    with guarded(model, inputs, "projected"):
        model.train()
        model.generate(**inputs, max_new_tokens=2)
        model.screen(**inputs)
        assert not any(buffer.any() for buffer in model.vqguard.buffers())
        model(**inputs)
        assert model.vqguard.patch.codebook.counts.any()


@pytest.mark.parametrize("kind", DROPPING)
def test_a_training_step_drops_and_judges_nothing(kind: str) -> None:
    model = dropping(kind)
    inputs = make_inputs(model, (1, 1))
    with guarded(model, inputs, "projected"):
        flag(model, set(range(model.vqguard.config.semantic_codes)))
        model.train()
        model.vqguard.freeze()
        with recording(model.vqguard) as outputs:
            for _ in range(4):
                model(**inputs)
        codes = [output.codes for output in outputs]
        assert any(not torch.equal(Tensor(codes[0]), Tensor(other)) for other in codes[1:])
        assert all(output.flagged is None for output in outputs)
        with recording(model.vqguard) as outputs, torch.no_grad():
            model(**inputs)
        assert outputs[0].flagged is not None
        assert outputs[0].flagged.all()


def test_a_cache_of_a_training_step_was_not_judged() -> None:
    model = build_tiny("llava")
    inputs = make_inputs(model, (1,))
    with guarded(model, inputs, "projected"):
        model.train()
        model.vqguard.freeze()
        cache = model(**inputs, use_cache=True).past_key_values
        ids = torch.cat([inputs["input_ids"], inputs["input_ids"][:, -1:]], dim=1)
        with pytest.raises(BypassError, match="training step"):
            model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=1)
        with torch.no_grad():
            cache = model(**inputs, use_cache=True).past_key_values
        assert model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=1) is not None


def test_a_frozen_encoder_at_rest_is_judged_in_training() -> None:
    """Nothing on the way to the verdict trains: only the language model does."""
    model = build_tiny("llava")
    inputs = make_inputs(model, (1, 1))
    with guarded(model, inputs, "projected"), recording(model.vqguard) as outputs:
        model.vqguard.freeze()
        get_adapter(model).language_model(model).train()
        model(**inputs)
        assert outputs[0].flagged is not None


def test_data_parallel_is_refused_by_its_name() -> None:
    """Replicas would reach the first device's guard, from threads without the context."""
    model = build_tiny("llava")
    inputs = make_inputs(model, (1, 1))
    with guarded(model, inputs, "projected"):
        replica = model._replicate_for_data_parallel()
        with pytest.raises(SeamError, match="DistributedDataParallel"):
            replica(**inputs)
