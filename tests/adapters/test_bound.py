"""What a verdict depends on is bound by checksums; files of others are left alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from vqguard.adapters import build_guard, guard_model, load_guarded, save_guard_only
from vqguard.adapters.storage import reading
from vqguard.adapters.storage.bound_files import PROCESSOR_FILES
from vqguard.adapters.storage.rewriting import rewrite
from vqguard.errors import ArtefactError, ChecksumError, ConfigError
from vqguard.recipes.tiny.weights import load_base

Make = Callable[..., Any]
GOLDEN = Path(__file__).parent / "golden"
PROJECTOR = "model.multi_modal_projector.linear_1.bias"


def guarded_tiny() -> tuple[Any, Any]:
    model: Any
    model, processor = load_base()
    guard = build_guard(model, patch_codes=16, semantic_codes=4)
    return guard_model(model, guard, processor), processor


@pytest.fixture(params=["whole", "sharded", "alone"])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model, processor = guarded_tiny()
    folder = tmp_path / str(request.param)
    if request.param == "alone":
        save_guard_only(model, folder, "llava-tiny", processor=processor)
    else:
        size = "5GB" if request.param == "whole" else "500KB"
        model.save_pretrained(folder, processor=processor, max_shard_size=size)
    return folder


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_it_loads_without_a_warning(saved: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_guarded(saved)


def test_every_file_but_how_answers_are_sampled_is_bound(saved: Path) -> None:
    """One byte more at the end of any file, or the file gone, one at a time."""
    files = [path for path in saved.rglob("*") if path.is_file()]
    assert len(files) >= 8
    for path in files:
        before = path.read_bytes()
        refused = path.name != "generation_config.json"
        if path.name != "vqguard.json":
            path.write_bytes(before + b" ")
            loads(saved, refused)
        path.unlink()
        loads(saved, refused)
        path.write_bytes(before)
    load_guarded(saved)


def loads(folder: Path, refused: bool) -> None:
    if refused:
        with pytest.raises(ArtefactError):
            load_guarded(folder)
    else:
        load_guarded(folder)


@pytest.mark.parametrize("part", ["vision_tower", "multi_modal_projector", "language_model"])
def test_another_tower_or_language_model_is_refused(part: str, tmp_path: Path) -> None:
    model, _ = guarded_tiny()
    model.save_pretrained(tmp_path)
    path = tmp_path / "guarded.safetensors"
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if part in key)
    tensors[key].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ChecksumError, match="the weights"):
        load_guarded(tmp_path)
    changed = load_guarded(tmp_path, allow_changed=("weights",)).state_dict()
    differ = [k for k, tensor in model.state_dict().items() if not torch.equal(changed[k], tensor)]
    assert differ
    assert all(part in name or part == "language_model" for name in differ)


def test_an_edited_vision_config_is_refused(saved: Path) -> None:
    path = saved / "config.json"
    edit(path, lambda c: c["base_config"].update(vision_feature_layer=-2))
    with pytest.raises(ChecksumError, match=r"config\.json"):
        load_guarded(saved)
    again = load_guarded(saved, allow_changed=("config.json",))
    assert again.config.vision_feature_layer == -2


def test_an_edited_or_added_processor_config_is_refused(saved: Path) -> None:
    path = saved / "processor_config.json"
    edit(path, lambda c: c["image_processor"].update(do_normalize=False))
    with pytest.raises(ChecksumError, match=r"processor_config\.json"):
        load_guarded(saved)
    load_guarded(saved, allow_changed=("processor_config.json",))
    for name in PROCESSOR_FILES[1:]:
        (saved / name).write_text("{}")
        with pytest.raises(ChecksumError, match=name):
            load_guarded(saved, allow_changed=("processor_config.json",))
        (saved / name).unlink()


def test_a_processor_written_afterwards_is_told_of(tmp_path: Path) -> None:
    model, processor = guarded_tiny()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="bound by no checksum"):
        load_guarded(tmp_path)
    model.save_pretrained(tmp_path, processor=processor)  # the same files
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_guarded(tmp_path)


@pytest.mark.parametrize("name", ["merged-1", "guard-only-2"])
def test_old_folders_load_with_a_warning_and_are_written_anew(name: str, tmp_path: Path) -> None:
    base = None if name.startswith("merged") else GOLDEN / "base"
    with pytest.warns(UserWarning, match="vqguard export"):
        old = load_guarded(GOLDEN / name, base=base)
    rewrite(GOLDEN / name, tmp_path / "new")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        new = load_guarded(tmp_path / "new", base=base)
    expected = old.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in new.state_dict().items())
    assert new.vqguard.safety_map.to_dict() == old.vqguard.safety_map.to_dict()
    assert not list((tmp_path / "new").glob("model*"))
    spoiled = tmp_path / "spoiled"
    shutil.copytree(GOLDEN / name, spoiled)
    edit(spoiled / "guard" / "guard.json", lambda c: c.update(schema=1, more=0))
    with pytest.raises(ChecksumError):
        rewrite(spoiled, tmp_path / "other")
    assert not (tmp_path / "other").exists()


# What somebody else may have in a folder, under a name that a save would use.
FOREIGN = {
    "config.json": "config.json",
    "weights": "model.safetensors",
    "pickled weights": "pytorch_model.bin",
    "an adapter": "lora/adapter_config.json",
    "a guard": "guard/guard.json",
    "the processor": "processor_config.json",
    "sampling": "generation_config.json",
}
SAVERS: dict[str, Callable[[Any, Any, Path], None]] = {
    "whole": lambda m, p, f: m.save_pretrained(f, processor=p),
    "alone": lambda m, p, f: save_guard_only(m, f, "llava-tiny", processor=p),
}


def with_lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("how", SAVERS)
def test_files_of_others_are_left_alone(what: str, how: str, tmp_path: Path) -> None:
    if what == "an adapter" and how == "whole":
        pytest.skip("a whole model writes none")
    model, processor = guarded_tiny()
    model = with_lora(model) if what == "an adapter" else model
    path = tmp_path / FOREIGN[what]
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ArtefactError, match="no guarded model wrote"):
        SAVERS[how](model, processor, tmp_path)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]
    assert path.read_text() == "mine"


@pytest.mark.parametrize("how", SAVERS)
def test_a_save_replaces_its_own_files_and_no_others(how: str, tmp_path: Path) -> None:
    model, processor = guarded_tiny()
    (tmp_path / "lora").mkdir()
    for name in ("notes.txt", "lora/mine.txt"):
        (tmp_path / name).write_text("mine")
    if how == "whole":
        model.save_pretrained(tmp_path, processor=processor, max_shard_size="500KB")
        assert len(list(tmp_path.glob("guarded-*.safetensors"))) > 1
    else:
        (tmp_path / "lora" / "mine.txt").unlink()
        (tmp_path / "lora").rmdir()
        save_guard_only(with_lora(model), tmp_path, "llava-tiny", processor=processor)
        model, processor = guarded_tiny()
    SAVERS[how](model, processor, tmp_path)
    assert not list(tmp_path.glob("guarded-*.safetensors"))
    assert not (tmp_path / "guard" / "weights.safetensors.index.json").exists()
    assert not (tmp_path / "lora" / "adapter_model.safetensors").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    if how == "whole":
        assert (tmp_path / "lora" / "mine.txt").read_text() == "mine"
    load_guarded(tmp_path)
    other = next(name for name in SAVERS if name != how)
    with pytest.raises(ArtefactError, match="another model"):
        SAVERS[other](model, processor, tmp_path)
    load_guarded(tmp_path)


@pytest.mark.parametrize(
    "given",
    [
        {"subfolder": "other"},
        {"variant": "fp16"},
        {"key_mapping": {"^a": "b"}},
        {"state_dict": {"x": torch.zeros(1)}},
        {"config": {"model_type": "llava"}},
        {"gguf_file": "x.gguf"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_nothing_is_loaded_beside_what_was_checked(
    make_guarded: Make, tmp_path: Path, given: dict[str, Any]
) -> None:
    """A folder in the folder, for one, whose weights have no checksum."""
    make_guarded().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"{next(iter(given))} would load other weights"):
        load_guarded(tmp_path, **given)
    nothing: dict[str, Any] = dict.fromkeys(given)
    load_guarded(tmp_path, **nothing)


def test_a_copy_that_somebody_made_of_the_weights_is_not_ours(tmp_path: Path) -> None:
    model, processor = guarded_tiny()
    model.save_pretrained(tmp_path, processor=processor)
    copy = tmp_path / "guarded-before.safetensors"
    shutil.copyfile(tmp_path / "guarded.safetensors", copy)
    before = copy.read_bytes()
    load_guarded(tmp_path)
    with pytest.raises(ArtefactError, match=r"no guarded model wrote \(guarded-before"):
        model.save_pretrained(tmp_path, processor=processor)
    assert copy.read_bytes() == before
    load_guarded(tmp_path)


def _other(model: Any) -> Any:
    with torch.no_grad():
        model.vqguard.patch.codebook.weight.add_(1.0)
        model.model.multi_modal_projector.linear_1.bias.add_(1.0)
    return model


def test_a_model_that_is_saved_while_it_is_read_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the guard and the weights: the old guard would judge by the new projector."""
    model, processor = guarded_tiny()
    model.save_pretrained(tmp_path, processor=processor)
    _other(model)
    read: Any = vars(reading)["config_of"]
    saves = [1]

    def late(described: dict[str, Any]) -> Any:
        if saves:
            saves.pop()
            model.save_pretrained(tmp_path, processor=processor)
        return read(described)

    monkeypatch.setattr(reading, "config_of", late)
    loaded = load_guarded(tmp_path)
    assert not saves
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_model_that_is_saved_again_and_again_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = guarded_tiny()
    model.save_pretrained(tmp_path, processor=processor)
    read: Any = vars(reading)["config_of"]

    def late(described: dict[str, Any]) -> Any:
        model.save_pretrained(tmp_path, processor=processor)
        return read(described)

    monkeypatch.setattr(reading, "config_of", late)
    monkeypatch.setattr(reading, "_ATTEMPTS", 2)
    with pytest.raises(ArtefactError, match="was saved again each of the 2 times"):
        load_guarded(tmp_path)


def test_a_model_that_is_saved_while_it_is_copied_is_not_bound_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = guarded_tiny()
    model.save_pretrained(tmp_path / "a", processor=processor)
    copy = shutil.copyfile

    def late(source: Path, target: Path) -> Path:
        copied = copy(source, target)
        if source.name == "guarded.safetensors":
            _other(model).save_pretrained(tmp_path / "a", processor=processor)
        return copied

    monkeypatch.setattr("shutil.copyfile", late)
    with pytest.raises(ArtefactError, match="was saved while it was copied"):
        rewrite(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b" / "vqguard.json").exists()


READER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_bound import _other, guarded_tiny
model, processor = guarded_tiny()
for _ in range(30):
    _other(model).save_pretrained(Path({folder!r}), processor=processor)
"""


@pytest.mark.slow
def test_readers_beside_a_writer_see_whole_models(tmp_path: Path) -> None:
    """Each save moves guard and projector by the same number."""
    model, processor = guarded_tiny()
    first = {n: t.clone() for n, t in model.state_dict().items()}
    model.save_pretrained(tmp_path, processor=processor)
    code = READER.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    reads = 0
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        while writer.poll() is None or not reads:
            try:
                state = load_guarded(tmp_path).state_dict()
            except ArtefactError as error:
                assert "was saved again each" in str(error)  # noqa: PT017
                continue
            reads += 1
            moved = {
                name: round(float((state[name] - first[name]).double().mean()))
                for name in ("vqguard.patch.codebook.weight", PROJECTOR)
            }
            assert len(set(moved.values())) == 1, moved
    assert writer.returncode == 0
