"""Several pictures in a sample: from the file to both stages, on three families."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters import build_guard, guard_model, visual_features
from vqguard.adapters.proof.random_models import build_tiny
from vqguard.codebooks.losses import semantic_loss
from vqguard.errors import DataError
from vqguard.recipes.data.encoding import (
    CAPTION,
    ENCODER_TOKENS,
    IGNORED,
    Collator,
    EncodedSamples,
    image_token_id,
    pad_id,
)
from vqguard.recipes.data.feature_cache import FeatureCache
from vqguard.recipes.data.llava_json import read_llava
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.recipe import Stage1Recipe, Stage2Recipe
from vqguard.recipes.training.stage1 import Stage1Trainer, of_turns
from vqguard.recipes.training.stage2 import Stage2Trainer

MakeModel = Callable[..., tuple[Any, Any]]
FAMILIES = {"llava-next": "llava_next", "qwen2-vl": "qwen2_vl", "qwen3-vl": "qwen3_vl"}


def coloured(colour: str, size: tuple[int, int] = (48, 48)) -> Any:
    return lambda: Image.new("RGB", size, colour)


def samples() -> list[Sample]:
    """Rows of one, three (over two turns), no and two pictures, of several shapes."""
    red, blue, wide = coloured("red"), coloured("blue"), coloured("green", (64, 32))
    return [
        Sample("one", (red,), (("<image>\nwhat is this ?", "dog ."),)),
        Sample(
            "three",
            (blue, wide, red),
            (("<image> and <image> ?", "cat ."), ("<image>\nis there a dog ?", "no .")),
        ),
        Sample("none", (), (("hello", "yes ."),)),
        Sample("two", (wide, blue), (("first <image> then <image>", "yes ."),)),
    ]


def family(kind: str, processor: Any) -> Any:
    """A guarded random model that takes the processor's ids."""
    token = image_token_id(processor)
    fields: dict[str, Any] = {"text_config__vocab_size": len(processor.tokenizer)}
    if kind == "llava-next":
        fields["image_token_index"] = token
    else:
        ids = processor.tokenizer.convert_tokens_to_ids
        fields |= {
            "image_token_id": token,
            "video_token_id": ids("<|video_pad|>"),
            "vision_start_token_id": ids("<|vision_start|>"),
            "vision_end_token_id": ids("<|vision_end|>"),
        }
    model = build_tiny(FAMILIES[kind], **fields)
    return guard_model(model, build_guard(model, patch_codes=8, semantic_codes=4))


@pytest.fixture(
    params=[
        "llava-tiny",
        "llava-next",
        "qwen2-vl",
        pytest.param("qwen3-vl", marks=pytest.mark.slow),
    ]
)
def guarded(request: pytest.FixtureRequest, small_guarded: MakeModel) -> tuple[Any, Any]:
    if request.param == "llava-tiny":
        return small_guarded()
    processor = request.getfixturevalue("family_processor")(request.param)
    return family(request.param, processor), processor


def codewords_apart(features: torch.Tensor, codes: int) -> torch.Tensor:
    """Up to `codes` of the features, each the farthest from those before it; where all features
    are taken, the rest lies far away from them.

    No feature stands between two codewords: a kernel that rounds otherwise for one row than for
    four moves it to no other code.
    """
    features = features.double()
    chosen = features[:1]
    while len(chosen) < codes:
        distance, farthest = torch.cdist(features, chosen).amin(dim=1).max(dim=0)
        if distance < 1e-3:
            away = 100 + torch.arange(codes - len(chosen), dtype=torch.float64)
            chosen = torch.cat([chosen, away[:, None].expand(-1, features.shape[1])])
        else:
            chosen = torch.cat([chosen, features[farthest, None]])
    nearest = torch.cdist(features, chosen).topk(2, dim=1, largest=False).values
    assert (nearest[:, 1] - nearest[:, 0]).min() > 1e-4
    return chosen.float()


def test_a_batch_of_rows_with_several_pictures_is_its_rows(guarded: tuple[Any, Any]) -> None:
    model, processor = guarded
    data = EncodedSamples(samples(), processor, 512)
    collate = Collator(pad_id(processor))
    model.eval()
    batch = collate([data[i] for i in range(4)])
    # codewords that are features, so that another picture is another code
    features = visual_features(model, **batch)
    codebook = model.vqguard.patch.codebook
    with torch.no_grad():
        codebook.weight.copy_(codewords_apart(torch.cat(list(features.tokens)), codebook.codes))
    captions = [batch.pop(name) for name in CAPTION]
    assert captions[2].tolist() == [1, 2, 1, 2]
    assert len(captions[0]) == 4
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(4):
            alone = collate([data[row]])
            alone = {k: v for k, v in alone.items() if k not in CAPTION}
            logits = model(**alone).logits[0]
            assert torch.allclose(logits, together[row, : len(logits)], atol=1e-4)
    # each of the pictures counts: another last one is another answer. It is one of the batch's,
    # since the codewords are features of those: any other may have the same code.
    one, *_, two = samples()
    other = replace(two, images=(two.images[0], one.images[0]))
    changed = collate([EncodedSamples([other], processor, 512)[0]])
    with torch.no_grad():
        logits = model(**{k: v for k, v in changed.items() if k not in CAPTION}).logits[0]
    assert not torch.allclose(logits, together[3, : len(logits)], atol=1e-4)


def test_instructblip_takes_questions_of_other_lengths(
    family_processor: Callable[[str], Any],
) -> None:
    processor = family_processor("instructblip")
    fields: dict[str, Any] = {
        "text_config__vocab_size": len(processor.tokenizer),
        "qformer_config__vocab_size": len(processor.qformer_tokenizer),
        "image_token_index": image_token_id(processor),
    }
    model = build_tiny("instructblip", **fields)
    red = (coloured("red"),)
    rows = [
        Sample("short", red, (("<image>\nWhat?", "A red field."),)),
        Sample("long", red, (("<image>\nWhich of the two is larger?", "Yes."),)),
    ]
    data = EncodedSamples(rows, processor, 512)
    collate = Collator(pad_id(processor))
    batch = collate([data[0], data[1]])
    loss = model(**{k: v for k, v in batch.items() if k not in CAPTION}).loss
    losses = []
    for row in range(2):
        alone = {k: v for k, v in collate([data[row]]).items() if k not in CAPTION}
        losses.append((model(**alone).loss, int((alone["labels"] != IGNORED).sum())))
    total = sum(one * count for one, count in losses) / sum(count for _, count in losses)
    assert torch.allclose(loss, total, atol=1e-4)


def test_both_stages_train(
    guarded: tuple[Any, Any],
    stage1_recipe: Stage1Recipe,
    stage2_recipe: Stage2Recipe,
    tmp_path: Path,
) -> None:
    model, processor = guarded
    pictured = [sample for sample in samples() if sample.images]
    first = replace(stage1_recipe, batch=3, samples=3, max_length=512)
    trainer = Stage1Trainer(
        model, first, EncodedSamples(pictured, processor, 512), tmp_path / "1", seed=0
    )
    trainer.run(resume=False)
    second = replace(stage2_recipe, batch=4, samples=4, max_length=512)
    Stage2Trainer(
        model, second, EncodedSamples(samples(), processor, 512), tmp_path / "2", seed=0
    ).run(resume=False)
    for stage in ("1", "2"):
        lines = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        assert all(torch.isfinite(torch.tensor(json.loads(line)["loss"])) for line in lines)
        assert lines


def test_a_turn_s_pictures_are_drawn_to_its_answer_together() -> None:
    torch.manual_seed(0)
    codewords, captions = torch.randn(4, 8), torch.randn(3, 8)
    turns = of_turns(codewords, torch.tensor([1, 2, 1]))
    assert torch.equal(turns[0], codewords[0])
    assert torch.allclose(turns[1], codewords[1:3].mean(0))
    assert torch.equal(turns[2], codewords[3])
    # with a picture each it is the paper's loss, to the bit
    alone = of_turns(codewords[:3], torch.tensor([1, 1, 1]))
    assert torch.equal(semantic_loss(alone, captions), semantic_loss(codewords[:3], captions))


def test_the_order_of_several_pictures_counts(small_guarded: MakeModel) -> None:
    _, processor = small_guarded()
    two = samples()[3]
    swapped = replace(two, images=two.images[::-1])
    encoded = EncodedSamples([two, swapped], processor, 512)
    one, other = encoded[0], encoded[1]
    assert torch.equal(one["pixel_values"], other["pixel_values"].flip(0))


def test_features_are_kept_for_each_picture(small_guarded: MakeModel, tmp_path: Path) -> None:
    model, processor = small_guarded()
    cache = FeatureCache.build(tmp_path, model, processor, samples())
    assert [len(cache[sample.id]) for sample in samples() if sample.images] == [1, 3, 2]
    again = FeatureCache.build(tmp_path, model, processor, samples())  # read from its index
    collate = Collator(pad_id(processor))
    batches = []
    for kept in (None, cache, again):
        data = EncodedSamples(samples(), processor, 512, kept)
        batches.append(collate([data[i] for i in range(4)]))
    pixels, kept_batch, read = batches
    for name in ("input_ids", "labels", *CAPTION):
        assert torch.equal(pixels[name], kept_batch[name])
    assert len(kept_batch[ENCODER_TOKENS]) == 6
    assert torch.equal(kept_batch[ENCODER_TOKENS], read[ENCODER_TOKENS])
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels["pixel_values"]).last_hidden_state
    assert torch.allclose(kept_batch[ENCODER_TOKENS], hidden[:, 1:], atol=1e-5)


def test_turns_whose_pictures_do_not_fit_are_left_out(small_guarded: MakeModel) -> None:
    _, processor = small_guarded()
    three = samples()[1]
    whole = EncodedSamples([three], processor, 512)[0]
    first = len(
        EncodedSamples(
            [replace(three, images=three.images[:2], turns=three.turns[:1])], processor, 512
        )[0]["input_ids"]
    )
    cut = EncodedSamples([three], processor, first + 3)[0]
    assert len(cut["pixel_values"]) == 2
    assert cut["input_ids"] == whole["input_ids"][:first]
    assert cut["caption_pictures"] == [2]
    assert any(label != IGNORED for label in cut["labels"])
    with pytest.raises(DataError, match="sample three: its pictures do not fit into 12 tokens"):
        EncodedSamples([three], processor, 12)[0]


def test_lists_of_images_are_read_and_miscounts_named(tmp_path: Path) -> None:
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")

    def entry(name: str, images: Any, *turns: str) -> dict[str, Any]:
        talk = []
        for turn in turns:
            talk += [{"from": "human", "value": turn}, {"from": "gpt", "value": "Yes."}]
        return {"id": name, "image": images, "conversations": talk}

    good = entry("good", ["red.png", "blue.png", "red.png"], "A <image> b <image>", "c\n<image>")
    bad = [
        entry("few", ["red.png", "blue.png"], "Only <image>"),
        entry("many", ["red.png"], "<image>", "<image>"),
        entry("gone", ["red.png", "none.png"], "<image><image>"),
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good]))
    (sample,) = read_llava(path, None).samples
    assert sample.turns == (("A <image> b <image>", "Yes."), ("<image>\nc", "Yes."))
    colours = [opener().getpixel((0, 0)) for opener in sample.images]
    assert colours == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    for one in bad:
        path.write_text(json.dumps([good, one]))
        with pytest.raises(DataError, match=rf"entry 1 \(id {one['id']}\)"):
            read_llava(path, None)
    path.write_text(json.dumps([good, *bad]))
    data = read_llava(path, None, skip_bad=True)
    assert [sample.id for sample in data.samples] == ["good"]
    assert [line.partition("(id ")[2].partition(")")[0] for line in data.skipped] == [
        "few",
        "many",
        "gone",
    ]
