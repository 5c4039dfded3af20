"""What is done to a guarded model afterwards opens no way round: copies, casts, adapters, dispatch.

Shown with a guard of one codeword: whatever the pictures, the logits must not move.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vqguard.adapters import (
    build_guard,
    get_adapter,
    guard_model,
    load_guarded,
    visual_features,
)
from vqguard.adapters.features import Site
from vqguard.adapters.proof.probe import redraw
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.errors import BypassError, SeamError
from vqguard.safety_map import SafetyMap

FEW = ("qwen3_vl", "blip-2")
KINDS = (
    *FEW,
    "llava_next",
    "llava_onevision",
    "video_llava",
    "qwen2_5_vl",
    "instructblip",
    "mllama",
    "gemma3",
    "florence2",
)


def with_one_codeword(model: Any, site: Site = "projected") -> Any:
    guard = build_guard(model, site=site, patch_codes=1, semantic_codes=1, search="torch")
    counts = torch.tensor([[0, 1]])
    guard.safety_map = SafetyMap(("none",), counts, codebook_checksum=guard.checksum("semantic"))
    return guard_model(model, guard.eval(), refusal_ids=(7,))


@torch.no_grad()
def moved(model: Any, inputs: dict[str, Any], other: dict[str, Any]) -> float:
    return float((model(**inputs).logits - model(**other).logits).abs().max())


def as_type(dtype: torch.dtype) -> Callable[..., Any]:
    return lambda model, folder: model.to(dtype)


def lora(merged: bool) -> Callable[..., Any]:
    def wrap(model: Any, folder: Path) -> Any:
        from peft import LoraConfig, get_peft_model

        seams = {seam.path for seam in get_adapter(model).seams(model)}
        linear = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name not in seams and "vqguard" not in name
        ]
        config = LoraConfig(target_modules=linear, r=2, init_lora_weights=False)
        wrapped: Any = get_peft_model(model, config).eval()
        return wrapped.merge_and_unload() if merged else wrapped

    return wrap


def compiled(model: Any, folder: Path) -> Any:
    return torch.compile(model, backend="eager")


def owner_compiled(model: Any, folder: Path) -> Any:
    get_adapter(model).owner(model).compile(backend="eager")
    return model


def saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    return load_guarded(folder)


CHANGES: dict[str, Callable[[Any, Path], Any]] = {
    "copied": lambda model, folder: copy.deepcopy(model),
    "pickled": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "half": lambda model, folder: model.half(),
    "bfloat16": as_type(torch.bfloat16),
    "double": lambda model, folder: model.double(),
    "lora": lora(merged=False),
    "lora merged": lora(merged=True),
    "saved and loaded": saved,
    "compiled": compiled,
    "owner compiled": owner_compiled,
}
SLOW = ("compiled", "owner compiled", "double", "pickled", "half")


def cases() -> list[Any]:
    return [
        pytest.param(
            kind, change, marks=() if kind in FEW and change not in SLOW else pytest.mark.slow
        )
        for kind in KINDS
        for change in CHANGES
    ]


@pytest.mark.parametrize(("kind", "change"), cases())
def test_nothing_visual_gets_past_the_guard_afterwards(
    kind: str, change: str, tmp_path: Path
) -> None:
    model = build_tiny(kind)
    # transformers hangs hooks on a model that ran, and these cannot be pickled.
    fresh = copy.deepcopy(model)
    inputs = make_inputs(model, (1, 1))
    other = redraw(get_adapter(model), model, inputs, 0)
    assert moved(model, inputs, other) > 0
    changed = CHANGES[change](with_one_codeword(fresh), tmp_path)
    dtype = next(p.dtype for p in changed.parameters() if p.is_floating_point())
    names = {name for seam in get_adapter(model).seams(model) for name in seam.pixels}
    for call in (inputs, other):
        for name in names & call.keys():
            call[name] = call[name].to(dtype)
    assert moved(changed, inputs, other) == 0
    answers = [
        changed.generate(**call, do_sample=False, max_new_tokens=3) for call in (inputs, other)
    ]
    assert torch.equal(*answers)
    for run in (changed, changed.generate):
        with pytest.raises(BypassError):
            run(**inputs, mm_encoder_outputs={"image": 1}, cross_attention_states=1)


def on_the_cpu(model: Any, folder: Path) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, torch.device("cpu"))


def on_the_disk(model: Any, folder: Path) -> Any:
    from accelerate import disk_offload

    return disk_offload(model, str(folder), torch.device("cpu"))


def device_map(model: Any, folder: Path) -> Any:
    """The vision side stays, the rest waits on the disk."""
    from accelerate import dispatch_model

    tower = get_adapter(model).vision_modules(model)
    inside = {id(part) for module in tower for part in module.modules()}
    places: dict[str, Any] = {}
    for name, module in model.named_modules():
        if not list(module.children()) and list(module.parameters()):
            places[name] = "cpu" if id(module) in inside else "disk"
    loose = model.state_dict().keys() - {
        f"{name}.{one}" for name in places for one in model.get_submodule(name).state_dict()
    }
    places |= dict.fromkeys(loose, "cpu")
    return dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@torch.no_grad()
def runs(call: Callable[..., Any], inputs: dict[str, Any]) -> bool:
    """Whether accelerate brings every weight to where it is used; methods beside `forward`, and
    weights of a module that is read from outside, it does not know."""
    try:
        call(**inputs)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return False
    return True


DISPATCHES: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": on_the_cpu,
    "disk": on_the_disk,
    "device map": device_map,
}


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize(
    "kind", [k if k == "qwen2_5_vl" else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
@pytest.mark.parametrize("site", ["projected", "encoder"])
def test_a_dispatched_model_is_guarded_as_the_whole_one(
    kind: str, dispatch: str, site: Site, tmp_path: Path
) -> None:
    model = build_tiny(kind)
    if site not in get_adapter(model).sites:
        pytest.skip("the family has no such site")
    inputs = make_inputs(model, (1, 1))
    other = redraw(get_adapter(model), model, inputs, 0)
    plain = DISPATCHES[dispatch](copy.deepcopy(model), tmp_path / "plain")
    if not runs(plain, inputs):
        pytest.skip("accelerate cannot run this family so, guarded or not")
    with torch.no_grad():
        expected = with_one_codeword(copy.deepcopy(model), site)(**inputs).logits
    guarded = with_one_codeword(DISPATCHES[dispatch](model, tmp_path / "guarded"), site)
    with torch.no_grad():
        assert torch.allclose(guarded(**inputs).logits, expected, atol=1e-5)
    assert moved(guarded, inputs, other) == 0
    if runs(plain.generate, {**inputs, "max_new_tokens": 2}):
        assert guarded.generate(**inputs, max_new_tokens=2).shape[0] == 2


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize(
    "kind",
    [
        k if k in ("llava_next", "blip-2") else pytest.param(k, marks=pytest.mark.slow)
        for k in KINDS
    ],
)
@pytest.mark.parametrize("site", ["projected", "encoder"])
def test_a_guarded_model_may_be_dispatched_afterwards(
    kind: str, dispatch: str, site: Site, tmp_path: Path
) -> None:
    """Verdicts, refusals and answers stay; accelerate moves the guard away, and it comes back."""
    if site not in get_adapter(build_tiny(kind)).sites:
        pytest.skip("the family has no such site")
    if kind == "mllama" and dispatch != "device map":
        pytest.skip("accelerate cannot, guarded or not: the next test")
    inputs = make_inputs(build_tiny(kind), (1, 1))
    call = {**inputs, "max_new_tokens": 3, "do_sample": False}
    plain = DISPATCHES[dispatch](build_tiny(kind), tmp_path / "plain")
    whole, model = (with_two_cells(build_tiny(kind), inputs, site) for _ in range(2))
    model = DISPATCHES[dispatch](model, tmp_path / "guarded")
    expected = whole.screen(**inputs)
    assert [verdict.flagged for verdict in expected] == [False, True]
    if runs(plain, inputs):
        assert model.screen(**inputs) == expected
        with torch.no_grad():
            assert torch.allclose(model(**inputs).logits, whole(**inputs).logits, atol=1e-4)
        assert not any(tensor.is_meta for tensor in model.vqguard.state_dict().values())
    if runs(plain.generate, call):
        assert torch.equal(model.generate(**call), whole.generate(**call))
        assert model.last_verdicts == expected


@pytest.mark.parametrize("dispatch", ["cpu", "disk"])
def test_what_accelerate_cannot_off_load_is_told(dispatch: str, tmp_path: Path) -> None:
    """Mllama reads the device of a weight before it is brought; what fails then leaves it here,
    so that unguarded every other call fails."""
    inputs = make_inputs(build_tiny("mllama"), (1, 1))
    plain = DISPATCHES[dispatch](build_tiny("mllama"), tmp_path / "plain")
    assert [runs(plain, inputs) for _ in range(4)] == [False, True, False, True]
    whole, model = (with_two_cells(build_tiny("mllama"), inputs, "projected") for _ in range(2))
    model = DISPATCHES[dispatch](model, tmp_path / "guarded")
    for run in (model, model.generate, model.screen):
        with pytest.raises(SeamError, match="off-load the language model alone"):
            run(**inputs)
        assert model.screen(**inputs) == whole.screen(**inputs)  # the weight is still here


def with_two_cells(model: Any, inputs: dict[str, Any], site: Site) -> Any:
    """The second picture is flagged, the first is not."""
    harmless, flagged = visual_features(model, site, **inputs).semantic_units
    cells = torch.cat([harmless, flagged])
    guard = build_guard(model, site=site, patch_codes=8, semantic_codes=len(cells), search="torch")
    with torch.no_grad():
        guard.semantic.codebook.weight.copy_(cells)
    counts = torch.tensor([[0, 1]] * len(harmless) + [[1, 0]] * len(flagged))
    guard.safety_map = SafetyMap(("none",), counts, codebook_checksum=guard.checksum("semantic"))
    return guard_model(model, guard.eval(), refusal_ids=(7,))


def through_torch(model: Any) -> Any:
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    return torch.load(kept, weights_only=False)


AGAIN: dict[str, Callable[[Any], Any]] = {
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved whole": through_torch,
    "copied": copy.deepcopy,
    "shallow": copy.copy,
}


@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize(
    "kind",
    [
        k if k in ("llava", "mllama") else pytest.param(k, marks=pytest.mark.slow)
        for k in ("llava", *KINDS, "idefics2", "kosmos-2")
    ],
)
def test_a_model_that_ran_may_be_copied(kind: str, again: str) -> None:
    """transformers' hooks stay on a model that ran; a shallow copy shares its guarded modules."""
    inputs = make_inputs(build_tiny(kind), (1, 1))
    model = with_two_cells(build_tiny(kind), inputs, "projected")
    call = {**inputs, "max_new_tokens": 3, "do_sample": False}
    seen = {"output_hidden_states": True, "return_dict_in_generate": True}
    expected = model.generate(**call, **seen)
    assert [verdict.flagged for verdict in expected.verdicts] == [False, True]
    twin = AGAIN[again](model)
    assert twin.screen(**inputs) == expected.verdicts
    for one in (twin, model):
        answer = one.generate(**call, **seen)
        assert torch.equal(answer.sequences, expected.sequences)
        assert answer.verdicts == expected.verdicts
        own = "decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
        states: Any = getattr(answer, own, None)
        usual: Any = getattr(expected, own, None)
        assert (states is None) == (usual is None)
        assert states is None or torch.equal(states[0][-1], usual[0][-1])


SEAMS = {
    "blip-2": "language_projection",
    "instructblip": "language_projection",
    "mllama": "multi_modal_projector",
}


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", SEAMS)
def test_an_adapter_around_a_seam_leaks_and_is_refused(
    kind: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LoRA adds a product of the unquantised features to what the seam gives."""
    from peft import LoraConfig, get_peft_model

    model = with_one_codeword(build_tiny(kind))
    inputs = make_inputs(model, (1, 1))
    other = redraw(get_adapter(model), model, inputs, 0)
    name = SEAMS[kind]
    if kept:
        settings: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": [name]}
    else:
        settings = {"target_modules": [name], "init_lora_weights": False}
    wrapped: Any = get_peft_model(model, LoraConfig(r=2, **settings)).eval()
    if not kept:
        with monkeypatch.context() as without:
            without.setattr(
                "vqguard.adapters.runtime.guarded_modules.require_intact", lambda *_: None
            )
            assert moved(wrapped, inputs, other) > 0
    for run in (wrapped, wrapped.generate, model.generate):
        with pytest.raises(SeamError, match=f"{name!r} out of target_modules"):
            run(**inputs)


def test_a_replaced_module_and_a_patched_method_are_noticed() -> None:
    model = with_one_codeword(build_tiny("mllama"))
    inputs = make_inputs(model, (1, 1))
    model.model.multi_modal_projector = nn.Linear(192, 32)
    with pytest.raises(SeamError, match=r"is now a torch\.nn"):
        model(**inputs)
    model = with_one_codeword(build_tiny("qwen2_vl"))
    inputs = make_inputs(model, (1, 1))
    model.model.get_image_features = lambda *args, **kwargs: None
    for run in (model, model.generate):
        with pytest.raises(SeamError, match="was patched"):
            run(**inputs)
