"""Requests that are answered together are answered as they would be alone."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from typing import Any

import pytest

from vqguard.errors import FlaggedImageError
from vqguard.judging.policies import Policy
from vqguard.recipes.run import LoadedRun
from vqguard.recipes.serving.answering.engine import Engine
from vqguard.recipes.serving.answering.jobs import AnswerJob, Screened, ScreenJob
from vqguard.recipes.serving.answering.prompts import EncodedPrompt, PromptEncoder
from vqguard.recipes.serving.answering.rows import Choosing, Row
from vqguard.recipes.serving.answering.tickets import Ticket
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.metrics import Metrics
from vqguard.recipes.serving.wire.schema import ChatRequest

from .conftest import PICTURES, asking

FAR = 1e9  # a deadline that does not come
WORDS = "dog cat bus what is it the a red blue count where and under".split()
Chosen = tuple[EncodedPrompt, Choosing]


def requests(run: LoadedRun, count: int) -> list[Chosen]:
    """Mixed ones: none to three pictures, texts and answers of many lengths, some sampled."""
    chosen = random.Random(1)
    encoder = PromptEncoder(run.model, run.processor, Limits())
    made = []
    for number in range(count):
        pictures = chosen.sample(PICTURES, chosen.choice([0, 1, 1, 1, 2, 3]))
        question = " ".join(chosen.choices(WORDS, k=chosen.randint(1, 12)))
        body = ChatRequest.model_validate(asking(*pictures, question=question))
        sampled: dict[str, Any] = {"temperature": 1.0, "seed": number} if number % 4 == 3 else {}
        choosing = Choosing(chosen.randint(1, 12), **sampled)
        made.append((encoder.encode(body, pictures), choosing))
    return made


async def answered(run: LoadedRun, chosen: list[Chosen], batch: int) -> list[Row | Exception]:
    """All in line before the model starts, so that batches are as large as they may be."""
    engine = Engine(run, batch, Metrics())
    tickets = []
    for prompt, choosing in chosen:
        ticket: Ticket[Row] = Ticket()
        job = AnswerJob(prompt, Row(choosing, FAR, engine.decode), ticket)
        engine.line.append(job)
        tickets.append(ticket)
    engine.start()
    rows = await asyncio.gather(*(t.result() for t in tickets), return_exceptions=True)
    await asyncio.to_thread(engine.stop)
    return [row for row in rows if isinstance(row, Row | Exception)]


def outcome(row: Row | Exception) -> Any:
    assert isinstance(row, Row), row
    return row.tokens, row.end, row.verdicts, row.map_version


@pytest.mark.parametrize(("penalty", "count"), [(None, 80), (1.5, 20)])
def test_together_as_alone(run: LoadedRun, penalty: float | None, count: int) -> None:
    """Token for token what `generate` says of each; what is sampled, what it is in a row alone."""
    run.model.generation_config.repetition_penalty = penalty
    chosen = requests(run, count)
    together = asyncio.run(answered(run, chosen, 16))
    refused = [row.refused for row in together if isinstance(row, Row)]
    assert count / 8 < sum(refused) < count * 7 / 8
    sampled = [number for number, (_, choosing) in enumerate(chosen) if choosing.temperature]
    alone = asyncio.run(answered(run, [chosen[number] for number in sampled], 1))
    assert [outcome(together[number]) for number in sampled] == [outcome(row) for row in alone]
    for number, (row, (prompt, choosing)) in enumerate(zip(together, chosen, strict=True)):
        assert isinstance(row, Row)
        if number in sampled:
            continue
        inputs = run.processor.tokenizer.pad({"input_ids": [prompt.input_ids]}, return_tensors="pt")
        output = run.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["input_ids"] * 0 + 1,
            **prompt.inputs,
            max_new_tokens=choosing.new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, len(prompt.input_ids) :].tolist()
        assert row.tokens == [token for token in new if token != 2]
        assert row.verdicts == output.verdicts


def test_a_picture_that_raises_stops_no_other(run: LoadedRun, flagged: list[bool]) -> None:
    safety_map = run.model.vqguard.safety_map
    policies = {"gun": Policy("raise")}
    run.model.vqguard.safety_map = safety_map.with_judging(policies=policies)
    chosen = [c for c in requests(run, 40) if c[0].pictures]
    rows = asyncio.run(answered(run, chosen, 16))
    raised = [isinstance(row, FlaggedImageError) for row in rows]
    assert 5 < sum(raised) < len(rows) - 2
    alone = asyncio.run(answered(run, chosen, 1))
    for row, other in zip(rows, alone, strict=True):
        assert type(row) is type(other)
        if isinstance(row, Row):
            assert outcome(row) == outcome(other)


def test_a_broken_request_spoils_no_other(run: LoadedRun) -> None:
    chosen = requests(run, 12)
    number = next(n for n, (prompt, _) in enumerate(chosen) if prompt.pictures == 1)
    broken = chosen[number][0]
    ids = [token for token in broken.input_ids if token != run.model.config.image_token_id]
    spoilt = [*chosen]
    spoilt[number] = (replace(broken, input_ids=ids), chosen[number][1])
    rows = asyncio.run(answered(run, spoilt, 16))
    alone = asyncio.run(answered(run, chosen, 1))
    assert isinstance(rows[number], Exception)
    for place, (row, other) in enumerate(zip(rows, alone, strict=True)):
        if place != number:
            assert outcome(row) == outcome(other)


def test_screening_together_as_alone(run: LoadedRun, flagged: list[bool]) -> None:
    async def screened() -> list[Screened]:
        engine = Engine(run, 4, Metrics())
        tickets = []
        for start in range(0, 12, 2):
            pictures = PICTURES[start : start + 2]
            inputs = dict(run.processor.image_processor(images=pictures, return_tensors="pt"))
            ticket: Ticket[Screened] = Ticket()
            engine.line.append(ScreenJob(inputs, 2, ticket, FAR))
            tickets.append(ticket)
        engine.start()
        return await asyncio.gather(*(ticket.result() for ticket in tickets))

    verdicts = [verdict for each in asyncio.run(screened()) for verdict in each.verdicts]
    assert verdicts == run.screen_images(PICTURES)
    assert [verdict.flagged for verdict in verdicts] == flagged


def test_who_waits_too_long_is_told_and_who_left_is_dropped(run: LoadedRun) -> None:
    async def go() -> list[Any]:
        engine = Engine(run, 4, Metrics())
        tickets: list[Ticket[Row]] = [Ticket() for _ in range(3)]
        prompt, choosing = requests(run, 1)[0]
        rows = [Row(choosing, FAR, engine.decode) for _ in range(3)]
        rows[0].deadline = time.monotonic() - 1
        rows[1].cancelled = True
        for row, ticket in zip(rows, tickets, strict=True):
            engine.line.append(AnswerJob(prompt, row, ticket))
        engine.start()
        waited = [ticket.result() for ticket in (tickets[0], tickets[2])]
        told = await asyncio.gather(*waited, return_exceptions=True)
        assert not rows[1].tokens
        return told

    late, answer = asyncio.run(go())
    assert (late.status, late.retry_after) == (503, 10)
    assert isinstance(answer, Row)


def test_a_row_ends_at_its_deadline(run: LoadedRun) -> None:
    row = Row(Choosing(100), time.monotonic() - 1, lambda tokens: "")
    row.add(5, frozenset({2}))
    assert row.end == "length"
