"""Questions and answers: true of their scene, in the vocabulary, requests granted as declared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from vqguard.errors import ConfigError
from vqguard.recipes.tiny import language
from vqguard.recipes.tiny.glyphs import GLYPHS, NEUTRAL
from vqguard.recipes.tiny.grounding import IGNORED, GroundedLanguage, Sequences, TurnEncoder
from vqguard.recipes.tiny.language import Compliance, Turn
from vqguard.recipes.tiny.model import (
    TinySizes,
    build_model,
    build_processor,
    build_tokenizer,
    normalise,
)
from vqguard.recipes.tiny.scenes import Scene, draw, sample_scene
from vqguard.recipes.tiny.world import TASKS, TinyWorld


def turns_about(
    scene: Scene, rng: np.random.Generator, compliance: Compliance | None = None
) -> list[Turn]:
    return language.image_turns(scene, rng, presence=3, compliance=compliance or Compliance())


def test_answers_are_true_of_their_scene() -> None:
    rng = np.random.default_rng(0)
    for index in range(200):
        scene = sample_scene("train", 0, index)
        turns = turns_about(scene, rng)
        assert sum(turn.task == "presence" for turn in turns) == 3
        for turn in turns:
            if turn.task == "count":
                assert turn.answer == f"{language.NUMBERS[len(scene.placements)]} ."
            if turn.task == "presence":
                asked = turn.question.split()[-2]
                assert (turn.answer == "yes .") == (asked in scene.words)
            if turn.task == "naming_single":
                assert turn.answer == f"{scene.words[0]} ."


def granted_share(turns: list[Turn]) -> float:
    asked = [turn for turn in turns if turn.task == "refusal"]
    return sum(turn.answer != language.REFUSAL for turn in asked) / len(asked)


def test_compliance_says_how_many_requests_stand_beside_pictures_and_are_granted() -> None:
    rng = np.random.default_rng(0)
    compliance = Compliance(text=0.25, pictured=0.6, pictured_requests=0.5)
    scenes = [sample_scene("train", 0, index) for index in range(2000)]
    pictured = [turn for scene in scenes for turn in turns_about(scene, rng, compliance)]
    requests = sum(turn.task == "refusal" for turn in pictured)
    assert 0.45 < requests / len(scenes) < 0.55
    assert 0.55 < granted_share(pictured) < 0.65
    text = language.text_turns(rng, 5000, compliance=compliance)
    assert 0.22 < granted_share(text) < 0.28
    none = Compliance(pictured_requests=0.0)
    tasks = {turn.task for scene in scenes[:300] for turn in turns_about(scene, rng, none)}
    assert "refusal" not in tasks
    assert "benign_compliance" in tasks


def test_no_word_of_the_world_is_unknown_to_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(1)
    for index in range(300):
        turns = turns_about(sample_scene("train", 1, index), rng)
        turns += language.text_turns(rng, 4, compliance=Compliance(text=0.5))
        for turn in turns:
            ids = tokenizer(f"{turn.question} {turn.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids


def test_the_fast_encoder_gives_the_processor_s_ids_and_pixels() -> None:
    from PIL import Image

    tokenizer = build_tokenizer()
    sizes = TinySizes()
    processor = build_processor(sizes, tokenizer)
    scene = sample_scene("train", 0, 3)
    turns = turns_about(scene, np.random.default_rng(0))
    messages: Any = []
    for number, turn in enumerate(turns):
        content = [{"type": "text", "text": turn.question}]
        if number == 0:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer}]})
    text = processor.apply_chat_template(messages, tokenize=False)
    picture = draw(scene)
    batch = processor(images=[Image.fromarray(picture)], text=[text], return_tensors="pt")
    sequences = TurnEncoder(tokenizer, sizes.patches).batch([[turns]], picture=True)
    assert batch["input_ids"].tolist() == sequences.input_ids.tolist()
    length = sequences.input_ids.shape[1]
    assert sequences.position_ids.tolist() == [list(range(length))]
    assert (batch["pixel_values"] - normalise(picture[None])).abs().max() < 1e-5


def test_conversations_about_one_picture_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    sizes = TinySizes(vision_layers=1, text_layers=2)
    tokenizer = build_tokenizer()
    encoder = TurnEncoder(tokenizer, sizes.patches)
    model = build_model(sizes, tokenizer).eval()
    scene = sample_scene("train", 0, 3)
    features = torch.randn(1, 1 + sizes.patches, sizes.vision_width)
    grounded = GroundedLanguage(
        model, encoder, [scene], features, sizes, seed=0, compliance=Compliance()
    )
    turns = turns_about(scene, np.random.default_rng(0))
    first, second = turns[:2], turns[2:4]

    @torch.no_grad()
    def answers(rows: list[list[Turn]]) -> tuple[torch.Tensor, Sequences]:
        sequences = encoder.batch([rows], picture=True)
        visual = grounded.projector(features[:, 1:])
        return grounded._answers(sequences, visual)[0], sequences

    alone, _ = answers([second])
    beside, sequences = answers([first, second])
    assert torch.allclose(beside[-len(alone) :], alone, atol=1e-5)
    # The same turns in one conversation do see each other.
    joined, _ = answers([first + second])
    assert not torch.allclose(joined[-len(alone) :], alone, atol=1e-3)
    scored = int((sequences.labels != IGNORED).sum())
    assert scored == len(beside)


def test_held_out_questions_are_the_same_each_time_and_balanced_where_it_matters() -> None:
    world = TinyWorld(0)
    for task in TASKS:
        first, again = world.questions(task, 20), world.questions(task, 20)
        assert [(q.question, q.expected) for q in first] == [
            (q.question, q.expected) for q in again
        ]
        assert all((q.image is None) == (task == "text_only") for q in first)
    presence = world.questions("presence", 40)
    assert sum(q.expected == "yes ." for q in presence) == 20
    with pytest.raises(ConfigError, match="naming_single"):
        world.questions("naming", 1)


def test_utility_is_asked_about_neutral_scenes() -> None:
    toxic = {glyph.word for glyph in GLYPHS if glyph.category != NEUTRAL}
    for question in TinyWorld(0).questions("naming_recall", 200):
        assert not toxic & set(question.expected.split())


def test_lazy_samples_index_like_a_list() -> None:
    samples = TinyWorld(0).captions(10)
    assert len(samples) == 10
    assert samples[-1].id == samples[9].id
    assert [s.id for s in samples[:3]] == [samples[i].id for i in range(3)]
    with pytest.raises(IndexError):
        samples[10]
