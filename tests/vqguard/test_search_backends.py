"""A back end from outside: one class, added to the table, and every reader of the table has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vqguard import GuardConfig, VQGuard
from vqguard.errors import ConfigError, InputError
from vqguard.search import add_backend, backend_choices, backend_table, calibrate, make_search
from vqguard.search.dense import DenseSearch


class Remembering(DenseSearch):
    """Exact, and answers a batch that it has seen from memory: nothing is faster in a timing."""

    name = "mine"
    devices = ("cpu",)

    def _prepare(self) -> None:
        super()._prepare()
        self._seen: dict[bytes, Tensor] = {}

    def _nearest(self, queries: Tensor) -> Tensor:
        key = queries.numpy().tobytes()
        if key not in self._seen:
            self._seen[key] = super()._nearest(queries)
        return self._seen[key]


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> type[Remembering]:
    monkeypatch.setattr(backend_table, "_BACKENDS", dict(backend_table._BACKENDS))
    add_backend(Remembering)
    return Remembering


def _words(codes: int = 4200) -> Tensor:
    return torch.randn(codes, 24, generator=torch.Generator().manual_seed(0))


def test_it_is_made_by_name(mine: type[Remembering]) -> None:
    search = make_search(_words(50), backend="mine")
    assert type(search) is mine
    assert search(_words(50)).tolist() == list(range(50))


def test_a_configuration_names_it(mine: type[Remembering]) -> None:
    guard = VQGuard(GuardConfig(24, 24, patch_codes=9, semantic_codes=3, search="mine")).eval()
    tokens, semantic = torch.randn(1, 5, 24), torch.randn(1, 1, 24)
    assert type(guard.patch._current_search(tokens[0]).search) is mine
    plain = VQGuard(GuardConfig(24, 24, patch_codes=9, semantic_codes=3, search="torch")).eval()
    assert torch.equal(guard(tokens, semantic).codes, plain(tokens, semantic).codes)


def test_tuning_times_it_and_auto_takes_it(mine: type[Remembering]) -> None:
    measured = calibrate(_words())
    assert measured.backend == "mine"
    assert measured.fits(_words())
    assert type(make_search(_words(), "auto", measured)) is mine


def test_one_that_is_not_to_be_taken_unasked_is_not(
    mine: type[Remembering], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "automatic", False)
    assert calibrate(_words()).backend != "mine"


def test_one_that_cannot_run_here_says_why(
    mine: type[Remembering], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "problem", classmethod(lambda cls: "its chip is missing"))
    with pytest.raises(ConfigError, match="mine back end cannot run: its chip is missing"):
        make_search(_words(), "mine")
    assert calibrate(_words()).backend != "mine"


def test_its_devices_are_held(mine: type[Remembering]) -> None:
    with pytest.raises(InputError, match="mine is a CPU back end and got a tensor on meta"):
        make_search(torch.empty(9, 5, device="meta"), "mine")


def test_without_it_the_name_is_unknown() -> None:
    assert "mine" not in backend_choices()
    with pytest.raises(ConfigError, match="unknown back end 'mine'"):
        make_search(_words(9), "mine")
    with pytest.raises(ConfigError, match="search: unknown back end 'mine'"):
        GuardConfig(4, 4, search="mine")


def test_a_name_is_given_once(mine: type[Remembering]) -> None:
    with pytest.raises(ConfigError, match="has a back end called 'mine' already"):
        add_backend(mine)


@pytest.mark.parametrize("name", backend_choices()[1:])
def test_a_class_has_the_name_that_the_table_gives_it(name: str) -> None:
    assert backend_table.backend_class(name).name == name
