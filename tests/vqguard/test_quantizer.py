from __future__ import annotations

import copy
import pickle
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

import vqguard.codebooks.quantizer as quantizer_module
from vqguard.codebooks.quantizer import (
    Estimator,
    VectorQuantizer,
    straight_through,
    straight_through_estimator,
    use_estimator,
)
from vqguard.errors import ConfigError, InputError, NonFiniteError
from vqguard.search import CodewordSearch, make_search


def _quantizer() -> VectorQuantizer:
    return VectorQuantizer(codes=16, dim=6)


def _features(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("training", [True, False])
def test_output_is_the_codeword_bit_for_bit_and_carries_no_gradient(training: bool) -> None:
    level, x = _quantizer().train(training), _features(2, 5)
    found = level(x)
    assert torch.equal(found.output, level.codebook.weight.detach()[found.indices])
    assert not found.output.requires_grad
    nearest = torch.cdist(x.detach().double(), level.codebook.weight.double()).argmin(-1)
    assert torch.equal(found.indices, nearest)


def test_straight_through_changes_no_value_and_passes_the_gradient_to_x_alone() -> None:
    level, x = _quantizer().eval(), _features(2, 5)
    plain = level(x)
    with straight_through(level):
        found = level(x)
    assert torch.equal(found.output, plain.output)
    weights = torch.randn(2, 5, 6)
    (found.output * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights)
    assert level.codebook.weight.grad is None


def test_losses_reach_codebook_and_features_apart() -> None:
    level, x = _quantizer().train(), _features(2, 5)
    found = level(x)
    words = level.codebook.weight.detach()[found.indices].double()
    by_hand = float((x.detach().double() - words).square().mean())
    assert float(found.codebook_loss.detach()) == pytest.approx(by_hand, rel=1e-6)
    assert float(found.commitment_loss.detach()) == pytest.approx(by_hand, rel=1e-6)
    found.codebook_loss.backward(retain_graph=True)
    assert x.grad is None
    moved = level.codebook.weight.grad
    assert moved is not None
    unused = torch.ones(16, dtype=torch.bool)
    unused[found.indices.flatten()] = False
    assert not bool(moved[unused].any())
    assert bool(moved[~unused].any(dim=1).all())
    level.codebook.weight.grad = None
    found.commitment_loss.backward()
    assert level.codebook.weight.grad is None
    assert x.grad is not None


def test_counts_and_losses_only_while_learning() -> None:
    level, x = _quantizer(), _features(3, 4)
    level.eval()
    assert level(x).codebook_loss is None
    assert int(level.codebook.counts.sum()) == 0
    level.train()
    assert level(x).codebook_loss is not None
    assert int(level.codebook.counts.sum()) == 12
    level.encode(x)
    assert int(level.codebook.counts.sum()) == 12
    level.requires_grad_(False)
    assert level(x).codebook_loss is None
    assert int(level.codebook.counts.sum()) == 12


def test_contexts_nest_and_survive_exceptions() -> None:
    level, x = _quantizer().eval(), _features(1)
    seen: list[str] = []

    def named(name: str) -> Estimator:
        def estimator(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
            seen.append(name)
            return weight.detach()[indices]

        return estimator

    with use_estimator(level, named("outer")):
        with suppress(RuntimeError), use_estimator(level, named("inner")):
            level(x)
            raise RuntimeError
        level(x)
    level(x)
    assert seen == ["inner", "outer"]


def test_context_covers_all_levels_of_a_model_and_nothing_else() -> None:
    model = nn.ModuleDict({"a": _quantizer(), "b": nn.Sequential(_quantizer())}).eval()
    with straight_through(model):
        assert model["a"](_features(2)).output.requires_grad
        assert model["b"](_features(2)).output.requires_grad
    with pytest.raises(ConfigError, match="no VectorQuantizer"), straight_through(nn.Linear(2, 2)):
        pass


def test_copies_and_state_start_without_an_estimator() -> None:
    level, x = _quantizer().eval(), _features(2)
    level(x)
    with straight_through(level):
        twin = copy.deepcopy(level)
        assert not any("estimator" in name for name in level.state_dict())
    assert not twin(x).output.requires_grad
    assert level(x).output.requires_grad is False
    with torch.no_grad():
        twin.codebook.weight.add_(10.0)
    assert torch.equal(level(x).output, level.codebook.weight.detach()[level(x).indices])
    expected = torch.cdist(x.detach().double(), twin.codebook.weight.double()).argmin(-1)
    assert torch.equal(twin(x).indices, expected)
    again = pickle.loads(pickle.dumps(level))
    assert torch.equal(again(x).indices, level(x).indices)


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("how", ["optimiser", "load_state_dict", "data", "copy_"])
def test_search_follows_the_codebook_in_eval(how: str, backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")
    level, x = VectorQuantizer(16, 6, search=backend).eval(), _features(200)
    level(x)
    other = VectorQuantizer(16, 6, seed=9)
    weight = level.codebook.weight
    if how == "optimiser":
        weight.grad = torch.randn_like(weight)
        torch.optim.SGD([weight], lr=1.0).step()
    elif how == "load_state_dict":
        level.load_state_dict(other.state_dict())
    elif how == "data":
        weight.data = other.codebook.weight.data.clone()
    else:
        with torch.no_grad():
            weight.copy_(other.codebook.weight)
    expected = torch.cdist(x.detach().double(), weight.detach().double()).argmin(-1)
    assert torch.equal(level(x).indices, expected)


def test_writes_through_data_need_a_refresh() -> None:
    level, x = _quantizer().eval(), _features(200)
    level(x)
    level.codebook.weight.data.mul_(torch.linspace(0.1, 4.0, 16)[:, None])
    level.refresh()
    expected = torch.cdist(x.detach().double(), level.codebook.weight.double()).argmin(-1)
    assert torch.equal(level(x).indices, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_the_input_is_kept_and_codes_do_not_depend_on_it(dtype: torch.dtype) -> None:
    level = _quantizer().eval()
    x = _features(50).detach().to(torch.bfloat16)
    found = level(x.to(dtype))
    assert found.output.dtype == dtype
    assert torch.equal(found.indices, level(x.to(dtype).float()).indices)
    assert torch.equal(found.output, level.codebook.weight.detach()[found.indices].to(dtype))
    with straight_through(level):
        assert torch.equal(level(x.to(dtype)).output, found.output)


def test_codeword_beyond_half_precision_is_refused() -> None:
    level = _quantizer().eval()
    with torch.no_grad():
        level.codebook.weight.fill_(1e6)
    with pytest.raises(NonFiniteError, match="bfloat16"):
        level(torch.ones(2, 6, dtype=torch.float16))


def test_not_finite_and_wrong_width() -> None:
    level = _quantizer().eval()
    with pytest.raises(NonFiniteError, match="row 1"):
        level(torch.tensor([[0.0] * 6, [float("nan")] * 6]))
    with pytest.raises(InputError, match=r"width 5 .* codebook has 6"):
        level(torch.zeros(2, 5))


def test_requantising_changes_nothing() -> None:
    level = _quantizer().eval()
    once = level(_features(4, 9))
    twice = level(once.output)
    assert torch.equal(once.indices, twice.indices)
    assert torch.equal(once.output, twice.output)


def test_nothing_of_size_tokens_by_codes_is_kept_for_backward() -> None:
    level = VectorQuantizer(2000, 6).train()
    x = _features(500)
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), straight_through(level):
        level(x)
    assert saved
    assert max(saved) <= 2000 * 6


def test_estimator_survives_gradient_checkpointing() -> None:
    level, x = _quantizer().eval(), _features(3)
    with straight_through(level):
        out = torch.utils.checkpoint.checkpoint(lambda t: level(t).output, x, use_reentrant=False)
        out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones_like(x))


def test_estimator_is_exact_where_the_formula_is_not() -> None:
    x = torch.full((1, 1), 1e8)
    weight = torch.full((1, 1), 0.1)
    formula = x + (weight - x)
    assert float(formula) != float(weight)
    indices = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(straight_through_estimator(x, weight, indices), weight)


def test_threads_with_other_numbers_of_threads_rebuild_no_search_in_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[int] = []

    def counted(*arguments: Any) -> CodewordSearch:
        made.append(torch.get_num_threads())
        return make_search(*arguments)

    monkeypatch.setattr(quantizer_module, "make_search", counted)
    level, x = _quantizer().eval(), _features(2, 5)
    threads = torch.get_num_threads()
    try:
        for step in range(12):
            torch.set_num_threads(1 + step % 3)
            if step == 6:  # every search kept follows the entries
                with torch.no_grad():
                    level.codebook.weight.mul_(-1.0)
            nearest = torch.cdist(x.detach().double(), level.codebook.weight.double()).argmin(-1)
            assert torch.equal(level.encode(x), nearest)
    finally:
        torch.set_num_threads(threads)
    assert made == [1, 2]
