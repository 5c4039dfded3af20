"""The guard goes in without changing what the model is, and comes out without a trace."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import LlavaForConditionalGeneration, LlavaModel
from transformers.utils.generic import find_labels

from vqguard.adapters import build_guard, get_adapter, guard_model, unguard_model
from vqguard.codebooks.quantizer import straight_through
from vqguard.errors import BypassError, ConfigError, SeamError
from vqguard.guard import VQGuard

Make = Callable[..., Any]


def logits(model: Any, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def seen_by_language_model(model: Any, inputs: Any) -> torch.Tensor:
    """The embeddings at the image positions, as they enter the language model."""
    caught = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    visual: torch.Tensor = caught[0][inputs["input_ids"] == model.config.image_token_id]
    return visual


@pytest.mark.parametrize("site", ["projected", "encoder"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("layer", [-2, [-3, -2]])
def test_language_model_sees_only_codewords(
    make_guarded: Make, make_inputs: Make, site: str, strategy: str, layer: Any
) -> None:
    model = make_guarded(
        site=site, vision_feature_select_strategy=strategy, vision_feature_layer=layer
    )
    inputs = make_inputs((1, 2), tokens=16 + (strategy == "full"))
    with torch.no_grad():
        visual = seen_by_language_model(model, inputs)
        allowed = model.vqguard.patch.codebook.weight
        if site == "encoder":
            allowed = model.model.multi_modal_projector(allowed)
    distance = (visual[:, None] - allowed).abs().amax(-1).amin(-1)
    assert distance.max() <= (1e-5 if site == "encoder" else 0)
    assert bool((visual != visual[0]).any())


def test_isinstance_names_and_signatures_are_kept(make_guarded: Make) -> None:
    model = make_guarded()
    assert isinstance(model, LlavaForConditionalGeneration)
    assert isinstance(model.model, LlavaModel)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(model).__module__ == LlavaForConditionalGeneration.__module__
    for name in ("forward", "generate", "get_image_features", "save_pretrained"):
        expected = inspect.signature(getattr(LlavaForConditionalGeneration, name))
        assert inspect.signature(getattr(type(model), name)) == expected
    expected = inspect.signature(LlavaModel.get_image_features)
    assert inspect.signature(type(model.model).get_image_features) == expected
    labels: Any = find_labels
    assert labels(type(model)) == labels(LlavaForConditionalGeneration)
    assert type(model).can_generate()


def test_guard_is_registered_once(make_guarded: Make) -> None:
    model = make_guarded()
    keys = [key for key in model.state_dict() if "codebook.weight" in key]
    assert sorted(keys) == ["vqguard.patch.codebook.weight", "vqguard.semantic.codebook.weight"]


@pytest.mark.parametrize("site", ["projected", "encoder"])
def test_removal_restores_outputs_bit_for_bit(
    make_llava: Make, make_guarded: Make, make_inputs: Make, site: str
) -> None:
    model, inputs = make_llava(), make_inputs((1, 0, 2))
    before, keys = logits(model, inputs), list(model.state_dict())
    answers = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    make_guarded(model=model, site=site)
    assert not torch.equal(logits(model, inputs), before)
    assert unguard_model(model) is model
    assert torch.equal(logits(model, inputs), before)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), answers)
    assert type(model) is LlavaForConditionalGeneration
    assert type(model.model) is LlavaModel
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "screen")


def test_text_only_input_is_untouched(
    make_llava: Make, make_guarded: Make, make_inputs: Make
) -> None:
    inputs = make_inputs((0, 0))
    before = logits(make_llava(), inputs)
    answers = make_llava().generate(**inputs, max_new_tokens=4, do_sample=False)
    model = make_guarded()
    assert torch.equal(logits(model, inputs), before)
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), answers)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent_and_guarded(
    make_guarded: Make, make_inputs: Make, clone: Callable[[Any], Any]
) -> None:
    model, inputs = make_guarded(site="encoder"), make_inputs()
    twin = clone(model)
    before = logits(model, inputs)
    assert torch.equal(logits(twin, inputs), before)
    with torch.no_grad():
        twin.vqguard.patch.codebook.weight.mul_(-3)
    assert torch.equal(logits(model, inputs), before)
    assert not torch.equal(logits(twin, inputs), before)
    unguard_model(twin)
    assert torch.equal(logits(model, inputs), before)


def test_cast_model_works(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded().to(torch.bfloat16), make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    assert model.vqguard.patch.codebook.weight.dtype == torch.float32
    visual = seen_by_language_model(model, inputs)
    allowed = model.vqguard.patch.codebook.weight.to(torch.bfloat16)
    assert all((row == allowed).all(-1).any() for row in visual)


def test_get_image_features_keeps_its_conventions(make_guarded: Make, make_inputs: Make) -> None:
    model, pixels = make_guarded(), make_inputs((2,))["pixel_values"]
    output = model.get_image_features(pixels)
    assert [len(image) for image in output.pooler_output] == [16, 16]
    as_tuple = model.get_image_features(pixels, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert any(part is output.pooler_output or isinstance(part, list) for part in as_tuple)


def test_wrong_installations_are_refused(make_llava: Make, make_guarded: Make) -> None:
    model = make_guarded()
    with pytest.raises(SeamError, match="guarded already"):
        guard_model(model, build_guard(model))
    plain = make_llava()
    with pytest.raises(SeamError, match="without a guard"):
        unguard_model(plain)
    narrow = VQGuard(type(model.vqguard.config)(patch_dim=8, semantic_dim=8, patch_codes=4))
    with pytest.raises(SeamError, match="width 32"):
        guard_model(plain, narrow)
    with pytest.raises(SeamError, match="expected a transformers model"):
        guard_model(torch.nn.Linear(2, 2), narrow)
    with pytest.raises(ConfigError, match=r"\[0, 64\)"):
        guard_model(plain, build_guard(plain, patch_codes=4), refusal_ids=[64])
    assert type(plain) is LlavaForConditionalGeneration
    assert not hasattr(plain, "vqguard")


def test_replaced_guard_is_noticed(make_guarded: Make, make_inputs: Make) -> None:
    model = make_guarded()
    model.vqguard = build_guard(model, patch_codes=4)
    with pytest.raises(SeamError, match="replaced by assignment"):
        model.generate(**make_inputs())


def test_one_step_of_each_stage_moves_what_it_trains(make_guarded: Make, make_inputs: Make) -> None:
    model = make_guarded().train()
    inputs = make_inputs((1, 1))
    adapter = get_adapter(model)
    first, second = adapter.stage1_trainable(model), adapter.stage2_trainable(model)
    names = {name for name, _ in model.named_parameters()}
    one, two = {name for name, _ in first}, {name for name, _ in second}
    assert one == {n for n in names if "multi_modal_projector" in n or n.startswith("vqguard.")}
    assert two == {n for n in names if "language_model" in n or n.startswith("lm_head")}
    model.requires_grad_(False)
    for _, parameter in first:
        parameter.requires_grad_(True)
    with straight_through(model.vqguard):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {n for n in one if "multi_modal_projector" in n}  # codebooks: by their losses


def test_trainer_can_take_a_step(make_guarded: Make, make_inputs: Make, tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    model = make_guarded()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    before = model.lm_head.weight.detach().clone()
    inputs = make_inputs((1, 1))
    rows = [
        {
            "input_ids": inputs["input_ids"][0],
            "labels": inputs["input_ids"][0],
            "pixel_values": inputs["pixel_values"][0],
            "unused": 1,
        }
    ] * 2
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="steps", save_steps=1
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(model.lm_head.weight, before)
    assert (tmp_path / "checkpoint-1" / "vqguard.json").is_file()


def test_peft_wraps_a_guarded_model(make_guarded: Make, make_inputs: Make) -> None:
    from peft import LoraConfig, get_peft_model

    model, inputs = make_guarded(flag=(0, 1, 2, 3, 4, 5)), make_inputs()
    before = logits(model, inputs)
    wrapped: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert torch.equal(logits(wrapped, inputs), before)
    assert wrapped.generate(**inputs, max_new_tokens=3)[0, -3:].tolist() == [50, 51, 52]
    wrapped(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert torch.equal(logits(wrapped.merge_and_unload(), inputs), before)


def test_model_on_the_meta_device(make_llava: Make) -> None:
    with torch.device("meta"):
        model = make_llava()
    guard_model(model, build_guard(model, patch_codes=4))
    assert all(p.is_meta for n, p in model.named_parameters() if not n.startswith("vqguard."))


def test_off_loading_hooks_do_not_hide_the_guard(
    make_llava: Make, make_guarded: Make, make_inputs: Make
) -> None:
    """accelerate keeps a bound `forward` on each module of a dispatched model."""
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    inputs = make_inputs()
    expected = logits(make_guarded(site="encoder"), inputs)
    before = logits(make_llava(), inputs)
    plain = cpu_offload(make_llava(), torch.device("cpu"))
    add_hook_to_module(plain.model, AlignDevicesHook("cpu", io_same_device=True))
    model = make_guarded(model=plain, site="encoder")
    assert torch.allclose(logits(model, inputs), expected, atol=1e-5)
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
    features = model.get_image_features(inputs["pixel_values"])
    for run in (model, model.model, model.generate):
        with pytest.raises(BypassError):
            run(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features})
    assert torch.equal(logits(unguard_model(model), inputs), before)


@pytest.mark.parametrize("kind", ["qwen3_vl", "instructblip", "mllama", "llava_next"])
def test_families_are_copied_wrapped_and_never_duplicated(kind: str) -> None:
    from peft import LoraConfig, get_peft_model

    from vqguard.adapters.proof.random_models import build_tiny, make_inputs

    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 1))
    before = dict(model.named_parameters())
    guard_model(model, build_guard(model, patch_codes=8, semantic_codes=2))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    expected = logits(model, inputs)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.vqguard.patch.codebook.weight.mul_(-3)
    assert torch.equal(logits(model, inputs), expected)
    assert not torch.equal(logits(twin, inputs), expected)
    with pytest.raises(BypassError):
        twin(**inputs, inputs_embeds=torch.zeros(2, 3, 32))
    wrapped: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert torch.equal(logits(wrapped, inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_vl", "instructblip"])
def test_families_are_compiled_and_dispatched(kind: str) -> None:
    from accelerate import cpu_offload

    from vqguard.adapters.proof.random_models import build_tiny, make_inputs

    model = build_tiny(kind)
    inputs = make_inputs(model, (1, 1))
    guard = build_guard(model, patch_codes=8, semantic_codes=2)
    expected = logits(guard_model(model, guard), inputs)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled, inputs), expected, atol=1e-4)
    off = cpu_offload(unguard_model(model), torch.device("cpu"))
    assert torch.allclose(logits(guard_model(off, guard), inputs), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["forward", "get_image_features"])
def test_patched_instances_are_refused(make_llava: Make, name: str) -> None:
    model = make_llava()
    setattr(model.model, name, getattr(model.model, name))
    with pytest.raises(SeamError, match="replaced on the instance"):
        guard_model(model, build_guard(model, patch_codes=4))
    assert type(model) is LlavaForConditionalGeneration


@pytest.mark.slow
def test_compiled_model_gives_the_same_logits(make_guarded: Make, make_inputs: Make) -> None:
    model, inputs = make_guarded(), make_inputs((1, 2))
    expected = logits(model, inputs)
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled, inputs), expected, atol=1e-5)
    with pytest.raises(BypassError):
        compiled(inputs_embeds=torch.zeros(1, 2, 32))


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.utils.output_capturing") is None,
    reason="this transformers patches methods while it captures hidden states",
)
def test_concurrent_calls_do_not_mix(make_guarded: Make, make_inputs: Make) -> None:
    model = make_guarded()
    batches = [make_inputs((1,), seed) for seed in range(8)]
    settings = {"max_new_tokens": 6, "do_sample": False}
    alone = [model.generate(**batch, **settings) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: model.generate(**batch, **settings), batches))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
