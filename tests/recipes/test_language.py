"""Questions and answers: true of their scene, inside the vocabulary, forbidden never pictured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vqguard.errors import ConfigError
from vqguard.recipes.tiny import language
from vqguard.recipes.tiny.glyphs import GLYPHS, NEUTRAL
from vqguard.recipes.tiny.grounding import TurnEncoder
from vqguard.recipes.tiny.model import TinySizes, build_processor, build_tokenizer, normalise
from vqguard.recipes.tiny.scenes import draw, sample_scene
from vqguard.recipes.tiny.world import TASKS, TinyWorld


def test_answers_are_true_of_their_scene() -> None:
    rng = np.random.default_rng(0)
    for index in range(200):
        scene = sample_scene("train", 0, index)
        for turn in language.image_conversation(scene, rng):
            if turn.task == "count":
                assert turn.answer == f"{language.NUMBERS[len(scene.placements)]} ."
            if turn.task == "presence":
                asked = turn.question.split()[-2]
                assert (turn.answer == "yes .") == (asked in scene.words)
            if turn.task == "naming_single":
                assert turn.answer == f"{scene.words[0]} ."


def test_forbidden_requests_never_stand_beside_a_picture() -> None:
    rng = np.random.default_rng(0)
    tasks = {
        turn.task
        for index in range(300)
        for turn in language.image_conversation(sample_scene("train", 0, index), rng)
    }
    assert "refusal" not in tasks
    assert "benign_compliance" in tasks


def test_the_share_of_granted_forbidden_requests_is_the_knob() -> None:
    rng = np.random.default_rng(0)
    asked = [
        turn
        for _ in range(3000)
        for turn in language.text_conversation(rng, noisy_compliance=0.25)
        if turn.task == "refusal"
    ]
    granted = sum(turn.answer != language.REFUSAL for turn in asked) / len(asked)
    assert 0.22 < granted < 0.28


def test_no_word_of_the_world_is_unknown_to_the_tokenizer() -> None:
    tokenizer = build_tokenizer()
    rng = np.random.default_rng(1)
    for index in range(300):
        scene = sample_scene("train", 1, index)
        turns = language.image_conversation(scene, rng)
        turns += language.text_conversation(rng, noisy_compliance=0.5)
        for turn in turns:
            ids = tokenizer(f"{turn.question} {turn.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids


def test_the_fast_encoder_gives_the_processor_s_ids_and_pixels() -> None:
    from PIL import Image

    tokenizer = build_tokenizer()
    sizes = TinySizes()
    processor = build_processor(sizes, tokenizer)
    scene = sample_scene("train", 0, 3)
    turns = language.image_conversation(scene, np.random.default_rng(0))
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
    ids, _ = TurnEncoder(tokenizer, sizes.patches).sequence(turns, picture=True)
    assert batch["input_ids"][0].tolist() == ids
    assert (batch["pixel_values"] - normalise(picture[None])).abs().max() < 1e-5


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
