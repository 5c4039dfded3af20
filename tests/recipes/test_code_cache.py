"""Codes on disk: the same stage 2 as from pixels, made once, and never those of something else."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import vqguard.recipes.data.picture_codes as picture_codes
import vqguard.recipes.image_batches as image_batches
from vqguard.adapters import build_guard, guard_model
from vqguard.adapters.proof.random_models import build_tiny
from vqguard.adapters.runtime.code_training import visual_codes
from vqguard.errors import ArtefactError, ChecksumError, ConfigError, FrozenTensorMovedError
from vqguard.recipes import retrofit as retrofit_module
from vqguard.recipes.data.code_cache import CodeCache
from vqguard.recipes.data.code_dtypes import code_dtype
from vqguard.recipes.data.encoding import (
    CODES,
    Collator,
    EncodedSamples,
    image_token_id,
    pad_id,
)
from vqguard.recipes.data.feature_cache import FeatureCache
from vqguard.recipes.data.picture_codes import NoCodesError, build_codes
from vqguard.recipes.data.samples import Sample
from vqguard.recipes.recipe import LoraRecipe, Stage2Recipe, load_recipe
from vqguard.recipes.run_folder import RunFolder
from vqguard.recipes.run_samples import RunSamples
from vqguard.recipes.tiny.model import TinySizes
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.recipes.training.stage2 import Stage2Trainer
from vqguard.recipes.training.vision_aside import VisionAside, vision_aside

MakeModel = Callable[..., tuple[Any, Any]]
FAMILIES = {"llava-next": "llava_next", "qwen3-vl": "qwen3_vl", "instructblip": "instructblip"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_codes, "SHARD_SAMPLES", 5)
    monkeypatch.setattr(image_batches, "IMAGES", 2)


def instructions(count: int = 12) -> list[Sample]:
    return list(TinyWorld(0).instructions(count))


def encoded(samples: list[Sample], processor: Any, **kept: Any) -> EncodedSamples:
    return EncodedSamples(samples, processor, 256, **kept)


def coloured(colour: str, size: tuple[int, int] = (48, 48)) -> Any:
    return lambda: Image.new("RGB", size, colour)


def pictured(kind: str) -> list[Sample]:
    """Rows of several pictures of several shapes, and of none, for a family's processor."""
    red, wide = coloured("red"), coloured("green", (64, 32))
    rows = [
        Sample("one", (red,), (("<image>\nWhat is this?", "A red field."),)),
        Sample("other", (wide,), (("<image>\nAre you sure?", "Yes."),)),
    ]
    if kind != "instructblip":
        rows += [
            Sample("two", (wide, red), (("Compare <image> with <image>", "Yes."),)),
            Sample("none", (), (("Are you sure?", "Yes."),)),
        ]
    return rows


def family(kind: str, processor: Any, **changed: Any) -> Any:
    """A guarded random model without dropout that takes the processor's ids."""
    ids = processor.tokenizer.convert_tokens_to_ids
    fields: dict[str, Any] = {"text_config__vocab_size": len(processor.tokenizer)}
    if kind == "qwen3-vl":
        fields |= {
            "image_token_id": image_token_id(processor),
            "video_token_id": ids("<|video_pad|>"),
            "vision_start_token_id": ids("<|vision_start|>"),
            "vision_end_token_id": ids("<|vision_end|>"),
        }
    else:
        fields["image_token_index"] = image_token_id(processor)
    if kind == "instructblip":
        fields |= {
            "qformer_config__vocab_size": len(processor.qformer_tokenizer),
            "qformer_config__hidden_dropout_prob": 0.0,
            "qformer_config__attention_probs_dropout_prob": 0.0,
            "text_config__dropout": 0.0,
        }
    model = build_tiny(FAMILIES[kind], **{**fields, **changed})
    return guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4))


def train(model: Any, data: EncodedSamples, recipe: Stage2Recipe, folder: Path) -> list[float]:
    """The losses of stage 2."""
    Stage2Trainer(model, recipe, data, folder, seed=0).run(resume=False)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(params=["llava-tiny", "llava-tiny encoder", *FAMILIES])
def made(
    request: pytest.FixtureRequest, small_guarded: MakeModel
) -> tuple[Callable[[], tuple[Any, Any]], list[Sample]]:
    """Makes a guarded model and its processor, the same each time; and samples."""
    if request.param.startswith("llava-tiny"):
        site = "encoder" if request.param.endswith("encoder") else "projected"
        return lambda: small_guarded(site=site), instructions()
    make = request.getfixturevalue("family_processor")

    def build() -> tuple[Any, Any]:
        processor = make(request.param)
        return family(request.param, processor), processor

    return build, pictured(request.param)


def test_stage_2_from_codes_is_stage_2_from_pixels(
    made: tuple[Callable[[], tuple[Any, Any]], list[Sample]],
    stage2_recipe: Stage2Recipe,
    tmp_path: Path,
) -> None:
    build, samples = made
    recipe = replace(stage2_recipe, batch=2, samples=len(samples), epochs=2)
    ends = []
    for way in ("pixels", "codes"):
        model, processor = build()
        model.train()  # as the stage before leaves it
        data = encoded(samples, processor)
        if way == "codes":
            data.codes = build_codes(tmp_path / "codes", model, encoded(samples, processor))
        ends.append((train(model, data, recipe, tmp_path / way), state(model)))
    (pixel_losses, by_pixels), (code_losses, by_codes) = ends
    assert pixel_losses == code_losses
    assert len(pixel_losses) == 2 * -(-len(samples) // 2)
    assert list(by_pixels) == list(by_codes)
    for name, tensor in by_pixels.items():
        assert torch.equal(tensor, by_codes[name]), name


def test_a_sample_is_encoded_as_with_its_pixels(
    made: tuple[Callable[[], tuple[Any, Any]], list[Sample]], tmp_path: Path
) -> None:
    build, samples = made
    model, processor = build()
    plain = encoded(samples, processor)
    kept = encoded(samples, processor, codes=build_codes(tmp_path, model, plain))
    for index, sample in enumerate(samples):
        one, other = plain[index], kept[index]
        assert (CODES in other) == bool(sample.images)
        assert not [name for name in other if name.startswith("pixel_")]
        for name, value in one.items():
            if name.startswith("pixel_"):
                continue
            same = torch.equal(other[name], value) if torch.is_tensor(value) else None
            assert other[name] == value if same is None else same, name


def test_kept_features_become_the_codes_of_their_pixels(
    small_guarded: MakeModel, tmp_path: Path
) -> None:
    model, processor = small_guarded()
    samples = instructions()
    features = FeatureCache.build(tmp_path / "features", model, processor, samples)
    model.model.vision_tower.forward = None  # must not run any more
    by_features = build_codes(tmp_path / "kept", model, encoded(samples, processor, cache=features))
    del model.model.vision_tower.forward
    by_pixels = build_codes(tmp_path / "pixels", model, encoded(samples, processor))
    for sample in samples:
        if sample.images:
            one, other = by_features[sample.id].codes, by_pixels[sample.id].codes
            assert torch.equal(one.tokens[0], other.tokens[0])
            assert torch.equal(one.semantic[0], other.semantic[0])


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (2, torch.uint8),
        (256, torch.uint8),
        (257, torch.uint16),
        (65536, torch.uint16),
        (65537, torch.int32),
    ],
)
def test_a_code_takes_the_bytes_that_it_needs(size: int, dtype: torch.dtype) -> None:
    assert code_dtype(size) == dtype
    assert torch.tensor([0, size - 1]).to(dtype).long().tolist() == [0, size - 1]


def test_many_codes_are_kept_in_two_bytes(small_guarded: MakeModel, tmp_path: Path) -> None:
    model, processor = small_guarded(patch_codes=300)
    samples = [sample for sample in instructions() if sample.images][:3]
    cache = build_codes(tmp_path, model, encoded(samples, processor))
    with safe_open(tmp_path / "codes-00000.safetensors", framework="pt") as shard:
        assert shard.get_tensor("tokens").dtype == torch.uint16
        assert shard.get_tensor("semantic").dtype == torch.uint8
        assert len(shard.get_tensor("tokens")) == 3 * 9
    again = CodeCache(tmp_path, cache.identity)  # type: ignore[arg-type]
    for sample in samples:
        assert torch.equal(again[sample.id].codes.tokens[0], cache[sample.id].codes.tokens[0])
    assert torch.equal(
        pickle.loads(pickle.dumps(cache))[samples[1].id].codes.tokens[0],
        cache[samples[1].id].codes.tokens[0],
    )


# -- whose codes they are


def encodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The samples that are encoded from here on."""
    real, names = picture_codes._Encoder.encode, list[str]()

    def counting(self: Any, batch: Any) -> Iterator[Any]:
        names.extend(sample.id for sample in batch)
        return real(self, batch)

    monkeypatch.setattr(picture_codes._Encoder, "encode", counting)
    return names


def test_a_broken_build_goes_on_where_it_was(
    small_guarded: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = small_guarded()
    samples = instructions(16)
    data = encoded(samples, processor)
    real, seen = picture_codes._Encoder.encode, list[int]()

    def failing(self: Any, batch: Any) -> Any:
        seen.append(len(batch))
        if sum(seen) > 7:
            raise KeyboardInterrupt
        return real(self, batch)

    monkeypatch.setattr(picture_codes._Encoder, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        build_codes(tmp_path, model, data)
    monkeypatch.undo()
    monkeypatch.setattr(picture_codes, "SHARD_SAMPLES", 5)
    half = CodeCache(tmp_path, picture_codes._identity(model, data))
    assert len(half) == 5
    assert not half.complete
    names = encodings(monkeypatch)
    cache = build_codes(tmp_path, model, data)
    assert len(names) == len(cache) - 5  # the first shard was whole
    assert cache.complete
    names.clear()
    assert build_codes(tmp_path, model, data).complete
    assert not names


def test_codes_of_something_else_are_made_again(
    small_guarded: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, processor = small_guarded()
    samples = [sample for sample in instructions() if sample.images]
    build_codes(tmp_path, model, encoded(samples, processor))
    names = encodings(monkeypatch)

    def made_again(why: str, of: list[Sample] = samples) -> None:
        names.clear()
        caplog.clear()
        with caplog.at_level(logging.INFO, logger=picture_codes.__name__):
            build_codes(tmp_path, model, encoded(of, processor))
        assert names == [sample.id for sample in of]
        assert why in caplog.text

    with torch.no_grad():
        model.vqguard.patch.codebook.weight[0, 0] += 1
    made_again("different: guard_sha256")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_1.weight[0, 0] += 1
    made_again("different: projector_sha256")
    with torch.no_grad():
        model.model.vision_tower.get_parameter("embeddings.class_embedding")[0] += 1
    made_again("different: encoder")
    processor.image_processor.image_mean = [0.4] * 3
    made_again("different: encoder")
    other = [replace(sample, images=samples[0].images) for sample in samples]
    made_again("of another picture", other)
    model.vqguard.patch.codebook.weight.data[0, 0] += 1
    identity = picture_codes._identity(model, encoded(other, processor))
    with pytest.raises(ConfigError, match="another guard"):
        CodeCache(tmp_path, identity)


def test_a_changed_shard_and_a_damaged_index_are_refused(
    small_guarded: MakeModel, tmp_path: Path
) -> None:
    model, processor = small_guarded()
    samples = [sample for sample in instructions() if sample.images]
    data = encoded(samples, processor)
    cache = build_codes(tmp_path, model, data)
    with pytest.raises(ArtefactError, match="no codes of sample 'none'"):
        cache["none"]
    shard = tmp_path / "codes-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ChecksumError, match=r"codes-00000.*--resume"):
        cache[samples[0].id]
    shard.unlink()
    with pytest.raises(ArtefactError, match="cannot be read"):
        cache[samples[0].id]
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ArtefactError, match="damaged"):
        build_codes(tmp_path, model, data)


# -- where there are no codes


class Jittered:
    """A processor whose images are augmented."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, **inputs: Any) -> Any:
        made = self.processor(**inputs)
        made["pixel_values"] += 0.1 * torch.randn(())
        return made


def test_what_no_code_could_hold_is_said(
    small_guarded: MakeModel, family_processor: Callable[[str], Any], tmp_path: Path
) -> None:
    model, processor = small_guarded()
    samples = [sample for sample in instructions() if sample.images]
    with pytest.raises(NoCodesError, match=r"other pixel_values each time \(augmentation\)"):
        build_codes(tmp_path / "1", model, encoded(samples, Jittered(processor)))
    twice = [samples[0], replace(samples[1], id=samples[0].id)]
    with pytest.raises(NoCodesError, match="two samples have the id"):
        build_codes(tmp_path / "2", model, encoded(twice, processor))
    reworded = replace(samples[0], rewordings=((("<image> what else ?", "a bus ."),),))
    with pytest.raises(NoCodesError, match="asks another question in another epoch"):
        build_codes(tmp_path / "3", model, encoded([reworded], processor))
    captions = tuple((question, "a bus .") for question, _ in samples[0].turns)
    recaptioned = replace(samples[0], rewordings=(captions,))
    build_codes(tmp_path / "4", model, encoded([recaptioned], processor))
    assert len(build_codes(tmp_path / "3", model, encoded(samples[:1] * 2, processor))) == 1
    blip = family_processor("instructblip")
    for number, share in enumerate(("hidden_dropout_prob", "attention_probs_dropout_prob")):
        dropping = family("instructblip", blip, **{f"qformer_config__{share}": 0.1})
        with pytest.raises(NoCodesError, match=r"drops features at random in training \(p 0\.1\)"):
            build_codes(tmp_path / f"4{number}", dropping, encoded(pictured("instructblip"), blip))


def test_a_family_that_sees_something_else_is_found_out(
    small_guarded: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = small_guarded()
    samples = [sample for sample in instructions() if sample.images]
    real = visual_codes

    def one_off(*arguments: Any, **inputs: Any) -> Any:
        codes = real(*arguments, **inputs)
        return replace(codes, tokens=[(unit + 1) % 32 for unit in codes.tokens])

    monkeypatch.setattr(picture_codes, "visual_codes", one_off)
    with pytest.raises(NoCodesError, match="sees something else of codes"):
        build_codes(tmp_path, model, encoded(samples, processor))


# -- the vision encoder set aside


def test_training_from_codes_holds_no_vision_encoder(
    small_guarded: MakeModel,
    stage2_recipe: Stage2Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, processor = small_guarded()
    samples = instructions()
    data = encoded(samples, processor)
    data.codes = build_codes(tmp_path / "codes", model, data)
    before = state(model)
    trainer = Stage2Trainer(model, stage2_recipe, data, tmp_path / "run", seed=0)
    losses, held = trainer.losses, list[int]()

    def looking(inner: Any, inputs: Any) -> Any:
        held.append(sum(p.numel() for p in model.model.vision_tower.parameters()))
        assert not [name for name in inputs if name.startswith("pixel")]
        return losses(inner, inputs)

    monkeypatch.setattr(trainer, "losses", looking)
    trainer.run(resume=False)
    assert held == [0] * 3
    after = state(model)
    assert list(after) == list(before)
    assert all(
        torch.equal(after[name], tensor) for name, tensor in before.items() if "vision" in name
    )
    assert not (tmp_path / "run" / "vision.safetensors").exists()


def test_an_error_puts_the_vision_encoder_back(small_guarded: MakeModel, tmp_path: Path) -> None:
    model, _ = small_guarded()
    before, inside = state(model), []

    def fail() -> None:
        with vision_aside(model, tmp_path / "vision"):
            inside.append(len(state(model)))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert inside[0] < len(before)
    after = state(model)
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_vision_encoder_that_changed_on_disk_is_refused(
    small_guarded: MakeModel, tmp_path: Path
) -> None:
    model, _ = small_guarded()
    file = tmp_path / "vision"
    aside = VisionAside(model, file)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(FrozenTensorMovedError, match="vision"):
        aside.put_back(model)


@pytest.mark.parametrize("bf16", [False, True])
def test_lora_and_bf16_train_from_codes(
    small_guarded: MakeModel, stage2_recipe: Stage2Recipe, tmp_path: Path, bf16: bool
) -> None:
    recipe = replace(
        stage2_recipe, bf16=bf16, micro_batch=2, lora=LoraRecipe(rank=2, alpha=4, dropout=0.0)
    )
    samples, ends = instructions(8), []
    for way in ("pixels", "codes"):
        model, processor = small_guarded()
        data = encoded(samples, processor)
        if way == "codes":
            data.codes = build_codes(tmp_path / "codes", model, encoded(samples, processor))
        ends.append((train(model, data, recipe, tmp_path / way), state(model)))
    (losses, by_pixels), (again, by_codes) = ends
    # In bfloat16 features are rounded, and near-ties may have another code.
    assert again == (pytest.approx(losses, rel=0.1) if bf16 else losses)
    for name, tensor in by_pixels.items():
        assert by_codes[name].dtype == tensor.dtype, name
        if not bf16 or "vision" in name:
            assert torch.equal(tensor, by_codes[name]), name


# -- in a retrofit


def steps_to_stage_2(run: Any) -> None:
    run.load_base()
    run.start()
    run.cache_features()
    run.train_stage1()
    run.encode_pictures()
    run.train_stage2()


SHORT = (
    "guard.start_samples=60 guard.patch_codes=32 guard.semantic_codes=8 guard.kmeans_iterations=2 "
    "stage1.samples=16 stage1.batch=8 stage2.samples=16 stage2.batch=8"
).split()


def retrofit_run(folder: Path, *settings: str) -> Any:
    recipe = load_recipe("llava-tiny").override([*SHORT, *settings])
    folder.mkdir()
    run = retrofit_module._Run(
        recipe, RunFolder(folder), RunSamples(recipe, skip_bad=False), resume=False
    )
    run._check_codebooks = lambda: None  # type: ignore[method-assign]
    steps_to_stage_2(run)
    return run


@pytest.mark.slow
def test_a_retrofit_takes_codes_by_itself_and_ends_with_the_same_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {
        way: retrofit_run(tmp_path / way, f"stage2.from_codes={way}") for way in ("auto", "false")
    }
    assert (tmp_path / "auto" / "codes" / "index.json").exists()
    assert not (tmp_path / "false" / "codes").exists()
    assert "codes" in runs["auto"].folder.seconds
    one, other = (state(run.model) for run in runs.values())
    assert list(one) == list(other)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    runs["auto"].finish()
    assert not (tmp_path / "auto" / "codes").exists()

    def none(*_: Any) -> CodeCache:
        raise NoCodesError("they are augmented")

    monkeypatch.setattr(retrofit_module, "shared_codes", none)
    retrofit_run(tmp_path / "without")
    assert "stage 2 does not train from codes: they are augmented" in caplog.text
    with pytest.raises(ConfigError, match=r"from_codes=true: they are augmented.*auto or false"):
        retrofit_run(tmp_path / "refused", "stage2.from_codes=true")


SCRIPT = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    import torch
    import vqguard.recipes.data.picture_codes as picture_codes
    from vqguard.adapters import build_guard, guard_model
    from vqguard.recipes.data.encoding import EncodedSamples
    from vqguard.recipes.tiny.model import *
    from vqguard.recipes.tiny.world import TinyWorld

    torch.set_num_threads(1)
    picture_codes.SHARD_SAMPLES = 3
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    sizes = TinySizes.from_json(sys.argv[1])
    model, processor = build_model(sizes, tokenizer), build_processor(sizes, tokenizer)
    guard_model(model, build_guard(model, patch_codes=32, semantic_codes=8), processor)
    if sys.argv[3] == "slowly":
        inner = picture_codes._Encoder.encode
        def slow(*arguments):
            time.sleep(0.3)
            return inner(*arguments)
        picture_codes._Encoder.encode = slow
    data = EncodedSamples(TinyWorld(0).instructions(24), processor, 256)
    picture_codes.build_codes(Path(sys.argv[2]), model, data)
    """
)


@pytest.mark.alone
@pytest.mark.slow
def test_a_killed_build_ends_as_one_that_was_not(small_sizes: TinySizes, tmp_path: Path) -> None:
    small_sizes.to_json(tmp_path / "sizes.json")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def start(folder: str, how: str) -> subprocess.Popen[bytes]:
        paths = [str(tmp_path / "sizes.json"), str(tmp_path / folder)]
        command = [sys.executable, "-c", SCRIPT, *paths, how]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    whole = start("whole", "quickly")
    victim = start("killed", "slowly")
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed" / "index.json").exists() and time.monotonic() < deadline:
        assert victim.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert json.loads((tmp_path / "killed" / "index.json").read_text())["complete"] is False
    assert start("killed", "quickly").wait(300) == 0
    assert whole.wait(300) == 0
    indices = [
        json.loads((tmp_path / name / "index.json").read_text()) for name in ("whole", "killed")
    ]
    assert indices[0] == indices[1]
    assert indices[0]["complete"] is True


def test_codes_of_several_samples_are_one_batch(small_guarded: MakeModel, tmp_path: Path) -> None:
    model, processor = small_guarded()
    samples = instructions()
    data = encoded(samples, processor)
    data.codes = build_codes(tmp_path, model, data)
    collate = Collator(pad_id(processor))
    batch = collate([data[i] for i in range(len(samples))])
    assert len(batch[CODES].tokens) == sum(len(sample.images) for sample in samples)
    texts = [i for i, sample in enumerate(samples) if not sample.images]
    assert CODES not in collate([data[i] for i in texts])
