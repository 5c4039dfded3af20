"""Videos as data: from the file to both stages and to an answer, on the families that take them."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vqguard.adapters import build_guard, guard_model, visual_features
from vqguard.adapters.proof.random_models import build_tiny
from vqguard.cli.main import main
from vqguard.errors import ConfigError, DataError
from vqguard.recipes.data.encoding import CAPTION, IGNORED, Collator, EncodedSamples, pad_id
from vqguard.recipes.data.feature_cache import FeatureCache
from vqguard.recipes.data.fitting import Fitting
from vqguard.recipes.data.llava_json import read_llava
from vqguard.recipes.data.media.named import NamedClip
from vqguard.recipes.data.mixture import read_data
from vqguard.recipes.data.picture_codes import NoCodesError, build_codes
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.data.webdataset import VIDEO_PROMPT, read_shards
from vqguard.recipes.recipe import Stage1Recipe, Stage2Recipe, load_recipe
from vqguard.recipes.run import LoadedRun, open_run
from vqguard.recipes.training.stage1 import Stage1Trainer, of_turns
from vqguard.recipes.training.stage2 import Stage2Trainer
from vqguard.safety_map import SafetyMap
from vqguard.videos import Clip

WriteVideo = Callable[..., Path]
MakeProcessor = Callable[[str], Any]
FAMILIES = {
    "qwen2-vl": "qwen2_vl",
    "qwen2.5-vl": "qwen2_5_vl",
    "qwen3-vl": "qwen3_vl",
    "llava-onevision": "llava_onevision",
}
ANSWER = {"from": "gpt", "value": "A grey field."}


def asked(text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": text}, ANSWER]


@pytest.fixture
def folder(write_video: WriteVideo, tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4")
    write_video(tmp_path / "b.webm", codec="libvpx", step=9)
    Image.new("RGB", (48, 48), "red").save(tmp_path / "a.png")
    return tmp_path


def read(folder: Path, *entries: dict[str, Any]) -> list[Sample]:
    """The samples as they are checked, with what was seen of their videos."""
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    samples: list[Sample] = []
    data = read_llava(path, None, frames=4, check=samples.append)
    assert list(data.samples) == samples
    return samples


@pytest.mark.parametrize(
    ("entry", "question"),
    [
        ({"video": "a.mp4", "conversations": asked("<video>\nWhat?")}, "<video>\nWhat?"),
        ({"video": "a.mp4", "conversations": asked("What? <video>")}, "<video>\nWhat?"),
        # as LLaVA-NeXT's video data are written
        ({"video": "a.mp4", "conversations": asked("<image>\nWhat?")}, "<video>\nWhat?"),
        ({"videos": ["a.mp4"], "conversations": asked("<video>What?")}, "<video>\nWhat?"),
        (
            {
                "videos": ["a.mp4"],
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "video"}, {"type": "text", "text": "What?"}],
                    },
                    {"role": "assistant", "content": "A grey field."},
                ],
            },
            "<video>\nWhat?",
        ),
        (
            {
                "videos": ["a.mp4", "b.webm"],
                "image": "a.png",
                "conversations": asked("<video> and <video> and <image>?"),
            },
            "<video> and <video> and <image>?",
        ),
    ],
)
def test_records_with_videos(entry: dict[str, Any], question: str, folder: Path) -> None:
    (sample,) = read(folder, entry)
    assert sample.turns == ((question, "A grey field."),)
    assert len(sample.videos) == question.count("<video>")
    assert sample.clip_sizes[0] == (4, 64, 48, False)
    clip = sample.videos[0]()
    assert clip.frames.shape == (4, 48, 64, 3)
    assert clip.seconds == pytest.approx((0, 1, 1.75, 2.75))


def test_without_a_video_its_mark_is_text(folder: Path) -> None:
    """Conversations about web pages spell it."""
    (sample,) = read(folder, {"video": "", "conversations": asked("What does <video> do?")})
    assert sample.turns[0][0] == "What does <video> do?"
    assert sample.videos == ()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"video": "a.mp4", "conversations": asked("What?")}, "found 0 for 1"),
        ({"video": "a.mp4", "conversations": asked("<video> <video>")}, "found 2 for 1"),
        ({"video": "none.mp4", "conversations": asked("<video>")}, "is missing"),
        ({"video": "a.png", "conversations": asked("<video>")}, "cannot be read as MP4"),
        ({"video": "../a.mp4", "conversations": asked("<video>")}, "leaves the image root"),
        ({"video": 7, "conversations": asked("<video>")}, "must be a path"),
        ({"video": "a.mp4", "videos": ["a.mp4"], "conversations": asked("<video>")}, "'videos'"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "video"}]},
                    {"role": "assistant", "content": "No."},
                ]
            },
            "names no 'video'",
        ),
        (
            {
                "video": "a.mp4",
                "conversations": [asked("<video>")[0], {"from": "gpt", "value": "<video>"}],
            },
            "found 1 for 1|in an answer",
        ),
    ],
)
def test_records_that_do_not_fit_are_refused_and_listed(
    entry: dict[str, Any], message: str, folder: Path
) -> None:
    good = {"id": "good", "video": "a.mp4", "conversations": asked("<video>")}
    with pytest.raises(DataError, match=rf"entry 1 \(id bad\).*({message})"):
        read(folder, good, {"id": "bad", **entry})
    data = read_llava(folder / "data.json", None, skip_bad=True)
    assert ([sample.id for sample in data.samples], len(data.skipped)) == (["good"], 1)


def test_a_body_that_cannot_be_decoded_is_found_by_skip_bad(folder: Path) -> None:
    raw = bytearray((folder / "a.mp4").read_bytes())
    start = raw.index(b"mdat") + 4
    raw[start : start + 600] = bytes(600)
    (folder / "a.mp4").write_bytes(bytes(raw))
    bad = {"id": "bad", "video": "a.mp4", "conversations": asked("<video>")}
    good = {"id": "good", "video": "b.webm", "conversations": asked("<video>")}
    (folder / "data.json").write_text(json.dumps([bad, good]))
    data = read_llava(folder / "data.json", None, skip_bad=True)
    assert [sample.id for sample in data.samples] == ["good"]
    assert "id bad" in data.skipped[0]


def test_sound_is_counted_as_not_read(
    write_video: WriteVideo, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_video(tmp_path / "a.mp4", sound=True)
    with caplog.at_level(logging.INFO):
        read(tmp_path, {"video": "a.mp4", "conversations": asked("<video>")})
    assert "sound of videos (1)" in caplog.text


def test_shards_of_videos(folder: Path) -> None:
    conversation = json.dumps({"conversations": asked("<video>\nWhat?")}).encode()
    members = {
        "x.mp4": (folder / "a.mp4").read_bytes(),
        "x.json": conversation,
        "y.webm": (folder / "b.webm").read_bytes(),
        "y.txt": b"A grey field.",
        "y.json": b'{"key": "y", "duration": 3}',
    }
    with tarfile.open(folder / "0.tar", "w") as archive:
        for name, raw in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    first, second = read_shards(folder / "0.tar", frames=4).samples
    assert first.turns == (("<video>\nWhat?", "A grey field."),)
    assert second.turns == ((f"<video>\n{VIDEO_PROMPT}", "A grey field."),)
    for sample in (first, second):
        assert sample.videos[0]().frames.shape == (4, 48, 64, 3)


def test_data_of_videos_alone_are_enough(folder: Path) -> None:
    (folder / "data.json").write_text(
        json.dumps([{"video": "a.mp4", "conversations": asked("<video>")}])
    )
    data = read_data(folder / "data.json", None, frames=3)
    (sample,) = data.captions(9)
    assert sample.videos[0]().frames.shape[0] == 3
    assert sample.caption_videos == (1,)


# -- what a model is given


def base(kind: str, processor: Any) -> Any:
    """A random model that takes the processor's ids."""
    ids = processor.tokenizer.convert_tokens_to_ids
    fields: dict[str, Any] = {"text_config__vocab_size": len(processor.tokenizer)}
    if kind == "llava-onevision":
        fields |= {"image_token_index": ids("<image>"), "video_token_index": ids("<video>")}
        fields |= {"image_token_id": ids("<image>"), "video_token_id": ids("<video>")}
    else:
        fields |= {
            "image_token_id": ids("<|image_pad|>"),
            "video_token_id": ids("<|video_pad|>"),
            "vision_start_token_id": ids("<|vision_start|>"),
            "vision_end_token_id": ids("<|vision_end|>"),
        }
    return build_tiny(FAMILIES[kind], **fields)


def family(kind: str, processor: Any) -> Any:
    """The same, guarded."""
    model = base(kind, processor)
    return guard_model(
        model, build_guard(model, patch_codes=8, semantic_codes=4, refusal_text="No"), processor
    )


def noise(seed: int) -> Callable[[], Clip]:
    def open_clip() -> Clip:
        frames = np.random.default_rng(seed).integers(0, 256, (4, 48, 48, 3), dtype=np.uint8)
        return Clip(frames, (0.0, 0.5, 1.0, 1.5), 2.0)

    return open_clip


def red() -> Any:
    return Image.new("RGB", (48, 48), "red")


def samples() -> list[Sample]:
    """Rows of a video, a picture and a video, no and two of each kind over two turns."""
    answer = "A red field."
    return [
        Sample("v", (), (("<video>\nWhat is this?", answer),), videos=(noise(0),)),
        Sample("iv", (red,), (("<image> and <video> ?", answer),), videos=(noise(1),)),
        Sample("t", (), (("Are you sure?", "Yes."),)),
        Sample(
            "vi",
            (red,),
            (("<video>\nWhat is this?", answer), ("<image>\nAre you sure?", "Yes.")),
            videos=(noise(2),),
        ),
    ]


@pytest.fixture(params=FAMILIES)
def guarded(request: pytest.FixtureRequest, family_processor: MakeProcessor) -> tuple[Any, Any]:
    processor = family_processor(request.param)
    return family(request.param, processor), processor


def test_the_tokens_are_those_of_the_processor(guarded: tuple[Any, Any]) -> None:
    """Answers alone carry labels, and the times that a processor writes do not."""
    _, processor = guarded
    data = EncodedSamples(samples(), processor, 512)
    for item, sample in zip((data[n] for n in range(4)), samples(), strict=True):
        text, _ = data.template.conversation(sample)
        assert len(item["input_ids"]) > len(processor.tokenizer(text)["input_ids"]) or not (
            sample.videos
        )
        said = processor.tokenizer.decode([token for token in item["labels"] if token != IGNORED])
        for _, answer in sample.turns:
            assert answer in said
        assert len(said) < 4 + sum(len(answer) + len("<|im_end|>") for _, answer in sample.turns)


def test_a_batch_is_its_rows_and_every_frame_counts(guarded: tuple[Any, Any]) -> None:
    model, processor = guarded
    data = EncodedSamples(samples(), processor, 512)
    collate = Collator(pad_id(processor))
    batch = collate([data[n] for n in range(4)])
    features = visual_features(model, **batch)
    assert len(features.tokens) == 5  # two pictures and three videos
    codebook = model.vqguard.patch.codebook
    chosen = torch.cat(list(features.tokens))
    with torch.no_grad():
        codebook.weight.copy_(chosen[torch.linspace(0, len(chosen) - 1, codebook.codes).long()])
    captions = [batch.pop(name) for name in CAPTION]
    assert (captions[2].tolist(), captions[3].tolist()) == ([0, 1, 0, 1], [1, 1, 1, 0])
    with torch.no_grad():
        together = model(**batch).logits
        for row in range(4):
            alone = {k: v for k, v in collate([data[row]]).items() if k not in CAPTION}
            logits = model(**alone).logits[0]
            assert torch.allclose(logits, together[row, : len(logits)], atol=1e-4)


def test_both_stages_train_on_videos(
    guarded: tuple[Any, Any],
    stage1_recipe: Stage1Recipe,
    stage2_recipe: Stage2Recipe,
    tmp_path: Path,
) -> None:
    model, processor = guarded
    shown = [sample for sample in samples() if sample.images or sample.videos]
    first = replace(stage1_recipe, batch=3, samples=3, max_length=512, epochs=2)
    data = EncodedSamples(shown, processor, 512)
    Stage1Trainer(model, first, data, tmp_path / "1", seed=0).run(resume=False)
    second = replace(stage2_recipe, batch=4, samples=4, max_length=512)
    data = EncodedSamples(samples(), processor, 512)
    Stage2Trainer(model, second, data, tmp_path / "2", seed=0).run(resume=False)
    for stage in ("1", "2"):
        lines = (tmp_path / stage / "metrics.jsonl").read_text().splitlines()
        assert lines
        assert all(np.isfinite(json.loads(line)["loss"]) for line in lines)


def test_one_flagged_frame_refuses_a_question(
    guarded: tuple[Any, Any], write_video: WriteVideo, tmp_path: Path
) -> None:
    """Whichever part of the video it is in."""
    model, processor = guarded
    run = LoadedRun(model, processor, video_frames=4)
    clip = run.open_video(write_video(tmp_path / "a.mp4"))
    dark, bright = (replace(clip, frames=np.full_like(clip.frames, value)) for value in (5, 250))
    features = []
    for shown in (dark, bright):
        sample = Sample("s", (), (("<video>\nWhat?", "Yes."),), videos=(partial(replace, shown),))
        batch = Collator(pad_id(processor))([EncodedSamples([sample], processor, 512)[0]])
        features.append(torch.cat(visual_features(model, **batch).semantic_units).float())
    guard = model.vqguard
    with torch.no_grad():
        guard.semantic.codebook.weight[:] = 1e3
        guard.semantic.codebook.weight[0] = features[0].mean(0)
        guard.semantic.codebook.weight[1] = features[1].mean(0)
    counts = torch.tensor([[0, 9], [9, 0], [0, 9], [0, 9]])
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))
    assert not run.ask(dark, "What is this?", 4).verdict.flagged
    assert run.ask(bright, "What is this?", 4).verdict.flagged
    for part in (slice(0, 2), slice(2, 4)):  # Qwen judges two frames at a time
        mixed = dark.frames.copy()
        mixed[part] = 250
        answer = run.ask(replace(dark, frames=mixed), "What is this?", 4)
        assert answer.verdict.flagged
        assert answer.text.strip() == "No"


def test_a_question_shows_the_frames_that_training_does(
    guarded: tuple[Any, Any], write_video: WriteVideo, tmp_path: Path
) -> None:
    model, processor = guarded
    path = write_video(tmp_path / "a.mp4")
    (sample,) = read(tmp_path, {"video": "a.mp4", "conversations": asked("<video>\nWhat?")})
    trained = EncodedSamples([sample], processor, 512)[0]
    seen: list[dict[str, Any]] = []

    def keep(**inputs: Any) -> Any:
        seen.append(inputs)
        raise StopIteration

    model.generate = keep
    run = LoadedRun(model, processor, video_frames=4)
    clip = run.open_video(path)
    with pytest.raises(StopIteration):
        run.ask(clip, "What?")
    assert torch.equal(seen[0]["pixel_values_videos"], trained["pixel_values_videos"])
    prompt = seen[0]["input_ids"][0].tolist()
    same = [a == b for a, b in zip(prompt, trained["input_ids"], strict=False)]
    assert all(same[: len(prompt) - 2])


def test_the_check_says_what_encoding_does(guarded: tuple[Any, Any], folder: Path) -> None:
    _, processor = guarded
    entries: list[dict[str, Any]] = [
        {"video": "a.mp4", "conversations": asked("<video>\nWhat?")},
        {"video": "a.mp4", "image": "a.png", "conversations": asked("<image> <video> ?")},
        {"conversations": asked("What?")},
    ]
    shown = read(folder, *entries)
    for length in (24, 40, 60, 90, 140):
        checks = (Fitting(processor, length, length), EncodedSamples([], processor, length).example)
        for sample in shown:
            problems = []
            for check in checks:
                try:
                    check(sample)
                    problems.append("")
                except DataError as error:
                    problems.append(str(error))
            assert problems[0] == problems[1]
    assert not problems[0]


def test_no_video_is_decoded_where_bounds_decide(
    guarded: tuple[Any, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, processor = guarded
    (sample,) = read(folder, {"video": "a.mp4", "conversations": asked("<video>\nWhat?")})

    def never(self: NamedClip) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(NamedClip, "__call__", never)
    Fitting(processor, 2048, 2048)(sample)


@pytest.mark.parametrize("kind", ["llava-1.5", "llava-next", "instructblip"])
def test_other_families_refuse_videos_by_name(kind: str, family_processor: MakeProcessor) -> None:
    processor = family_processor(kind)
    sample = samples()[0]
    for check in (Fitting(processor, 512, 512), EncodedSamples([], processor, 512).example):
        with pytest.raises(DataError, match=rf"{type(processor).__name__} takes none.*qwen3-vl"):
            check(sample)


def test_neither_codes_nor_features_are_kept_of_videos(
    family_processor: MakeProcessor, tmp_path: Path
) -> None:
    processor = family_processor("qwen2-vl")
    model = family("qwen2-vl", processor)
    data = EncodedSamples(samples(), processor, 512)
    with pytest.raises(NoCodesError, match="videos"):
        build_codes(tmp_path / "codes", model, data)
    with pytest.raises(ConfigError, match=r"features\.cache=false"):
        FeatureCache.build(tmp_path / "features", model, processor, samples())


def test_a_turn_s_videos_are_drawn_to_its_answer() -> None:
    """Videos follow the pictures of a batch."""
    codewords = torch.randn(5, 8)
    turns = of_turns(codewords, torch.tensor([1, 0, 1]), torch.tensor([1, 2, 0]))
    assert torch.allclose(turns[0], (codewords[0] + codewords[2]) / 2)
    assert torch.allclose(turns[1], codewords[3:5].mean(0))
    assert torch.equal(turns[2], codewords[1])


@pytest.mark.slow
def test_a_run_on_videos_from_its_data_to_an_answer(
    family_processor: MakeProcessor,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    processor = family_processor("qwen2-vl")
    model = base("qwen2-vl", processor)
    for part in (model, processor):
        part.save_pretrained(folder / "base")
    shown: list[dict[str, Any]] = [
        {"video": "a.mp4", "conversations": asked("<video>\nWhat is this?")},
        {"video": "b.webm", "conversations": asked("<image>\nAre you sure?")},
        {"image": "a.png", "conversations": asked("<image>\nWhat is this?")},
        {"conversations": asked("Which of the two is larger?")},
    ]
    entries = [{"id": str(number), **shown[number % 4]} for number in range(24)]
    (folder / "data.json").write_text(json.dumps([*entries, {**shown[0], "video": "base"}]))
    for number, category in enumerate(("neutral", "gun")):
        for place in range(3):
            (folder / "toxic" / category).mkdir(parents=True, exist_ok=True)
            colour = (200 * number, 20 * place, 90)
            Image.new("RGB", (48, 48), colour).save(folder / "toxic" / category / f"{place}.png")
    settings = {
        "model": folder / "base",
        "video_frames": 4,
        "guard.patch_codes": 8,
        "guard.semantic_codes": 4,
        "guard.judge": "global",
        "stage2.lora": "null",
        "evaluation.utility": 2,
        "evaluation.finetuned_control": "false",
        "evaluation.latency_rounds": 1,
        "calibration_images": folder / "toxic",
    }
    for stage in ("stage1", "stage2"):
        settings |= {
            f"{stage}.samples": 16,
            f"{stage}.batch": 8,
            f"{stage}.micro_batch": 4,
            f"{stage}.max_length": 512,
            f"{stage}.bf16": "false",
            f"{stage}.gradient_checkpointing": "false",
        }
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run = folder / "run"
    config = ["--config", str(folder / "recipe.yaml")]
    load_recipe("qwen2-vl").to_yaml(folder / "recipe.yaml")
    data = ["--data", str(folder / "data.json"), "--output", str(run), "--skip-bad"]
    assert main(["retrofit", *config, *data, *changes]) == 0
    assert "entry 24" in (run / "skipped.txt").read_text()
    capsys.readouterr()
    assert main(["ask", str(run), str(folder / "a.mp4"), "What is this?", "--video"]) == 0
    assert open_run(run).video_frames == 4
