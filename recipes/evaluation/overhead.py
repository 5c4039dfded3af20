"""What the guard costs at inference: latency, alternately measured, and peak memory."""

from __future__ import annotations

import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from vqguard.adapters import guard_model, load_guarded, unguard_model
from vqguard.adapters.sizes.pictures import open_processor
from vqguard.adapters.storage.reading import load_parts
from vqguard.images import open_image
from vqguard.recipes.data.chat import prompt_text
from vqguard.recipes.data.samples import Question
from vqguard.recipes.evaluation.ledger import Ledger
from vqguard.recipes.processes import python_command
from vqguard.recipes.run import MODEL

_WARM_UP = 3
_PEAK_SCRIPT = (
    "import sys\n"
    "from vqguard.recipes.evaluation.overhead import peak_megabytes, run_once\n"
    "run_once(sys.argv[1], sys.argv[2] == 'guarded', sys.argv[3])\n"
    "print(peak_megabytes())\n"
)


def measure_latency(
    ledger: Ledger, model: Any, processor: Any, question: Question, rounds: int
) -> None:
    """`latency_ratio`: guarded over unguarded, the same weights, in one process.

    Each round times both, one after the other; the record is the median of the rounds' ratios with
    its 95 % interval. `stage` is `prefill` (one forward pass) or `generate` (8 tokens).
    """
    inputs = _inputs(processor, question, model.device)
    guard = model.vqguard

    def prefill() -> None:
        model(**inputs, use_cache=False)

    def generate() -> None:
        model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)

    for stage, work in (("prefill", prefill), ("generate", generate)):
        ratios = []
        for number in range(rounds + _WARM_UP):
            guarded = _seconds(work)
            unguard_model(model)
            plain = _seconds(work)
            guard_model(model, guard, processor)
            if number >= _WARM_UP:
                ratios.append(guarded / plain)
        ledger.median_ratio("latency_ratio", "guarded", ratios, stage=stage, batch=1)


def measure_memory(ledger: Ledger, run: Path, image: Path) -> None:
    """`peak_memory_mb` of a process that loads the model and answers one question."""
    for subject in ("base", "guarded"):
        done = subprocess.run(
            python_command(_PEAK_SCRIPT, str(run), subject, str(image)),
            capture_output=True,
            text=True,
            check=True,
        )
        peak = float(done.stdout.splitlines()[-1])
        ledger.value("peak_memory_mb", subject, peak, 1, stage="load and answer")


def run_once(run: str, guarded: bool, image: str) -> None:
    """Load a run's model, guarded or not, and answer one question about an image."""
    folder = Path(run) / MODEL
    processor = open_processor(folder)
    if guarded:
        model = load_guarded(folder, processor=processor)
    else:
        model = load_parts(folder, None, {}).model
    question = Question(open_image(Path(image)), "What is this?", "")
    with torch.no_grad():
        model.eval().generate(
            **_inputs(processor, question, model.device), max_new_tokens=8, do_sample=False
        )


def peak_megabytes(process: int | None = None) -> float:
    """Peak resident memory of this process, or of another one on Linux, in MB.

    Linux's `VmHWM` where it is: `ru_maxrss` starts at the size of the process that forked.
    """
    try:
        lines = Path(f"/proc/{process or 'self'}/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


@torch.no_grad()
def _seconds(work: Any) -> float:
    _synchronise()
    start = time.perf_counter()
    work()
    _synchronise()
    return time.perf_counter() - start


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _inputs(processor: Any, question: Question, device: torch.device) -> Any:
    text = prompt_text(processor, question.question, picture=True)
    return processor(images=[question.image], text=[text], return_tensors="pt").to(device)
