"""Folders whose files ask for more memory or time than a model of theirs needs are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto import image_processing_auto, video_processing_auto

from tests.limited_process import run_limited
from vqguard.adapters import build_guard, guard_model, load_guarded, save_guard_only
from vqguard.adapters.proof.random_models.build import build_tiny
from vqguard.adapters.sizes.built import MAX_MODULES, built_within, numbers_held, opening
from vqguard.adapters.sizes.configured import MAX_LAYERS, require_sizes
from vqguard.adapters.sizes.pictures import MAX_BESIDE, open_processor, require_pictures
from vqguard.adapters.storage import lora_files
from vqguard.errors import ArtefactError
from vqguard.recipes.models import base_model
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.tiny.weights import load_base

OPEN = """
from pathlib import Path
from vqguard.adapters import load_guarded
from vqguard.adapters.sizes.pictures import open_processor
from vqguard.errors import VQGuardError
from vqguard.recipes.models import base_model
from dataclasses import replace
from vqguard.recipes.recipe import load_recipe
"""
TRY = """
for name in sorted(Path(sys.argv[1]).iterdir()):
    try:
        if name.name.startswith("base"):
            base_model(replace(load_recipe("llava-tiny"), model=str(name)))
        else:
            load_guarded(name, allow_changed=("config.json",), base=None)
        print(name.name, "opened")
    except VQGuardError as error:
        print(name.name, "refused", error)
"""
HUGE: dict[str, tuple[str, int | float]] = {
    "hidden": ("text_config.hidden_size", 10**7),
    "layers": ("text_config.num_hidden_layers", 10**6),
    "fewer-layers": ("text_config.num_hidden_layers", 1000),
    "layers-as-text": ("text_config.num_hidden_layers", 1e9),
    "words": ("text_config.vocab_size", 10**9),
    "image": ("vision_config.image_size", 10**6),
    "depth": ("vision_config.num_hidden_layers", 10**12),
    "labels": ("num_labels", 10**9),
    "heads": ("text_config.num_attention_heads", 10**12),
    "patch": ("vision_config.patch_size", 0),
    "beams": ("num_beams", 10**6),
}


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    model: Any
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4), processor)
    return model, processor


@pytest.fixture(scope="module")
def exported(shipped: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    shipped[0].save_pretrained(folder, processor=shipped[1])
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    model, processor = load_base()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def change(path: Path, field: str, value: Any) -> None:
    """Set a dotted field of a JSON file; of a closed `config.json`, inside."""
    document = json.loads(path.read_text())
    place = document.get("base_config", document)
    *outer, last = field.split(".")
    for name in outer:
        place = place[name]
    place[last] = value
    path.write_text(json.dumps(document))


@pytest.mark.alone
def test_no_folder_takes_memory_for_sizes_that_its_weights_have_not(
    exported: Path, base: Path, tmp_path: Path
) -> None:
    for name, (field, value) in HUGE.items():
        for kind, folder in (("guarded", exported), ("base", base)):
            copy = shutil.copytree(folder, tmp_path / f"{kind}-{name}")
            change(copy / "config.json", field, value)
    shutil.copytree(exported, tmp_path / "guarded")
    printed = run_limited(OPEN, TRY, tmp_path, seconds=60, megabytes=600).splitlines()
    results = dict(line.split(" ", 2)[:2] for line in printed if line.startswith(("g", "b")))
    assert results.pop("guarded") == "opened"
    assert len(results) == 2 * len(HUGE)
    assert {name for name, result in results.items() if result != "refused"} == set()


def test_a_guard_alone_is_held_against_both_files(
    shipped: tuple[Any, Any], base: Path, tmp_path: Path
) -> None:
    save_guard_only(shipped[0], tmp_path / "alone", base)
    assert load_guarded(tmp_path / "alone", base=base) is not None
    change(tmp_path / "alone" / "config.json", "text_config.vocab_size", 10**8)
    with pytest.raises(ArtefactError, match="asks for more than"):
        load_guarded(tmp_path / "alone", base=base, allow_changed=("config.json",))


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "idefics3", "gemma3", "mllama"])
def test_an_honest_folder_stays_within_twice_what_it_holds(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vqguard.adapters.sizes.built.FREE", 2**14)  # of position tables
    build_tiny(kind).save_pretrained(tmp_path)
    with opening(tmp_path):
        transformers.AutoModelForImageTextToText.from_pretrained(tmp_path)


def test_modules_are_counted_in_the_thread_that_builds() -> None:
    with (
        pytest.raises(ArtefactError, match=f"{MAX_MODULES:,} modules"),
        built_within(None, "many"),
    ):
        torch.nn.ModuleList(torch.nn.Identity() for _ in range(MAX_MODULES + 1))
    with (
        pytest.raises(ArtefactError, match="hold 0"),
        built_within(0, "wide"),
        torch.device("meta"),
    ):
        torch.nn.Linear(2**14, 2**14)
    torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))  # nothing is counted any more


def test_sizes_of_real_models_are_accepted() -> None:
    config: dict[str, Any] = {
        "text_config": {"num_hidden_layers": 126, "rope_theta": 1e12, "vocab_size": 262_208},
        "vision_config": {"depths": [2, 2, 18, 2], "num_labels": 21_843},
        "max_position_embeddings": 10_485_760,
    }
    require_sizes(config, "config.json")
    config["vision_config"]["depths"] = [2, MAX_LAYERS + 1]
    with pytest.raises(ArtefactError, match=r"vision_config.depths is 1,025, at most 1,024"):
        require_sizes(config, "config.json")


# -- processors

PICTURES = {
    "size": {"shortest_edge": 10**6},
    "crop_size": {"height": 10**6, "width": 10**6},
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_processor_that_blows_pictures_up_is_refused(
    name: str, base: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(base, tmp_path / "evil")
    change(copy / "processor_config.json", f"image_processor.{name}", PICTURES[name])
    with pytest.raises(ArtefactError, match=f"{name}.* 1,000,000, at most 4,096"):
        open_processor(copy)
    with pytest.raises(ArtefactError, match=name):
        base_model(replace(load_recipe("llava-tiny"), model=str(copy)))


def test_pixels_tiles_and_tokens_are_bounded_together(base: Path) -> None:
    processor: Any = open_processor(base)
    processor.patch_size = 1
    processor.image_processor.size = {"shortest_edge": 4096}
    with pytest.raises(ArtefactError, match="16,777,216 tokens of a picture"):
        require_pictures(processor, base)
    processor.patch_size = 16
    processor.image_seq_length = 10**9
    with pytest.raises(ArtefactError, match="image_seq_length 1,000,000,000"):
        require_pictures(processor, base)
    tiles = transformers.GotOcr2ImageProcessor(size={"height": 4000, "width": 4000})
    with pytest.raises(ArtefactError, match="192,000,000 pixels"):
        require_pictures(tiles, base)
    counted = transformers.Qwen2VLImageProcessor(min_pixels=10**7, max_pixels=10**7)
    with pytest.raises(ArtefactError, match=r"shortest_edge 10,000,000, at most 1,048,576"):
        require_pictures(counted, base)
    require_pictures(transformers.Qwen2VLImageProcessor(max_pixels=16384 * 28 * 28), base)


def _classes() -> list[str]:
    names: set[str] = set()
    images: Any = image_processing_auto
    videos: Any = video_processing_auto
    tables = [images.IMAGE_PROCESSOR_MAPPING_NAMES, videos.VIDEO_PROCESSOR_MAPPING_NAMES]
    for mapped in (mapped for table in tables for mapped in table.values()):
        some = mapped.values() if isinstance(mapped, dict) else [mapped]
        names |= {name for name in some if isinstance(name, str)}
    return sorted(names - {"TimmWrapperImageProcessor"})  # not made without a model


def test_what_every_class_of_transformers_does_by_itself_is_accepted() -> None:
    made = 0
    for name in _classes():
        kind: Any = getattr(transformers, name, None)
        try:
            processor = kind()
        except (ImportError, TypeError):  # a package that is not here
            continue
        require_pictures(processor, name)
        made += 1
    assert made > 30


def test_a_tokenizer_without_end_is_refused(base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "evil")
    with (copy / "tokenizer.json").open("ab") as file:
        file.truncate(MAX_BESIDE + 1)
    with pytest.raises(ArtefactError, match=r"tokenizer.json is larger"):
        open_processor(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").symlink_to("/dev/zero")
    with pytest.raises(ArtefactError, match="not a regular file"):
        open_processor(copy)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_documents_of_others_are_read_within_bounds(
    name: str, text: str, base: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(base, tmp_path / "evil")
    (copy / name).write_text(text)
    with pytest.raises(ArtefactError, match=name):
        open_processor(copy)


# -- LoRA weights

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank": {"r": 10**9},
    "rank of one": {"rank_pattern": {"q_proj": 10**9}},
    "layers": {"layer_replication": [[0, 10**6]]},
    "for ever": {"target_modules": "(a+)+q"},
    "nearly": {"target_modules": ".*.*.*.*q"},
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_that_takes_all_is_refused(
    case: str, tmp_path: Path, make_llava: Callable[..., Any]
) -> None:
    from peft import LoraConfig, get_peft_model

    model = make_llava()
    wrapped: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    lora_files.save(wrapped, tmp_path)
    assert lora_files.merge(make_llava(), tmp_path) is not None
    assert numbers_held([tmp_path / "adapter_model.safetensors"]) > 0
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **ADAPTERS[case]}))
    with pytest.raises(ArtefactError, match=r"adapter_config.json"):
        lora_files.merge(make_llava(), tmp_path)
