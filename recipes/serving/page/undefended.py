"""A model without a guard that answers beside the guarded one, on the page alone, and named so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from transformers import LogitsProcessorList, StoppingCriteriaList

from vqguard.errors import ArtefactError
from vqguard.recipes.models import base_model, control_model
from vqguard.recipes.placement import place
from vqguard.recipes.recipe import RetrofitRecipe
from vqguard.recipes.run import RECIPE
from vqguard.recipes.serving.answering.jobs import AnswerJob
from vqguard.recipes.serving.answering.rows import OwnChoices, Row, RowEnds
from vqguard.recipes.serving.answering.streaming import SafeText
from vqguard.recipes.serving.door.request_log import log_bug
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.refusals import RequestError
from vqguard.recipes.serving.wire.replies import server_event

Kind = Literal["base", "control"]


class Undefended:
    """Answers what the guarded model is asked, one question at a time and without a verdict."""

    def __init__(self, model: Any, kind: Kind) -> None:
        """`model`: unguarded, of the served model's vocabulary; `kind`: which one it is."""
        self.model = model
        self.kind = kind
        self._turn = CapacityLimiter(1)

    async def events(
        self, service: Service, job: AnswerJob, facts: dict[str, Any]
    ) -> AsyncIterator[str]:
        """The answer as server-sent events: `{"piece": …}`, then `{"end": …}` or an error."""
        row, ticket = job.row, job.ticket
        work = asyncio.create_task(
            run_sync(partial(self._answer, service, job), limiter=self._turn)
        )
        try:
            safe = SafeText(row.decode, row.choosing.stop)
            async for token in ticket.tokens():
                if piece := safe.add(token):
                    yield server_event({"piece": piece})
            await ticket.result()
            if piece := safe.rest(row.text()):
                yield server_event({"piece": piece})
            facts |= {"answer_tokens": len(row.tokens), "undefended": True}
            yield server_event({"end": row.end})
        except Exception as error:
            log_bug(facts["id"], error)
            failed = RequestError(500, "the undefended model failed", code="internal")
            yield server_event(failed.body())
        finally:
            row.cancelled = True
            work.cancel()

    def _answer(self, service: Service, job: AnswerJob) -> None:
        row, ticket = job.row, job.ticket

        def told(_: Row, token: int | None) -> None:
            if token is not None:
                ticket.tell(token)

        try:
            if row.open:
                self._generate(service, job, RowEnds([row], service.engine.ends, told, _nothing))
            row.end = row.end or "stop"
            ticket.finish(row)
        except Exception as error:
            ticket.fail(error)

    @torch.no_grad()
    def _generate(self, service: Service, job: AnswerJob, ends: RowEnds) -> None:
        ids = torch.tensor([job.prompt.input_ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **job.prompt.inputs}
        self.model.generate(
            **{name: value.to(self.model.device) for name, value in inputs.items()},
            max_new_tokens=job.row.choosing.new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=service.engine.pad,
            logits_processor=LogitsProcessorList([OwnChoices([job.row])]),
            stopping_criteria=StoppingCriteriaList([ends]),
        )


def open_undefended(run: Path, kind: Kind) -> Undefended:
    """The model of a run's directory that answers without a guard, where this process computes.

    Raises:
        ArtefactError: the run has none.
        InputError: the base that its recipe names is not there.
    """
    if kind == "control":
        model = control_model(run)
        if model is None:
            raise ArtefactError(
                f"{run}: no control here. Retrofit with evaluation.finetuned_control=true, or take "
                "--undefended base"
            )
    elif (run / RECIPE).is_file():
        model = base_model(RetrofitRecipe.from_yaml(run / RECIPE))[0].eval()
    else:
        raise ArtefactError(f"{run}: no {RECIPE} here that names a base: name a run's directory")
    return Undefended(place(model), kind)


def _nothing() -> None:
    pass
