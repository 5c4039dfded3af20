"""What a `with` block puts in force stays with its thread or task, and ends with it."""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqguard import GuardConfig, VQGuard
from vqguard.codebooks.quantizer import VectorQuantizer, straight_through, use_estimator
from vqguard.encoder import GuardedEncoder
from vqguard.guard import recording
from vqguard.judge import unjudged
from vqguard.safety_map import SafetyMap
from vqguard.scopes.modes import evaluating

WAIT = 120.0


def unquantised(x: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    return x


def in_a_thread(work: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result(WAIT)


@pytest.fixture
def guard() -> VQGuard:
    made = VQGuard(GuardConfig(patch_codes=8, patch_dim=4, semantic_codes=4, semantic_dim=4))
    counts = torch.tensor([[0, 3]] * 4)
    made.safety_map = SafetyMap(("gun",), counts, codebook_checksum=made.checksum("semantic"))
    return made.eval()


def test_an_estimator_is_in_force_for_its_thread_alone() -> None:
    level, x = VectorQuantizer(8, 4), torch.randn(3, 4)
    codewords = level.replace(x)[0]
    with use_estimator(level, unquantised):
        assert torch.equal(level.replace(x)[0], x)
        assert torch.equal(in_a_thread(lambda: level.replace(x)[0]), codewords)
    assert torch.equal(level.replace(x)[0], codewords)


def test_an_estimator_is_not_in_force_for_other_tasks() -> None:
    level, x = VectorQuantizer(8, 4), torch.randn(3, 4)
    codewords = level.replace(x)[0]

    async def attack(inside: asyncio.Event, go_on: asyncio.Event) -> None:
        with use_estimator(level, unquantised):
            inside.set()
            await go_on.wait()
            assert torch.equal(level.replace(x)[0], x)

    async def serve() -> None:
        inside, go_on = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(attack(inside, go_on))
        await inside.wait()
        assert torch.equal(level.replace(x)[0], codewords)
        assert torch.equal(await asyncio.to_thread(lambda: level.replace(x)[0]), codewords)
        go_on.set()
        await task

    asyncio.run(serve())


def test_what_was_started_inside_a_block_loses_it_with_the_block(guard: VQGuard) -> None:
    """A task or thread may inherit the context and outlive the block."""
    x = torch.randn(1, 3, 4)
    with use_estimator(guard, unquantised), recording(guard) as outputs, unjudged():
        inherited = contextvars.copy_context()
        assert torch.equal(inherited.run(guard, x, x).tokens, x)
    assert len(outputs) == 1
    later = inherited.run(guard, x, x)
    assert not torch.equal(later.tokens, x)
    assert later.flagged is not None
    assert len(outputs) == 1


def test_the_generator_of_a_cancelled_task_ends_its_blocks() -> None:
    """The event loop closes it in a task of its own, which began no block."""
    level, x = VectorQuantizer(8, 4), torch.randn(3, 4)
    codewords = level.replace(x)[0]
    errors: list[Any] = []

    async def attempts() -> AsyncIterator[Tensor]:
        with use_estimator(level, unquantised):
            while True:
                yield level.replace(x)[0]

    async def read() -> None:
        async for output in attempts():
            assert torch.equal(output, x)
            await asyncio.sleep(WAIT)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: errors.append(context))
        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        del task
        gc.collect()
        await asyncio.sleep(0.05)
        assert torch.equal(level.replace(x)[0], codewords)

    asyncio.run(serve())
    assert errors == []


def test_blocks_of_generators_may_end_in_another_order(guard: VQGuard) -> None:
    x = torch.randn(1, 3, 4)

    def attempts() -> Iterator[None]:
        with use_estimator(guard, unquantised):
            yield

    first = attempts()
    next(first)
    with recording(guard) as outputs, use_estimator(guard, unquantised):
        assert isinstance(first, Generator)
        first.close()
        assert torch.equal(torch.as_tensor(guard(x, x[:, :1]).tokens), x)
        assert len(outputs) == 1
    assert not torch.equal(torch.as_tensor(guard(x, x[:, :1]).tokens), x)


def test_a_recording_holds_its_own_threads_outputs(guard: VQGuard) -> None:
    x = torch.randn(1, 3, 4)
    with recording(guard) as outer, recording(guard) as inner:
        in_a_thread(lambda: guard(x, x))
        mine = guard(x, x)
    assert outer == [mine]
    assert inner == [mine]


def test_unjudged_quantises_and_gives_no_verdict(guard: VQGuard) -> None:
    x = torch.randn(1, 3, 4)
    with unjudged():
        output = guard(x, x)
        assert in_a_thread(lambda: guard(x, x)).flagged is not None
    assert output.flagged is None
    assert torch.equal(output.tokens, guard(x, x).tokens)


def test_checkpointed_passes_are_recomputed_with_the_estimator() -> None:
    """On a GPU autograd recomputes in threads of its own, which have no context."""
    level, x = VectorQuantizer(8, 4), torch.randn(3, 4, requires_grad=True)
    failed: list[BaseException] = []
    done = threading.Event()

    def backward(loss: Tensor) -> None:
        try:
            loss.backward()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    with straight_through(level):
        out: Tensor = checkpoint(lambda t: level(t).output * t, x, use_reentrant=False)
        _thread.start_new_thread(backward, (out.sum(),))  # as torch's are: not of `threading`
        assert done.wait(WAIT)
    assert not failed
    assert x.grad is not None
    assert torch.equal(x.grad, level(x).output.detach() + x.detach())


def test_replicas_of_data_parallel_work_as_the_thread_that_made_them(guard: VQGuard) -> None:
    x = torch.randn(1, 3, 4)
    with use_estimator(guard.patch, unquantised), recording(guard) as outputs:
        level: Any = guard.patch
        replica = level._replicate_for_data_parallel()
        replica.codebook = guard.patch.codebook
        assert torch.equal(in_a_thread(lambda: replica.replace(x)[0]), x)
        whole: Any = guard
        copy = whole._replicate_for_data_parallel()
        in_a_thread(lambda: copy(x, x))
    assert len(outputs) == 1


def test_modes_come_back_when_the_last_block_ends() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    module.train()
    module[0].eval()
    before = [part.training for part in module.modules()]
    first, second = evaluating(module.modules()), evaluating(module.modules())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(part.training for part in module.modules())
    second.__exit__(None, None, None)
    assert [part.training for part in module.modules()] == before


def test_screening_threads_leave_an_encoder_in_its_modes(guard: VQGuard) -> None:
    dropped: list[bool] = []

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.5))

        def forward(self, pixels: Tensor) -> Tensor:
            dropped.append(any(part.training for part in self.modules()))
            found: Tensor = self.layer(pixels.flatten(1)).reshape(len(pixels), 3, 4)
            return found

    model = GuardedEncoder(Encoder(), guard, global_token="mean").train()
    guard.eval()
    before = [part.training for part in model.modules()]
    pictures = torch.randn(4, 3, 2, 2)
    expected = model.screen(pictures)
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(model.screen, pictures) for _ in range(80)]
        assert all(job.result(WAIT) == expected for job in jobs)
    assert not any(dropped)
    assert [part.training for part in model.modules()] == before


@pytest.mark.parametrize(
    "search", ["torch", "faiss", pytest.param("pruned", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("inference", [False, True])
def test_threads_share_a_search(search: str, inference: bool) -> None:
    pytest.importorskip({"torch": "torch", "pruned": "numba", "faiss": "faiss"}[search])
    with torch.inference_mode(inference):
        level = VectorQuantizer(64, 8, search=search)
    queries = [torch.randn(17, 8) for _ in range(4)]
    expected = [VectorQuantizer(64, 8, search="torch").encode(some) for some in queries]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(i, pool.submit(level.encode, queries[i])) for _ in range(20) for i in range(4)]
        assert all(torch.equal(job.result(WAIT), expected[i]) for i, job in jobs)
