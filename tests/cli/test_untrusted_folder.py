"""A folder of somebody else's: no command runs what is in it, or fetches what it names."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vqguard.adapters import (
    build_guard,
    guard_encoder,
    guard_model,
    load_guarded,
    resolve_model,
    save_guard_only,
)
from vqguard.adapters.storage.base_model import find_base, recorded_base
from vqguard.adapters.storage.manifest import RecordedBase
from vqguard.cli.main import main
from vqguard.errors import ArtefactError, InputError, VQGuardError
from vqguard.recipes.models import base_model
from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.run import save_run_model
from vqguard.recipes.tiny.weights import load_base

CODE = "from pathlib import Path\nPath({mark!r}).touch()\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    model: Any
    model, processor = load_base()
    guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4), processor)
    load_recipe("llava-tiny").to_yaml(run / "recipe.yaml")
    save_run_model(run, model, processor)
    return run


def spoil(folder: Path, mark: Path) -> None:
    """Name code in every file that may name some, and put the code there."""
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    names = {
        "AutoConfig": "evil.C",
        "AutoModel": "evil.C",
        "AutoModelForImageTextToText": "evil.C",
        "AutoProcessor": "evil.C",
        "AutoTokenizer": ["evil.C", "evil.C"],
        "AutoImageProcessor": "evil.C",
        "AutoVideoProcessor": "evil.C",
    }
    for path in folder.glob("*config.json"):
        content = json.loads(path.read_text())
        for part in (content, *(v for v in content.values() if isinstance(v, dict))):
            part["auto_map"] = names
        path.write_text(json.dumps(content))
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        if not (folder / name).exists():
            (folder / name).write_text(json.dumps({"auto_map": names}))


def bind_again(folder: Path) -> None:
    """What an attacker does too: checksums are no signatures."""
    from vqguard.adapters.storage.bound_files import bound_sums
    from vqguard.adapters.storage.manifest import MANIFEST

    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {k: v for k, v in bound_sums(folder).items() if k != "evil.py"}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.alone
@pytest.mark.parametrize(
    "form",
    [
        "run",
        # every command again, each in a process of its own
        pytest.param("bound", marks=pytest.mark.slow),
        pytest.param("base", marks=pytest.mark.slow),
    ],
)
def test_no_command_runs_the_folder_s_code(form: str, exported: Path, tmp_path: Path) -> None:
    mark, run = tmp_path / "executed", tmp_path / "evil"
    if form == "base":
        model, processor = load_base()
        model.save_pretrained(run)
        processor.save_pretrained(run)
        spoil(run, mark)
    else:
        shutil.copytree(exported, run)
        spoil(run / "model", mark)
    if form == "bound":
        bind_again(run / "model")
    image = tmp_path / "x.png"
    Image.new("RGB", (96, 96), "grey").save(image)
    commands = [
        ["scan", "--run", str(run), str(image)],
        ["ask", str(run), str(image), "What is this?"],
        ["verify", str(run)],
        ["evaluate", str(run)],
        ["export", str(run), "--output", str(tmp_path / "out")],
        ["calibrate", str(run), "--images", str(tmp_path)],
        ["retrofit", "--model", str(run), "--output", str(tmp_path / "new"), "--dry-run"],
    ]
    program = "import sys; from vqguard.cli.main import main\n" + "\n".join(
        f"main({command!r})" for command in commands
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="yes\n" * 100,
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert not mark.exists(), done.stderr
    assert "Do you wish to run the custom code" not in done.stdout + done.stderr


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model, processor = load_base()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    torch.save(load_file(path), tmp_path / "pytorch_model.bin")
    path.unlink()
    recipe = replace(load_recipe("llava-tiny"), model=str(tmp_path))
    with pytest.raises(OSError, match=r"model\.safetensors"):
        base_model(recipe)
    assert main(["verify", str(tmp_path)]) != 0


ABSENT: dict[str, Callable[[Any], Any]] = {
    "load_guarded": load_guarded,
    "find_base": find_base,
    "resolve_model": resolve_model,
    "base of a guard": lambda name: save_guard_only(load_tiny(), "out", name),
    "an encoder": lambda name: guard_encoder(f"transformers:{name}"),
}


def load_tiny() -> Any:
    model: Any
    model, processor = load_base()
    return guard_model(model, build_guard(model, patch_codes=16, semantic_codes=4), processor)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any, **_: Any) -> None:
        raise AssertionError(f"asked the hub for {arguments}")

    monkeypatch.chdir(tmp_path)
    for name in ("snapshot_download", "hf_hub_download", "model_info"):
        monkeypatch.setattr(huggingface_hub, name, never)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("how", ABSENT)
def test_a_path_that_is_not_there_is_never_an_id(how: str, kind: type) -> None:
    with pytest.raises(VQGuardError, match=r"no folder at '.*runs/llava-tiny'") as caught:
        ABSENT[how](kind("runs/llava-tiny"))
    assert ("hub:runs/llava-tiny" in str(caught.value)) == (kind is str or how == "an encoder")


@pytest.mark.usefixtures("offline")
def test_no_command_takes_a_path_for_an_id(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        ["verify", "runs/llava-tiny"],
        ["retrofit", "--model", "runs/llava-tiny", "--output", "out"],
        ["scan", "--run", "runs/llava-tiny", "x.png"],
        ["ask", "runs/llava-tiny", "x.png", "What?"],
        ["evaluate", "runs/llava-tiny"],
        ["export", "runs/llava-tiny", "--output", "out"],
    ):
        assert main(command) == 2, command
        assert "runs/llava-tiny" in capsys.readouterr().err


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("name", "wanted"),
    [("hub:someone/base", "someone/base"), ("llava-1.5", "llava-hf/llava-1.5-7b-hf")],
)
def test_an_id_never_opens_a_folder(
    name: str, wanted: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # transformers would: it looks for a folder of that name first.
    shutil.copytree(find_base("llava-tiny").folder, tmp_path / wanted)
    with pytest.raises(InputError, match=rf"write './{wanted}' if the folder"):
        base_model(load_recipe("llava-tiny").override([f"model={name}"]))
    with pytest.raises(InputError, match=rf"write './{wanted}' if the folder"):
        find_base(name)
    assert main(["verify", name]) == 2
    assert "if the folder is what you mean" in capsys.readouterr().err
    with pytest.raises(InputError, match="if the folder is what you mean"):
        guard_encoder(f"transformers:hub:{wanted}")
    # A path is that folder, by a name that is no id.
    for path in (f"./{wanted}", tmp_path / wanted):
        entry = resolve_model(path)
        assert (entry.source, entry.location) == ("path", str(tmp_path / wanted))


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["hub:", "hub:x", "hub:a/b/c", "hub:../b", "hub:a/.."])
def test_an_id_has_one_form(name: str) -> None:
    for read in (load_guarded, resolve_model):
        with pytest.raises(InputError, match="hub:owner/name"):
            read(name)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "described",
    [
        {"source": "hub", "name": "someone/base", "revision": None},
        {"source": "hub", "name": "someone/base", "revision": "main"},
        {"source": "hub", "name": "../base", "revision": "a" * 40},
        {"source": "package", "name": "someone/base", "revision": None},
        {"source": "package", "name": "evil", "revision": None},
        {"source": "elsewhere", "name": "llava-tiny", "revision": None},
    ],
)
def test_a_manifest_names_a_base_in_its_own_sense_alone(
    described: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "evil").mkdir()
    with pytest.raises(ArtefactError, match="name its folder"):
        recorded_base(RecordedBase(**described, weights_sha256="0"), None)
