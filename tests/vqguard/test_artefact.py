"""Guards on disk: round trips, the golden files, and everything that must be refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vqguard import artefact
from vqguard.config import GuardConfig
from vqguard.errors import ArtefactError, ChecksumError, InputError
from vqguard.guard import VQGuard
from vqguard.safety_map import SafetyMap

GOLDEN = Path(__file__).parents[1] / "golden" / "guard-1"


def make_guard(seed: int = 0) -> VQGuard:
    """The guard in tests/golden/guard-1 is make_guard() as schema 1 wrote it."""
    config = GuardConfig(
        6, 5, patch_codes=12, semantic_codes=4, seed=seed, refusal_text="Non, désolé."
    )
    guard = VQGuard(config)
    guard.patch.codebook.count(torch.tensor([1, 1, 7]))
    counts = torch.tensor([[30, 0, 2], [0, 25, 5], [0, 0, 150], [0, 1, 40]])
    safety_map = SafetyMap(("gun", "knife"), counts, codebook_checksum=guard.checksum("semantic"))
    guard.safety_map = safety_map.with_budget(0.05, torch.tensor([2] * 99 + [1]))
    return guard


def same(one: VQGuard, two: VQGuard) -> bool:
    left, right = one.state_dict(), two.state_dict()
    assert one.safety_map is not None
    assert two.safety_map is not None
    return (
        one.config == two.config
        and left.keys() == right.keys()
        and all(torch.equal(left[name], right[name]) for name in left)
        and one.safety_map.to_dict() == two.safety_map.to_dict()
    )


def test_round_trip(tmp_path: Path) -> None:
    guard = make_guard()
    guard.save_pretrained(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "guard.json",
        "guard.safetensors",
    ]
    again = VQGuard.from_pretrained(tmp_path / "a" / "b")
    assert same(guard, again)
    assert not again.training
    semantic = torch.randn(3, 2, 5)
    assert again.judge(semantic) == guard.judge(semantic)


def test_round_trip_without_a_map(tmp_path: Path) -> None:
    guard = make_guard()
    guard.safety_map = None
    guard.save_pretrained(tmp_path)
    assert VQGuard.from_pretrained(tmp_path).safety_map is None


def test_saving_twice_writes_the_same_bytes(tmp_path: Path) -> None:
    make_guard().save_pretrained(tmp_path / "one")
    make_guard().save_pretrained(tmp_path / "two")
    for name in ("guard.json", "guard.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_golden_guard_of_schema_1_loads() -> None:
    golden = VQGuard.from_pretrained(GOLDEN)
    assert golden.config.refusal_text == "Non, désolé."
    assert golden.config.patch_codes == 12
    assert golden.patch.codebook.counts.tolist() == [0, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert golden.safety_map is not None
    assert golden.safety_map.counts[1].tolist() == [0, 25, 5]
    found = golden.safety_map.false_positives
    assert found is not None
    assert (found.flagged, found.n) == (1, 100)
    verdicts = golden.judge(golden.semantic.lookup(torch.arange(4))[:, None])
    assert [verdict.category for verdict in verdicts] == ["gun", "knife", "neutral", "neutral"]


def _edit_json(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "guard.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")


def _set(*keys: Any, value: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        def change(document: Any) -> None:
            for key in keys[:-1]:
                document = document[key]
            document[keys[-1]] = value

        _edit_json(folder, change)

    return edit


def _flip_weight_byte(folder: Path) -> None:
    path = folder / "guard.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def _truncate(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:-40])

    return cut


def _other_weights(folder: Path) -> None:
    make_guard(seed=3).save_pretrained(folder / "other")
    shutil.copy(folder / "other" / "guard.safetensors", folder)


def _rewrite_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors and keep every checksum of files right, as a careful edit would."""

    def rewrite(folder: Path) -> None:
        path = folder / "guard.safetensors"
        tensors = load_file(path)
        change(tensors)
        document = json.loads((folder / "guard.json").read_text(encoding="utf-8"))
        described = {name: document[name] for name in ("config", "safety_map")}
        header = {"described_sha256": artefact._described_sha256(described)}
        save_file(tensors, path, metadata=header)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        _edit_json(folder, lambda one: one["checksums"].update(weights_file=digest))

    return rewrite


def _replace(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return _rewrite_weights(lambda tensors: tensors.update({name: tensor}))


def _to_device(folder: Path) -> None:
    (folder / "guard.safetensors").unlink()
    (folder / "guard.safetensors").symlink_to("/dev/zero")


def _long_number(folder: Path) -> None:
    (folder / "guard.json").write_text('{"schema": ' + "1" * 5000 + "}")


def _large_header(folder: Path) -> None:
    path = folder / "guard.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + path.read_bytes()[8:])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    _edit_json(folder, lambda one: one["checksums"].update(weights_file=digest))


PATCH = "patch.codebook.weight"
DAMAGE: dict[str, tuple[Callable[[Path], None], type[ArtefactError], str]] = {
    "no json": (lambda f: (f / "guard.json").unlink(), ArtefactError, "does not exist"),
    "no weights": (lambda f: (f / "guard.safetensors").unlink(), ArtefactError, "cannot read"),
    "truncated json": (_truncate("guard.json"), ArtefactError, "not valid JSON"),
    "truncated weights": (_truncate("guard.safetensors"), ChecksumError, "truncated"),
    "one weight bit": (_flip_weight_byte, ChecksumError, "restore both files"),
    "another guard's weights": (_other_weights, ChecksumError, "restore both files"),
    "newer schema": (_set("schema", value=2), ArtefactError, "has schema 2"),
    "no schema": (_set("schema", value=None), ArtefactError, "has schema None"),
    "extra key": (_set("hook", value="x"), ArtefactError, "expected the keys"),
    "mistyped checksum": (
        _set("checksums", "weights_file", value=1),
        ArtefactError,
        "checksums.weights_file: expected str",
    ),
    "other checksum": (
        _set("checksums", "semantics", value="0"),
        ArtefactError,
        r"checksums.semantics: unknown key. Did you mean 'semantic'",
    ),
    "config edited": (_set("config", "refusal_text", value="Sure"), ChecksumError, "was edited"),
    "unknown config key": (_set("config", "trust", value=1), ArtefactError, "unknown key"),
    "config schema": (_set("config", "schema_version", value=7), ArtefactError, "schema_version"),
    "map edited": (_set("safety_map", "tau", value=0.99), ChecksumError, "was edited"),
    "map removed": (_set("safety_map", value=None), ChecksumError, "was edited"),
    "level checksum": (_set("checksums", "patch", value="0"), ChecksumError, "patch codebook"),
    "other entries": (_replace(PATCH, torch.zeros(12, 6)), ChecksumError, "patch codebook"),
    "other shape": (_replace(PATCH, torch.zeros(12, 7)), ArtefactError, r"\(12, 7\).*\(12, 6\)"),
    "other dtype": (_replace(PATCH, torch.zeros(12, 6).half()), ArtefactError, "float16"),
    "not finite": (_replace(PATCH, torch.full((12, 6), torch.nan)), ArtefactError, "NaN"),
    "more codes than bytes": (
        _set("config", "patch_codes", value=300_000_000),
        ArtefactError,
        "asks for codebooks",
    ),
    "more codes than any file has": (
        _set("config", "patch_codes", value=10**15),
        ArtefactError,
        "asks for codebooks",
    ),
    "more levels than tensors": (
        _set("config", "deepstack_levels", value=5),
        ArtefactError,
        "asks for codebooks|was edited",
    ),
    "a number of 5000 digits": (
        _long_number,
        ArtefactError,
        "5,000 characters",
    ),
    "a rule that is a list": (_set("safety_map", "rule", value=[]), ArtefactError, "."),
    "a device for weights": (_to_device, ArtefactError, "not a regular file"),
    "a large header": (_large_header, ArtefactError, "header of"),
    "extra tensor": (_replace("more", torch.zeros(1)), ArtefactError, "expected the tensors"),
    "missing tensor": (
        _rewrite_weights(lambda tensors: tensors.pop(PATCH)),
        ArtefactError,
        "expected the tensors",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_guards_are_refused(name: str, tmp_path: Path) -> None:
    damage, error, message = DAMAGE[name]
    make_guard().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message) as caught:
        VQGuard.from_pretrained(tmp_path)
    assert "guard." in str(caught.value), "the message names the file"


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_value_in_guard_json_loads_or_is_an_artefact_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    """With checksums that fit, as whoever can write both files can make them."""
    make_guard().save_pretrained(tmp_path)
    document = json.loads((tmp_path / "guard.json").read_text(encoding="utf-8"))
    place, key = document, data.draw(st.sampled_from(["config", "safety_map", "calibration"]))
    while isinstance(place.get(key), dict) and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place)))
    place[key] = data.draw(_values)
    path = tmp_path / "guard.safetensors"
    try:
        described = {name: document[name] for name in ("config", "safety_map")}
        header = {"described_sha256": artefact._described_sha256(described)}
        save_file(load_file(path), path, metadata=header)
        document["checksums"]["weights_file"] = hashlib.sha256(path.read_bytes()).hexdigest()
        text = json.dumps(document)
    except ValueError:  # NaN
        text = json.dumps(document)
    (tmp_path / "guard.json").write_text(text, encoding="utf-8")
    try:
        VQGuard.from_pretrained(tmp_path)
    except ArtefactError as error:
        assert "guard." in str(error)  # noqa: PT017 -- some values are fine


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_previous_guard(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_guard()
    first.save_pretrained(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if failing == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        make_guard(seed=9).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert same(VQGuard.from_pretrained(tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 2, "no draft is left behind"


def test_config_of_the_golden_guard_is_strict_json() -> None:
    document = json.loads((GOLDEN / "guard.json").read_text(encoding="utf-8"))
    assert set(document) == {"schema", "config", "safety_map", "checksums"}
    assert GuardConfig.from_dict(document["config"]).site == "projected"


def test_a_guard_is_the_old_or_the_new_one_wherever_a_save_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    old, new, third = make_guard(), make_guard(1), make_guard(2)
    seen = []
    for step in range(20):
        folder = tmp_path / str(step)
        old.save_pretrained(folder)
        left = [step]

        def dying(function: Callable[..., Any], left: list[int] = left) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] < 0:  # and nothing is cleaned up either
                    raise KilledError
                return function(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patched:
            for name in ("replace", "write_bytes", "unlink"):
                patched.setattr(Path, name, dying(getattr(Path, name)))
            patched.setattr(os, "fsync", dying(os.fsync))
            try:
                new.save_pretrained(folder)
            except KilledError:
                killed = True
            else:
                killed = False
        read = VQGuard.from_pretrained(folder)
        assert same(read, old) or same(read, new), step
        seen.append(same(read, new))
        third.save_pretrained(folder)
        assert same(VQGuard.from_pretrained(folder), third)
        if not killed:
            break
    assert not killed
    assert seen == sorted(seen)
    assert len(set(seen)) == 2


def test_a_first_save_that_stopped_behind_its_decision_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def fail(path: Path, target: Path) -> Path:
        if target.name == artefact.WEIGHTS_NAME:
            raise OSError("stopped")
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="stopped"):
            make_guard().save_pretrained(tmp_path)
    assert not (tmp_path / artefact.WEIGHTS_NAME).exists()
    assert same(VQGuard.from_pretrained(tmp_path), make_guard())


def test_a_category_that_no_file_can_hold_is_refused(tmp_path: Path) -> None:
    guard = make_guard()
    counts = torch.ones(4, 2, dtype=torch.int64)
    guard.safety_map = SafetyMap(
        ("gun\udcff",), counts, codebook_checksum=guard.checksum("semantic")
    )
    with pytest.raises(InputError, match=r"half a character .*another name"):
        guard.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
