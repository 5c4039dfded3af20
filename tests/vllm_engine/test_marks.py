"""Marks in placeholders, and codes looked up: what needs no vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vqguard.adapters import load_guarded
from vqguard.adapters.sizes.pictures import open_processor
from vqguard.adapters.vllm_engine.codewords import Codewords
from vqguard.adapters.vllm_engine.judging import NOTHING, PictureJudge
from vqguard.adapters.vllm_engine.marks import WIDTH, Marks
from vqguard.errors import InputError


def test_marks_are_read_as_they_were_written() -> None:
    marks = Marks(b"secret", vocabulary=400, actions=5)
    for action in range(5):
        ids = marks.write(action)
        assert len(ids) == WIDTH
        assert all(0 <= token < 400 for token in ids)
        assert marks.read([*ids, 7, 7]) == action
    assert marks.read([7, 7, 7, 7]) is None
    assert marks.read(marks.write(1)[:-1]) is None


def test_marks_of_another_process_are_nobodys() -> None:
    ours, theirs = (Marks(secret, 32_000, 3) for secret in (b"ours", b"theirs"))
    assert ours.read(theirs.write(0)) is None


def test_marks_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        Marks(b"", vocabulary=1, actions=2)


def test_the_judge_holds_no_language_model_and_judges_as_the_model_does(
    llava_folder: Path, pictures: list[Image.Image]
) -> None:
    judge = PictureJudge(llava_folder, "cpu")
    held = {name: p.device.type for name, p in judge._model.named_parameters()}
    assert {name.split(".")[0] for name, place in held.items() if place == "meta"} >= {"lm_head"}
    assert any(place == "cpu" for name, place in held.items() if "vision_tower" in name)
    model = load_guarded(llava_folder, dtype=torch.float32)
    inputs = open_processor(llava_folder).image_processor(images=pictures, return_tensors="pt")
    seen = judge.look(dict(inputs), len(pictures))
    flagged = [verdict.flagged for verdict in model.screen(**inputs)]
    assert [judge.actions[picture.action].refuses for picture in seen] == flagged
    assert 0 < sum(flagged) < len(flagged)
    features = model.get_image_features(inputs["pixel_values"], return_dict=True).pooler_output
    words = Codewords(llava_folder)
    for picture, codewords, refused in zip(seen, features, flagged, strict=True):
        if refused:
            assert picture.codes.eq(0).all()  # nothing of it leaves the judge
        else:
            assert torch.equal(words.of(picture.codes), codewords)


def test_codes_are_looked_up_and_what_no_codebook_has_is_refused(llava_folder: Path) -> None:
    words = Codewords(llava_folder).to("cpu", torch.bfloat16)
    out = words.of(torch.tensor([[3], [NOTHING]]))
    assert out.dtype == torch.bfloat16
    assert out[1].eq(0).all()
    assert not out[0].eq(0).all()
    with pytest.raises(InputError, match="expected codes below 512, got 512"):
        words.of(torch.tensor([[512]]))


def test_codes_that_somebody_else_made_are_not_known(llava_folder: Path) -> None:
    judge, other = (PictureJudge(llava_folder, "cpu") for _ in range(2))
    codes = torch.arange(6, dtype=torch.int32)[:, None]
    assert judge.tag(codes).equal(judge.tag(codes.clone()))
    assert not judge.tag(codes).equal(other.tag(codes))
    assert not judge.tag(codes).equal(judge.tag(codes + 1))
