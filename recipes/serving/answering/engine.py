"""The model's thread: requests wait in line, and those of one kind are answered together.

While a batch is answered others arrive, so batches grow with the load and nobody waits for
companions. A row's answer is sent when it has ended, not when its batch has.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from vqguard.adapters.registry import get_adapter
from vqguard.recipes.data.encoding import joined_inputs
from vqguard.recipes.run import LoadedRun
from vqguard.recipes.serving.answering.codes import picture_codes
from vqguard.recipes.serving.answering.jobs import AnswerJob, Job, Screened, ScreenJob
from vqguard.recipes.serving.answering.rows import OwnChoices, Row, RowEnds, take
from vqguard.recipes.serving.answering.served_map import ServedMap
from vqguard.recipes.serving.audit import AuditLog
from vqguard.recipes.serving.metrics import Metrics
from vqguard.recipes.serving.wire.refusals import RequestError
from vqguard.safety_map import SafetyMap, Verdict


class Engine:
    """A guarded model in a thread of its own."""

    def __init__(
        self,
        run: LoadedRun,
        batch: int,
        metrics: Metrics,
        *,
        audit: AuditLog | None = None,
        shadow: bool = False,
    ) -> None:
        """`batch`: jobs that go together at most; `shadow`: judge, and act on nothing.

        Raises:
            ArtefactError: the run has no safety map.
        """
        self.model = run.model
        self.tokenizer = run.processor.tokenizer
        self.metrics = metrics
        self.most = batch
        self.audit = audit
        self._map = ServedMap(run.model, run.processor, shadow=shadow)
        self._adapter = get_adapter(run.model)
        config = self._adapter.generation_config(run.model)
        self.ends = frozenset(_numbers(config.eos_token_id))
        """Tokens that end an answer."""
        self.pad = next(iter(_numbers(config.pad_token_id)), next(iter(self.ends), 0))
        """The token that fills rows up."""
        self._images = frozenset(
            number
            for name in self._adapter.placeholders["image"]
            for number in _numbers(getattr(run.model.config, name, None))
        )
        self._left = not getattr(run.model.config, "is_encoder_decoder", False)
        self.line: deque[Job] = deque()
        """Who waits, the first one first."""
        self._changed = threading.Condition()
        self._model = threading.Lock()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="vqguard-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread once the jobs in line are done."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether jobs are being done."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """Jobs in line."""
        return len(self.line)

    @property
    def safety_map(self) -> SafetyMap:
        """The map that judges."""
        return self._map.current

    def use_map(self, safety_map: SafetyMap) -> None:
        """Judge by another map from the next batch on.

        Raises:
            ChecksumError: it was made for other codewords.
            ConfigError: one of its texts has no tokens.
        """
        with self._model:
            self._map.use(safety_map)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def submit(self, job: Job) -> None:
        """Put a job at the end of the line.

        Raises:
            RequestError: 503 where the server is stopping.
        """
        with self._changed:
            if self._stopping:
                raise _stopped()
            self.line.append(job)
            self.metrics.waiting.set(len(self.line))
            self._changed.notify()

    def _work(self) -> None:
        jobs: list[Job] = []
        error: Exception = _stopped()
        try:
            while jobs := self._next():
                with self._model:
                    self._do(jobs)
        except Exception as bug:
            error = bug
        finally:  # whatever ended the thread, nobody waits for ever
            with self._changed:
                self._stopping = True
                for job in (*jobs, *self.line):
                    job.ticket.fail(error)
                self.line.clear()

    def _next(self) -> list[Job]:
        """The first in line and others of its kind; none when the server stops."""
        with self._changed:
            while True:
                self._drop()
                if self.line or self._stopping:
                    break
                self._changed.wait()
            if not self.line:
                return []
            kind = self.line[0].kind
            chosen = [job for job in self.line if job.kind == kind][: self.most]
            self.line = deque(job for job in self.line if job not in chosen)
            self.metrics.waiting.set(len(self.line))
        self.metrics.batch.observe(len(chosen))
        return chosen

    def _drop(self) -> None:
        """Take jobs out of the line that nobody waits for, and those that waited too long."""
        now = time.monotonic()
        for job in [job for job in self.line if job.deadline < now and not job.cancelled]:
            job.ticket.fail(
                RequestError(
                    503, "waited too long for the model; try again", code="timeout", retry_after=10
                )
            )
        self.line = deque(job for job in self.line if not job.cancelled and job.deadline >= now)

    def _do(self, jobs: list[Job]) -> None:
        """Do jobs together; where that fails, in halves, so that one spoils no other."""
        try:
            answers = [job for job in jobs if isinstance(job, AnswerJob)]
            if answers:
                self._answer(answers)
            else:
                self._screen([job for job in jobs if isinstance(job, ScreenJob)])
        except Exception as error:
            left = [job for job in jobs if not _ended(job)]
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            if len(jobs) == 1:
                jobs[0].ticket.fail(error)
                return
            for job in [job for job in left if _was_told(job)]:
                job.ticket.fail(error)
                left.remove(job)
            for job in left:
                if isinstance(job, AnswerJob):
                    job.row.tokens.clear()
            half = (len(left) + 1) // 2
            for part in (left[:half], left[half:]):
                if part:
                    self._do(part)

    def _answer(self, jobs: list[AnswerJob]) -> None:
        rows = [job.row for job in jobs]
        tickets = {id(job.row): job.ticket for job in jobs}
        version = self.safety_map.version
        ids = [job.prompt.input_ids for job in jobs]
        longest = max(map(len, ids))
        # A row's own first token, hidden by the mask: what counts a prompt's tokens (a penalty for
        # repetition) counts none that is not there.
        fillers = [self.pad if row[0] in self._images else row[0] for row in ids]
        gaps = [[filler] * (longest - len(row)) for row, filler in zip(ids, fillers, strict=True)]
        pairs = list(zip(ids, gaps, strict=True))
        padded = torch.tensor([[*g, *r] if self._left else [*r, *g] for r, g in pairs])
        masks = [([0] * len(g), [1] * len(r)) for r, g in pairs]
        mask = torch.tensor([[*z, *o] if self._left else [*o, *z] for z, o in masks])
        others = joined_inputs(
            [job.prompt.example() for job in jobs], {"input_ids"}, left=self._left
        )
        inputs = {"input_ids": padded, "attention_mask": mask, **others}

        def told(row: Row, token: int | None) -> None:
            ticket = tickets[id(row)]
            if token is not None:
                ticket.tell(token)
            else:
                ticket.finish(row)

        def begun() -> None:
            self._give_verdicts(jobs, self.model.last_verdicts, version)

        ends = RowEnds(rows, self.ends, told, begun)
        output = self.model.generate(
            **{name: value.to(self.model.device) for name, value in inputs.items()},
            max_new_tokens=max(row.choosing.new_tokens for row in rows),
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad,
            logits_processor=LogitsProcessorList([OwnChoices(rows)]),
            stopping_criteria=StoppingCriteriaList([ends]),
            return_dict_in_generate=True,
        )
        if not ends.begun:  # every row refused, and the model did not run
            self._give_verdicts(jobs, output.verdicts, version)
            start = output.sequences.shape[1] - _new_tokens(output, longest, self._left)
            for row, said in zip(rows, output.sequences[:, start:].tolist(), strict=True):
                for token in said:
                    take(row, token, self.ends, told)
        for row in rows:
            if row.end is None:
                row.end = "stop"
                told(row, None)
        self.metrics.tokens.inc(sum(len(row.tokens) for row in rows))

    def _give_verdicts(
        self, jobs: Sequence[AnswerJob], verdicts: list[Verdict], version: str
    ) -> None:
        """Each row its pictures' verdicts.

        Raises:
            RuntimeError: the family judges in units that cannot be told apart by row; then they are
                answered one by one.
        """
        counts = [job.prompt.pictures for job in jobs]
        if len(jobs) == 1:
            counts = [len(verdicts)]
        if sum(counts) != len(verdicts):
            raise RuntimeError(f"{len(verdicts)} verdicts on {sum(counts)} pictures")
        start = 0
        for job, count in zip(jobs, counts, strict=True):
            job.row.verdicts = verdicts[start : start + count]
            job.row.map_version = version
            start += count
            self._record(job, job.row.verdicts)

    def _record(self, job: Job, verdicts: Sequence[Verdict]) -> None:
        """Count and write down a job's verdicts, once. What cannot be written is not answered."""
        if job.recorded or not verdicts:
            return
        if self.audit is not None:
            origin, shadow = job.origin, self._map.shadow
            try:
                self.audit.write(
                    origin.request, origin.hashes, verdicts, self.safety_map, shadow=shadow
                )
            except OSError as error:
                raise RequestError(
                    503, "the audit log cannot be written", code="audit", retry_after=10
                ) from error
        job.recorded = True
        self.metrics.judged(verdicts)

    def _screen(self, jobs: list[ScreenJob]) -> None:
        examples = [{"input_ids": [], **job.inputs} for job in jobs]
        joined = joined_inputs(examples, {"input_ids"})
        inputs = {name: value.to(self.model.device) for name, value in joined.items()}
        verdicts = self.model.screen(**inputs)
        codes = picture_codes(self.model, inputs) if jobs[0].codes else ()
        if sum(job.pictures for job in jobs) != len(verdicts):
            raise RuntimeError(
                f"{len(verdicts)} verdicts on {sum(j.pictures for j in jobs)} pictures"
            )
        start = 0
        for job in jobs:
            own = slice(start, start + job.pictures)
            start += job.pictures
            self._record(job, verdicts[own])
            job.ticket.finish(Screened(verdicts[own], self.safety_map, codes[own]))


def _stopped() -> RequestError:
    return RequestError(503, "the server is stopping", code="stopping", retry_after=10)


def _ended(job: Job) -> bool:
    return isinstance(job, AnswerJob) and job.row.end is not None


def _was_told(job: Job) -> bool:
    """Whether the client has read a part of the answer, so that it cannot begin again."""
    return isinstance(job, AnswerJob) and job.ticket.streams and bool(job.row.tokens)


def _new_tokens(output: Any, prompt: int, decoder_only: bool) -> int:
    length = int(output.sequences.shape[1])
    return length - prompt if decoder_only else length - 1


def _numbers(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.flatten().tolist()
    return [int(number) for number in value] if isinstance(value, (list, tuple)) else [int(value)]
