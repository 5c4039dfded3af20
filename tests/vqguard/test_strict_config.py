from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vqguard.config import GuardConfig, StrictConfig
from vqguard.errors import ConfigError


@dataclass(frozen=True)
class Inner(StrictConfig):
    rate: float
    """Learning rate."""
    steps: int = 3


@dataclass(frozen=True)
class Outer(StrictConfig):
    inner: Inner
    mode: Literal["fast", "exact"] = "exact"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, str] = (1, "a")
    where: Path | None = None
    extra: dict[str, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    optional: Inner | None = None
    on: bool = False


def test_all_problems_are_shown_together_with_the_nearest_names() -> None:
    bad: dict[str, Any] = {
        "inner": {"rte": 1.0, "steps": True},
        "mode": "fst",
        "sizes": [1, "2"],
        "pair": [1],
        "on": 1,
        "siezs": 3,
    }
    with pytest.raises(ConfigError) as caught:
        Outer.from_dict(bad)
    text = "\n".join(caught.value.problems)
    assert "inner.rte: unknown key. Did you mean 'rate'?" in text
    assert "inner.rate: missing" in text
    assert "inner.steps: expected int, got True (bool)" in text
    assert "mode: expected one of 'fast', 'exact', got 'fst' (str). Did you mean 'fast'?" in text
    assert "sizes[1]: expected int, got '2' (str)" in text
    assert "pair: expected tuple[int, str]" in text
    assert "on: expected bool, got 1 (int)" in text
    assert "siezs: unknown key. Did you mean 'sizes'?" in text
    assert len(caught.value.problems) == 8


def test_a_file_of_nothing_but_problems_is_refused_in_a_message_that_can_be_read() -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.from_dict({"inner": {"rate": 1.0}, "names": list(range(50_000))})
    assert len(caught.value.problems) == 101
    assert "names[0]: expected str, got 0 (int)" in caught.value.problems[0]
    assert caught.value.problems[-1] == "49,900 more of them: correct these first"


rates = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=10)


@settings(deadline=None, max_examples=60)
@example(
    rate=1.0,
    mode="fast",
    sizes=[],
    extra={"a\x85": 1.0, "\u2028b": 2.0},
    listed=["\x85", "é"],
    optional=False,
)
@given(
    rate=rates,
    mode=st.sampled_from(["fast", "exact"]),
    sizes=st.lists(st.integers(), max_size=4),
    extra=st.dictionaries(names, rates, max_size=3),
    listed=st.lists(names, max_size=3),
    optional=st.booleans(),
)
def test_yaml_and_json_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    rate: float,
    mode: Literal["fast", "exact"],
    sizes: list[int],
    extra: dict[str, float],
    listed: list[str],
    optional: bool,
) -> None:
    inner = Inner(rate)
    config = Outer(
        inner, mode, tuple(sizes), (4, "x"), Path("a/b"), extra, listed, inner if optional else None
    )
    folder = tmp_path_factory.mktemp("round")
    config.to_yaml(folder / "c.yaml")
    config.to_json(folder / "c.json")
    assert Outer.from_yaml(folder / "c.yaml") == config
    assert Outer.from_json(folder / "c.json") == config
    assert Outer.from_dict(config.to_dict()) == config


def test_an_int_becomes_a_float_and_construction_is_checked_too() -> None:
    assert Inner(1) == Inner(1.0)
    assert type(Inner(1).rate) is float
    with pytest.raises(ConfigError, match="rate: expected float"):
        Inner("1")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(value: float) -> None:
    with pytest.raises(ConfigError, match=r"float \(finite\)"):
        Inner(value)


def test_override_reads_yaml_values_and_reaches_nested_keys() -> None:
    config = Outer(Inner(1.0)).override(
        ["inner.rate=1e-3", "sizes=[3, 4]", "where=x/y", "extra.a=2", "optional.rate=5", "on=true"]
    )
    assert config.inner.rate == 1e-3
    assert config.sizes == (3, 4)
    assert config.where == Path("x/y")
    assert config.extra == {"a": 2.0}
    assert config.optional == Inner(5.0)
    assert config.on


def test_override_reports_every_assignment_it_cannot_apply() -> None:
    with pytest.raises(ConfigError) as caught:
        Outer(Inner(1.0)).override(["inner.stepz=1", "nothing", "sizes.a=1", "modes=fast"])
    assert len(caught.value.problems) == 4
    assert "inner.stepz: unknown key. Did you mean 'steps'?" in caught.value.problems[0]


def test_files_name_themselves_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        Outer.from_yaml(path)
    path.write_text("inner: {rate: 1")
    with pytest.raises(ConfigError, match=r"c\.yaml is not valid YAML"):
        Outer.from_yaml(path)
    path.write_text("inner: {rate: 1}\ninner: {rate: 2}\n")
    with pytest.raises(ConfigError, match="key given twice: inner"):
        Outer.from_yaml(path)
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        Outer.from_yaml(path)
    path.write_text('{"inner": {"rate": NaN}}')
    with pytest.raises(ConfigError, match="NaN is not a finite number"):
        Outer.from_json(path)


def test_yaml_cannot_execute(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"inner: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    with pytest.raises(ConfigError, match="not valid YAML"):
        Outer.from_yaml(path)
    assert not (tmp_path / "made").exists()


def test_guard_config_ranges() -> None:
    with pytest.raises(ConfigError) as caught:
        GuardConfig(0, 4, semantic_codes=-1, search="fais", refusal_text=" ", schema_version=2)
    assert len(caught.value.problems) == 5
    assert "Did you mean 'faiss'?" in str(caught.value)


def test_the_signature_shows_the_fields() -> None:
    shown = inspect.signature(GuardConfig).parameters
    assert list(shown)[:2] == ["patch_dim", "semantic_dim"]
    assert set(shown) == set(GuardConfig(1, 1).to_dict())
    assert shown["patch_codes"].default == 16000


@pytest.mark.parametrize("field", ["sizes", "pair", "names"])
def test_a_set_has_no_order_and_is_refused(tmp_path: Path, field: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"inner: {{rate: 1}}\n{field}: !!set {{1, a}}\n")
    with pytest.raises(ConfigError, match=rf"{field}: expected .*\(set\)") as caught:
        Outer.from_yaml(path)
    assert len(caught.value.problems) == 1


def test_every_guard_field_is_documented() -> None:
    assert set(GuardConfig.field_docs()) == set(GuardConfig(1, 1).to_dict())
    assert Inner.field_docs() == {"rate": "Learning rate."}
