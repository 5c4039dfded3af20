"""Every family of the installed transformers against the conformance kit, and the kit itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vqguard.adapters import get_adapter
from vqguard.adapters.base import Adapter
from vqguard.adapters.families import registration
from vqguard.adapters.proof.conformance import CHECKS, check
from vqguard.adapters.proof.random_models import build_tiny, make_inputs
from vqguard.adapters.proof.random_models.build import mapped_types
from vqguard.adapters.proof.random_models.conformance_table import run_family
from vqguard.adapters.proof.results import Conformance
from vqguard.adapters.registry import adapter_types, declared_family
from vqguard.adapters.runtime.guard_link import GuardLink
from vqguard.adapters.seams import Seam
from vqguard.errors import InputError, SeamError

TABLE = json.loads(
    (Path(__file__).resolve().parents[2] / "docs" / "conformance.json").read_text(encoding="utf-8")
)
FAMILIES: dict[str, Any] = TABLE["families"]
NAMED = (
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "video_llava",
    "vipllava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "qwen3_5",
    "instructblip",
    "instructblipvideo",
    "blip-2",
)
OTHERS = sorted(
    kind
    for kind, row in FAMILIES.items()
    if kind not in NAMED and row["status"] in ("guarded", "no-bypass")
)


def same_version() -> bool:
    import transformers

    return bool(transformers.__version__ == TABLE["transformers"])


# The slow suite has the whole table; the largest two are left to it.
LARGEST = ("qwen3_5", "qwen3_vl_moe")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=pytest.mark.slow) if k in LARGEST else k for k in NAMED],
)
def test_named_families_pass_every_check(kind: str) -> None:
    row = run_family(kind)
    assert row["status"] == "guarded", row["detail"]
    if same_version():
        assert row == FAMILIES[kind]


@pytest.mark.parametrize("kind", OTHERS)
def test_nothing_gets_past_the_guard(kind: str) -> None:
    model = build_tiny(kind)
    for modality in sorted({seam.modality for seam in get_adapter(model).seams(model)}):
        inputs = make_inputs(model, (1, 2), modality=modality)
        found = check(model, inputs, only=("probe", "codewords"))
        assert found.passed, str(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_the_table_is_what_a_run_gives(kind: str) -> None:
    if not same_version():
        pytest.skip("the table was made with another transformers")
    assert run_family(kind) == FAMILIES[kind]


def test_the_table_holds_every_type_of_the_mapping() -> None:
    if same_version():
        assert set(FAMILIES) == set(mapped_types())
    seen = [row for row in FAMILIES.values() if row["status"] != "no pixels"]
    proved = [row for row in seen if row["status"] in ("guarded", "no-bypass")]
    assert len(proved) >= 0.94 * len(seen)
    assert all(FAMILIES[kind]["status"] == "guarded" for kind in NAMED)


def test_what_is_not_guarded_is_refused() -> None:
    refused = {kind for kind, row in FAMILIES.items() if row["status"] == "refused"}
    assert not refused & set(adapter_types())
    never = {kind for kind in FAMILIES if declared_family(kind).refused}
    assert never == {"diffusion_gemma", "inkling_mm_model", "pi0"}
    assert never <= refused
    for kind in never:
        with pytest.raises(SeamError, match="not guarded: it"):
            get_adapter(SimpleNamespace(config=SimpleNamespace(model_type=kind)))


@pytest.mark.parametrize("kind", ["evolla", "mistral4", "bert"])
def test_types_that_see_nothing_have_no_tiny_model(kind: str) -> None:
    with pytest.raises(InputError, match="no tiny model"):
        build_tiny(kind)


def run(model: Any, *names: str) -> Conformance:
    return check(model, make_inputs(model, (1, 2)), only=names)


def test_the_kit_finds_a_leak_and_says_where() -> None:
    model = build_tiny("llava")
    language = model.model.language_model
    tower = model.model.vision_tower
    original = language.forward

    def forward(**kwargs: Any) -> Any:
        return original(**{**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + seen[-1]})

    seen: list[Tensor] = []
    tower.register_forward_pre_hook(lambda _, args: seen.append(args[0].mean()))
    language.forward = forward
    found = run(model, "probe")
    assert [one.status for one in found.results] == ["failed"]
    assert "language_model" in found.results[0].detail
    assert not found.passed


class WrongRows(type(get_adapter(build_tiny("llava")))):  # type: ignore[misc]
    """Maps every image to the last row."""

    def rows(self, model: Any, seam: Any, arguments: Any, counts: list[int]) -> list[int]:
        ids: Any = self.prompt_ids(arguments)
        return [len(ids) - 1] * len(counts)


class OuterOnly(type(get_adapter(build_tiny("llava")))):  # type: ignore[misc]
    """An adapter as one would write it at first: `forward` calls the inner model's method."""

    vision_path = "model.vision_tower"
    language_path = "model.language_model"
    projector_paths = ("model.multi_modal_projector",)

    def seams(self, model: Any) -> tuple[Seam, ...]:
        return (Seam(""),)


def test_the_kit_finds_a_seam_that_nobody_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registration._ADAPTERS, "llava", OuterOnly)
    found = run(build_tiny("llava"))
    assert not found.passed
    failed = {one.name: one.detail for one in found.failures}
    assert "first seen in module 'model.language_model.layers.0" in failed["probe"]
    assert "no codewords" in failed["codewords"]
    assert "FAILED" in str(found)


def test_the_kit_finds_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny("llava")
    monkeypatch.setattr("vqguard.adapters.proof.guarded_subject.get_adapter", lambda _: WrongRows())
    found = run(model, "rows")
    assert found.results[0].status == "failed"
    assert "flag" in found.results[0].detail


def test_the_kit_finds_a_vector_that_is_no_codeword(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny("llava")
    original = GuardLink.quantise

    def spoiled(self: GuardLink, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        result.output.pooler_output[0] = result.output.pooler_output[0] + 0.01
        return result

    monkeypatch.setattr(GuardLink, "quantise", spoiled)
    found = run(model, "codewords")
    assert "no codewords" in found.results[0].detail


def test_the_kit_finds_an_argument_that_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_tiny("llava")
    monkeypatch.setattr(
        "vqguard.adapters.runtime.guarded_modules.refuse_arguments", lambda *_: None
    )
    found = run(model, "arguments")
    assert found.results[0].status == "failed"
    assert "inputs_embeds was not refused" in found.results[0].detail


def test_the_kit_leaves_the_model_as_it_was() -> None:
    model = build_tiny("qwen3_vl")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    assert run(model).passed
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert set(CHECKS) == {one.name for one in run(model).results}


def test_every_adapter_says_what_it_judges() -> None:
    for kind in ("llava", "qwen2_vl", "blip-2", "mllama"):
        adapter: Adapter = get_adapter(build_tiny(kind))
        assert adapter.global_token_note
