"""What `generate` does about a flagged image, by the policy of its category."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vqguard.adapters import build_guard, guard_model, unguard_model
from vqguard.adapters.runtime.policy_texts import PolicyTexts
from vqguard.errors import ConfigError, FlaggedImageError
from vqguard.judging.policies import Policy
from vqguard.judging.settings import JudgeSettings
from vqguard.safety_map import SafetyMap

Make = Callable[..., Any]
REFUSAL, OWN, WARNING = [50, 51, 52, 53, 54], (40, 41), (45, 46, 47)
EOS, PAD, IMAGE = 2, 1, 60


def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    assert not add_special_tokens
    return {"input_ids": list({"No guns.": OWN, "Careful.": WARNING}[text])}


def with_policy(
    model: Any, make_inputs: Make, policy: Policy, images: tuple[int, ...] = (1, 1, 1), **more: Any
) -> tuple[Any, list[int], list[int]]:
    """The model guarded anew with a map that flags one picture's code, its inputs, codes, and which
    pictures have that code."""
    guard = model.vqguard
    for seed in range(50):
        inputs = make_inputs(images, seed)
        codes = [v.semantic_code for v in model.screen(pixel_values=inputs["pixel_values"])]
        alone = [code for code in codes if codes.count(code) == 1]
        if alone:
            break
    counts = torch.zeros(guard.config.semantic_codes, 2, dtype=torch.int64)
    counts[:, 1] = 3
    counts[alone[0]] = torch.tensor([3, 0])
    judging = JudgeSettings(policies={"gun": policy}, **more)
    unguard_model(model)
    guard.safety_map = SafetyMap(
        ("gun",), counts, codebook_checksum=guard.checksum("semantic"), judging=judging
    )
    guard_model(model, guard, tokenizer, refusal_ids=REFUSAL)
    return inputs, codes, [i for i, code in enumerate(codes) if code == alone[0]]


def answers(model: Any, inputs: Any, **settings: Any) -> list[list[int]]:
    settings = {"do_sample": False, "max_new_tokens": 8, **settings}
    output = model.generate(**inputs, **settings)
    new: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
    return new


def test_a_report_changes_nothing_but_the_verdict(make_guarded: Make, make_inputs: Make) -> None:
    model = make_guarded()
    inputs, _, [image] = with_policy(model, make_inputs, Policy("report"))
    told = answers(model, inputs)
    verdict = model.last_verdicts[image]
    assert (verdict.flagged, verdict.category, verdict.action) == (False, "gun", "report")
    neutral = torch.tensor([[0, 3]] * model.vqguard.config.semantic_codes)
    checksum = model.vqguard.checksum("semantic")
    model.vqguard.safety_map = SafetyMap(("gun",), neutral, codebook_checksum=checksum)
    assert told == answers(model, inputs)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_a_refusal_of_its_own_category(
    make_guarded: Make, make_inputs: Make, settings: dict[str, Any]
) -> None:
    model = make_guarded()
    policy = Policy(refusal={"en": "No guns.", "fr": "Non."})
    inputs, _, [image] = with_policy(model, make_inputs, policy, language="en")
    said = answers(model, inputs, **settings)
    expected = [*OWN, EOS, *[PAD] * 8]
    for row, answer in enumerate(said):
        assert (answer == expected[: len(answer)]) == (row == image)


def test_rows_that_all_refuse_say_each_its_own(make_guarded: Make, make_inputs: Make) -> None:
    model = make_guarded()
    policy = Policy(refusal={"en": "No guns."})
    inputs, _, [image] = with_policy(model, make_inputs, policy, language="en")
    one = {name: value[image : image + 1] for name, value in inputs.items()}
    ran: list[int] = []
    model.model.language_model.register_forward_hook(lambda *_: ran.append(1))
    assert answers(model, one) == [[*OWN, EOS]]
    assert not ran


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True}])
def test_a_warning_begins_the_answer_and_the_model_goes_on(
    make_guarded: Make, make_inputs: Make, settings: dict[str, Any]
) -> None:
    model = make_guarded()
    policy = Policy("warn", warning="Careful.")
    inputs, _, [image] = with_policy(model, make_inputs, policy)
    torch.manual_seed(0)
    said = answers(model, inputs, **settings)
    for row, answer in enumerate(said):
        assert (tuple(answer[:3]) == WARNING) == (row == image)
    assert len(said[image]) > len(WARNING), "the model goes on after it"
    assert said[image][:5] != REFUSAL


def test_a_warning_without_tokens_refuses(make_guarded: Make, make_inputs: Make) -> None:
    model = make_guarded()
    inputs, _, [image] = with_policy(model, make_inputs, Policy("warn", warning="Careful."))
    safety_map = model.vqguard.safety_map
    changed = {"gun": Policy("warn", warning="Another text.")}
    model.vqguard.safety_map = safety_map.with_judging(policies=changed)
    assert answers(model, inputs)[image][:5] == REFUSAL
    unguard_model(model)
    guard = build_guard(model, patch_codes=24, semantic_codes=6)
    guard.safety_map = SafetyMap(
        safety_map.categories,
        safety_map.counts,
        codebook_checksum=guard.checksum("semantic"),
        judging=safety_map.judging,
    )
    with pytest.raises(ConfigError, match="without the model's processor they have no tokens"):
        guard_model(model, guard, refusal_ids=REFUSAL)


def test_a_blanked_picture_is_taken_out_and_its_neighbour_stays(
    make_guarded: Make, make_inputs: Make
) -> None:
    model = make_guarded()
    inputs, codes, [image] = with_policy(model, make_inputs, Policy("blank"), images=(2, 1))
    caught: list[Any] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    said = answers(model, inputs)
    row, place = (0, image) if image < 2 else (1, 0)
    tokens = caught[0][row][inputs["input_ids"][row] == IMAGE].split(16)
    zero = model.vqguard.patch.codebook.weight[0]
    for index, picture in enumerate(tokens):
        assert bool((picture == zero).all()) == (index == place)
    assert said[row][:5] != REFUSAL
    assert model.last_verdicts[image].action == "blank"
    assert len(codes) == 3


def test_raising_stops_the_call_with_its_reasons(make_guarded: Make, make_inputs: Make) -> None:
    model = make_guarded()
    inputs, _, [image] = with_policy(model, make_inputs, Policy("raise"))
    with pytest.raises(FlaggedImageError, match=f"image {image}: gun") as caught:
        model.generate(**inputs, max_new_tokens=2)
    [reason] = caught.value.reasons
    verdict = model.screen(pixel_values=inputs["pixel_values"])[image]
    assert reason == verdict.reason
    assert verdict.reason.map_version == model.vqguard.safety_map.version


def test_texts_without_tokens_are_none() -> None:
    texts = PolicyTexts({"No guns.": OWN})
    safety_map = SafetyMap(("gun",), torch.tensor([[1, 0]]))
    assert texts.refusal(safety_map, "gun") is None
    assert texts.warning(safety_map, "gun") is None
