"""A calibration chooses speed alone, and is kept with the guard as plain JSON."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vqguard import GuardConfig, VQGuard
from vqguard.errors import NonFiniteError
from vqguard.search import (
    Calibration,
    CodewordSearch,
    calibrate,
    make_search,
    settled_search,
)
from vqguard.search.plan import Plan
from vqguard.search.tuning import choose_clear, machine

CODES, DIM = 4200, 24


def _words() -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(CODES, DIM, generator=g) * torch.logspace(0, -2, DIM)


def _known(backend: str) -> Calibration:
    return Calibration(backend, Plan(8, "float32", 50.0), CODES, DIM, machine())


def test_a_measurement_names_a_back_end_that_runs_here() -> None:
    found = calibrate(_words(), _words()[:100])
    assert found.fits(_words())
    assert not found.fits(_words()[1:])
    assert 1 <= found.plan.rank <= DIM
    assert Calibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found


@pytest.mark.parametrize("backend", ["torch", "pruned", "faiss"])
def test_auto_follows_a_calibration_that_fits(backend: str) -> None:
    module = {"torch": "torch", "pruned": "numba", "faiss": "faiss"}[backend]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed")
    search = make_search(_words(), "auto", _known(backend))
    assert search.name == backend
    assert torch.equal(search(_words()[:50]), torch.arange(50))


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "none"},
        {"machine": 3},
        {"codes": 0},
        {"codes": True},
        {"plan": None},
        {"plan": {"rank": 8, "dtype": "float64", "worth": 50.0}},
        {"plan": {"rank": 8, "dtype": "float32", "worth": float("nan")}},
        {"plan": {"rank": 0, "dtype": "float32", "worth": 50.0}},
        {"plan": {"rank": 8, "dtype": "float32", "worth": 0.5}},
        {"times": {"torch": "3"}},
        {"reason": None},
        {"backend": "auto"},
        {"other": 1},
    ],
)
def test_anything_else_is_measured_again(change: dict[str, object]) -> None:
    assert Calibration.from_dict({**_known("torch").to_dict(), **change}) is None
    assert Calibration.from_dict([]) is None


def test_another_machine_is_measured_again() -> None:
    other = _known("torch")._replace(machine="another")
    assert not other.fits(_words())


def test_it_is_kept_with_the_guard_and_not_needed(tmp_path: Path) -> None:
    guard = VQGuard(GuardConfig(DIM, 4, patch_codes=CODES, semantic_codes=3)).eval()
    tokens, semantic = torch.randn(1, 5, DIM), torch.randn(1, 1, 4)
    expected = guard(tokens, semantic).codes
    assert guard.semantic.calibration is None, "a small codebook needs none"
    measured = guard.patch.calibration
    assert measured is not None
    guard.save_pretrained(tmp_path)
    again = VQGuard.from_pretrained(tmp_path)
    assert again.patch.calibration == measured
    path = tmp_path / "guard.json"
    document = json.loads(path.read_text())
    unusable: list[object] = [{"patch": "broken"}, [], None]
    for kept in unusable:
        document["calibration"] = kept
        path.write_text(json.dumps(document))
        loaded = VQGuard.from_pretrained(tmp_path)
        assert loaded.patch.calibration is None
        assert torch.equal(loaded(tokens, semantic).codes, expected)
    del document["calibration"]
    path.write_text(json.dumps(document))
    assert VQGuard.from_pretrained(tmp_path).patch.calibration is None


def test_a_first_batch_with_nan_is_refused_by_its_own_row() -> None:
    guard = VQGuard(GuardConfig(DIM, 4, patch_codes=CODES, semantic_codes=3)).eval()
    tokens = torch.zeros(1, 130, DIM)
    tokens[0, 77, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="row 77"):
        guard(tokens, torch.zeros(1, 1, 4))


def _rounds(*seconds: float) -> list[float]:
    return [value for value in seconds for _ in range(3)]


def test_a_search_replaces_another_only_where_it_is_clearly_faster() -> None:
    taken = {"torch": _rounds(1.0, 1.2), "faiss": _rounds(0.97, 1.15), "pruned": _rounds(0.99, 1.3)}
    assert choose_clear(taken)[0] == "torch"
    taken["faiss"] = _rounds(0.8, 0.9)
    kept, reason = choose_clear(taken)
    assert kept == "faiss"
    assert "of the time of" in reason
    taken["pruned"] = _rounds(0.3, 0.4)
    assert choose_clear(taken)[0] == "pruned"


def test_one_lucky_round_does_not_decide() -> None:
    taken = {"torch": [1.0] * 7, "pruned": [1.1, 1.1, 0.2, 1.1, 1.1, 1.1, 1.1]}
    kept, reason = choose_clear(taken)
    assert kept == "torch"
    assert "1.0" in reason or "0.9" in reason


@settings(max_examples=50, deadline=None)
@given(
    true=st.lists(st.floats(0.2, 5.0), min_size=2, max_size=4),
    noise=st.sampled_from([0.02, 0.3, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_under_noise_the_choice_is_hardly_slower_than_the_default(
    true: list[float], noise: float, seed: int
) -> None:
    # other work slows a round of any search down, by up to `noise` and now and then threefold
    g = torch.Generator().manual_seed(seed)
    slow = 1.0 + noise * torch.rand(len(true), 15, generator=g).double()
    slow *= 1.0 + 2.0 * (torch.rand(slow.shape, generator=g) < 0.1)
    taken = {str(i): (value * slow[i]).tolist() for i, value in enumerate(true)}
    kept = true[int(choose_clear(taken)[0])]
    assert kept <= 1.1 * true[0] * (1.0 + noise / 4)


def test_plans_that_cannot_pay_are_not_timed() -> None:
    pytest.importorskip("numba")
    from vqguard.search.rank_model import plans_worth_timing

    words = _words()
    assert plans_worth_timing(words, words[:64], dense_time=1e-12)[0] == []
    plans, _ = plans_worth_timing(words, words[:64] + 1e-3, dense_time=1.0)
    assert 1 <= len(plans) <= 2
    assert all(1 <= plan.rank <= DIM for plan in plans)


def test_tuning_makes_the_search_that_is_used_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from vqguard.search.pruned import PrunedSearch

    made: list[CodewordSearch] = []
    prepare = CodewordSearch.refresh

    def spy(self: CodewordSearch, codewords: torch.Tensor) -> None:
        made.append(self)
        prepare(self, codewords)

    monkeypatch.setattr(CodewordSearch, "refresh", spy)
    words = _words()
    search, calibration = settled_search(words, None, words[:100])
    assert search in made
    assert search.name == calibration.backend
    assert search.codewords.data_ptr() == words.data_ptr(), "without a copy"
    assert sum(type(every) is PrunedSearch for every in made) <= 2
    made.clear()
    again, kept = settled_search(words, calibration)
    assert kept is calibration
    assert [type(every) for every in made].count(type(again)) == 1


def test_axes_that_tuning_tried_serve_a_smaller_rank() -> None:
    pytest.importorskip("numba")
    from vqguard.search.bound import principal_axes
    from vqguard.search.pruned import PrunedSearch

    g = torch.Generator().manual_seed(3)
    words = torch.randn(500, 160, generator=g) * torch.logspace(0, -2, 160)
    queries = words[:99] + 0.05 * torch.randn(99, 160, generator=g)
    expected = make_search(words, "torch")(queries)
    plan = Plan(48, "float32", 50.0)
    search = PrunedSearch(words, plan, principal_axes(words, 80))
    assert torch.equal(search(queries), expected)
    changed = words.flip(0).contiguous()
    search.refresh(changed)
    assert torch.equal(search(queries), 499 - expected)


def test_another_number_of_threads_is_another_machine() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        known = _known("torch")
        torch.set_num_threads(2)
        assert not known.fits(_words())
    finally:
        torch.set_num_threads(threads)


def test_the_plan_without_measurement_is_timed_beside_the_model_s() -> None:
    """A model that is wrong about few axes does not decide alone."""
    pytest.importorskip("numba")
    from vqguard.search.plan import default_plan
    from vqguard.search.pruned import PrunedSearch

    g = torch.Generator().manual_seed(0)
    words = torch.randn(CODES, 192, generator=g) * torch.logspace(0, -2, 192)
    tokens = words[:100] + 0.01 * torch.randn(100, 192, generator=g)
    usual = default_plan(CODES, 192)
    searches = PrunedSearch.candidates(words, tokens, dense_seconds=1.0)
    plans = [search.plan for search in searches]
    assert [(plan.rank, plan.dtype) for plan in plans if plan].count(usual[:2]) == 1
    assert all(torch.equal(search(tokens), torch.arange(100)) for search in searches)
