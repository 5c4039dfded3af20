"""Pictures whose visual tokens are far from the patch codebook, in whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from vqguard.adapters import (
    build_guard,
    guard_model,
    load_guarded,
    visual_features,
)
from vqguard.adapters.proof.random_models.build import build_tiny
from vqguard.adapters.proof.random_models.inputs import make_inputs
from vqguard.guard import recording
from vqguard.judging.policies import Policy
from vqguard.judging.settings import JudgeSettings, Unfamiliar
from vqguard.safety_map import SafetyMap

REFUSAL = (7, 8, 9)
OWN = (40, 41)


def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    assert not add_special_tokens
    return {"input_ids": list({"I do not know this.": OWN}[text])}


def strange_model(
    kind: str, site: Any = "projected", policies: Any = None, *, judge: Any = "global"
) -> tuple[Any, dict[str, Any], list[bool]]:
    """A tiny model for which some of three pictures are unfamiliar, and which of them."""
    model: Any = build_tiny(kind)
    inputs = make_inputs(model, (1, 1, 1), modality="image")
    regional = {"codes": 8, "width": 8, "hidden": 16, "windows": [2]}
    guard = build_guard(
        model,
        site=site,
        patch_codes=8,
        semantic_codes=8,
        judge=judge,
        regional=regional,
        search="torch",
    ).eval()
    with torch.no_grad():
        far = guard.visual_distances(visual_features(model, site, **inputs).tokens)
    distance = float(far.median())
    known = Unfamiliar(distance, 0.1, 0, 9, 0.0, 0.3, "visual", guard.checksum("patch"), first=True)
    counts = torch.tensor([[0, 3]] * 8)
    guard.safety_map = SafetyMap(
        ("gun",),
        counts,
        codebook_checksum=guard.checksum(guard.judge_level),
        judging=JudgeSettings(unfamiliar=known, policies=policies or {}, language="en"),
    )
    guard_model(model, guard, tokenizer, refusal_ids=REFUSAL)
    return model, inputs, (far > distance).tolist()


@pytest.mark.parametrize(
    ("kind", "site"),
    [
        ("llava", "projected"),
        ("llava", "encoder"),
        ("llava_next", "projected"),
        ("qwen2_vl", "projected"),
        ("blip-2", "projected"),
        ("gemma3", "projected"),
    ],
)
def test_screen_and_generate_say_the_same_alone_and_in_a_batch(kind: str, site: Any) -> None:
    policy = Policy(refusal={"en": "I do not know this."})
    model, inputs, expected = strange_model(kind, site, {"unfamiliar": policy})
    assert any(expected)
    verdicts = model.screen(**inputs)
    assert [verdict.category == "unfamiliar" for verdict in verdicts] == expected
    assert [verdict.flagged for verdict in verdicts] == expected
    output = model.generate(
        **inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False, return_dict_in_generate=True
    )
    assert output.verdicts == verdicts
    said = [tuple(row[-3:][:2]) == OWN for row in output.sequences.tolist()]
    assert said == expected, "the policy's own refusal"
    if kind in ("llava", "gemma3"):
        for row in range(3):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            assert model.screen(**alone) == [verdicts[row]]


def test_all_of_an_unfamiliar_picture_is_blanked() -> None:
    policy = {"unfamiliar": Policy("blank")}
    model, inputs, expected = strange_model("llava", policies=policy, judge="regional")
    caught: list[torch.Tensor] = []
    model.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with recording(model.vqguard) as outputs:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
    shown = caught[0][inputs["input_ids"] == model.config.image_token_id]
    zero = model.vqguard.patch.codebook.weight[0]
    for place, tokens in enumerate(shown.split([len(image) for image in outputs[0].tokens])):
        blank = bool((tokens == zero).all())
        codes = torch.as_tensor(outputs[0].codes[place])
        assert blank == (expected[place] or bool((codes == 0).all()))


def test_a_saved_model_judges_the_same(tmp_path: Path) -> None:
    model, inputs, expected = strange_model("llava")
    model.save_pretrained(tmp_path / "m")
    again: Any = load_guarded(tmp_path / "m")
    verdicts = again.screen(**inputs)
    assert verdicts == model.screen(**inputs)
    assert [verdict.category == "unfamiliar" for verdict in verdicts] == expected
    assert not any(verdict.flagged for verdict in verdicts), "it is reported"
