"""One guarded model under many callers: each verdict is that of the caller's own picture."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import TextIteratorStreamer

from vqguard.adapters import visual_features
from vqguard.codebooks.quantizer import use_estimator
from vqguard.errors import BypassError, InputError
from vqguard.guard import recording
from vqguard.recipes.data.chat import prompt_text
from vqguard.recipes.run import LoadedRun
from vqguard.safety_map import Verdict

from .conftest import MakeModel, calibrate_on, noisy_pictures

WAIT = 300.0
CALLERS = 4
PICTURES = 12
TOKENS = 3
REFUSED = "sorry ."


@dataclass(frozen=True)
class Asked:
    """A picture with what the model says of it to a lone caller."""

    image: Image.Image
    inputs: dict[str, Any]
    verdict: Verdict
    answer: list[int]
    text: str
    tokens: Tensor


class Callers:
    """Mixed calls of one model, each compared with what a lone caller gets."""

    def __init__(self, run: LoadedRun) -> None:
        self.run = run
        self.model = run.model
        self.pictures = [self._alone(image) for image in noisy_pictures(PICTURES)]
        self.kinds: list[Callable[[Asked], None]] = [
            self.screen,
            self.ask,
            self.generate,
            self.generate_tokens,
            self.fail,
            self.record,
            self.attack,
            self.stream,
        ]

    def _alone(self, image: Image.Image) -> Asked:
        text = prompt_text(self.run.processor, "what is it ?", picture=True)
        inputs = dict(self.run.processor(images=[image], text=[text], return_tensors="pt"))
        output = self._generate(inputs)
        (verdict,) = self.model.screen(**inputs)
        assert output.verdicts == [verdict] == self.model.last_verdicts
        said = self.run.ask(image, "what is it ?", max_new_tokens=TOKENS).text
        with torch.no_grad():
            tokens = self.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        return Asked(image, inputs, verdict, output.sequences.tolist()[0], said, tokens)

    def _generate(self, inputs: dict[str, Any], **more: Any) -> Any:
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True}
        return self.model.generate(**inputs, **{**settings, **more})

    def screen(self, asked: Asked) -> None:
        assert self.model.screen(**asked.inputs) == [asked.verdict]

    def ask(self, asked: Asked) -> None:
        answer = self.run.ask(asked.image, "what is it ?", max_new_tokens=TOKENS)
        assert (answer.text, answer.verdict) == (asked.text, asked.verdict)

    def generate(self, asked: Asked) -> None:
        output = self._generate(asked.inputs)
        assert output.verdicts == [asked.verdict]
        assert output.sequences.tolist() == [asked.answer]
        assert self.model.last_verdicts == [asked.verdict]

    def generate_tokens(self, asked: Asked) -> None:
        output = self._generate(asked.inputs, return_dict_in_generate=False)
        assert output.tolist() == [asked.answer]
        assert self.model.last_verdicts == [asked.verdict]

    def fail(self, asked: Asked) -> None:
        with pytest.raises(BypassError):
            self._generate(asked.inputs, mm_encoder_outputs={"image": torch.zeros(1, 1)})
        assert self.model.last_verdicts == []

    def record(self, asked: Asked) -> None:
        with torch.no_grad(), recording(self.model.vqguard) as outputs:
            self.model(**asked.inputs)
        (output,) = outputs
        assert output.flagged is not None
        assert output.flagged.tolist() == [asked.verdict.flagged]

    def attack(self, asked: Asked) -> None:
        """Reads what the quantiser hides, here and nowhere else."""
        with torch.no_grad():
            plain = visual_features(self.model, **asked.inputs).tokens[0]
            with use_estimator(self.model.vqguard, lambda x, weight, codes: x):
                found = self.model.get_image_features(asked.inputs["pixel_values"]).pooler_output
            quantised = self.model.get_image_features(asked.inputs["pixel_values"]).pooler_output
        assert torch.equal(found[0], plain)
        assert torch.equal(quantised[0], asked.tokens)

    def stream(self, asked: Asked) -> None:
        """The text comes from another thread; the verdict with what `generate` returned there."""
        streamer = TextIteratorStreamer(
            self.run.processor.tokenizer, skip_prompt=True, timeout=WAIT
        )
        with ThreadPoolExecutor(1) as pool:
            job = pool.submit(self._generate, asked.inputs, streamer=streamer)
            said = "".join(streamer)
            assert job.result(WAIT).verdicts == [asked.verdict]
        assert (REFUSED in said) == asked.verdict.flagged

    def go(self, seed: int, calls: int) -> int:
        chosen = random.Random(seed)
        for _ in range(calls):
            self.one(chosen)
        return calls

    def one(self, chosen: random.Random) -> None:
        chosen.choice(self.kinds)(chosen.choice(self.pictures))


@pytest.fixture
def callers(small_guarded: MakeModel) -> Callers:
    model, processor = small_guarded()
    calibrate_on(model, processor, noisy_pictures(PICTURES))
    found = Callers(LoadedRun(model, processor))
    flags = [asked.verdict.flagged for asked in found.pictures]
    assert 2 <= sum(flags) <= PICTURES - 2
    assert all((asked.text == REFUSED) == asked.verdict.flagged for asked in found.pictures)
    return found


CALLS = [20, pytest.param(200, marks=pytest.mark.slow)]


@pytest.mark.parametrize("calls", CALLS)
@pytest.mark.parametrize("training", [False, True])
def test_threads(callers: Callers, calls: int, training: bool) -> None:
    """In train mode too: verdicts are those of eval mode, and each module's mode comes back."""
    callers.model.train(training)
    callers.model.vqguard.freeze()  # while codebooks learn, `forward` judges nothing
    with ThreadPoolExecutor(CALLERS) as pool:
        jobs = [pool.submit(callers.go, seed, calls) for seed in range(CALLERS)]
        assert sum(job.result(WAIT) for job in jobs) == CALLERS * calls
    assert all(module.training == training for module in callers.model.modules())


@pytest.mark.parametrize("calls", CALLS)
def test_tasks(callers: Callers, calls: int) -> None:
    """Calls in the loop's own thread, and handed to others, which inherit the task's context."""

    async def caller(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(calls):
            asked = chosen.choice(callers.pictures)
            callers.generate_tokens(asked)
            kind = chosen.choice(callers.kinds)
            if chosen.random() < 0.5:
                await asyncio.to_thread(kind, chosen.choice(callers.pictures))
            else:
                await asyncio.sleep(0)
            assert callers.model.last_verdicts == [asked.verdict]
            kind(chosen.choice(callers.pictures))

    async def serve() -> None:
        await asyncio.gather(*(caller(seed) for seed in range(CALLERS)))

    asyncio.run(serve())


def test_a_thread_without_a_call_is_told_so(callers: Callers) -> None:
    """An empty list would read as "nothing is flagged"."""
    found: list[Any] = []

    def read() -> None:
        try:
            found.append(callers.model.last_verdicts)
        except InputError as error:
            found.append(str(error))

    callers.generate(callers.pictures[0])
    thread = threading.Thread(target=read)
    thread.start()
    thread.join(WAIT)
    assert "return_dict_in_generate=True" in found[0]
