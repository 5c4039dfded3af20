"""What the guard costs in vLLM: tokens a second, beside the same engine without it.

    python -m benchmarks.vllm_engine FOLDER --pictures DIR

Two engines, each in a process of its own, serve the guarded folder and the same model without its
guard; they answer the same requests in turn, in alternating order. Prints the medians, their ratio,
and how long the guard and its tower take for the same pictures alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image

from vqguard.adapters import load_guarded, unguard_model
from vqguard.adapters.sizes.pictures import open_processor

BACKEND = {
    True: "VQGuardedTransformersMultiModal",
    False: "TransformersMultiModalForCausalLM",
}
QUESTION = "what is in the image ?"


def engine(folder: Path, pictures: Path, requests: int, tokens: int) -> None:
    """Serve rounds: a line on stdin starts one, a line of JSON on stdout ends it."""
    from vllm import LLM, SamplingParams  # not everybody has it

    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        distributed_executor_backend="uni",
        max_model_len=512,
        max_num_seqs=16,
        mm_processor_cache_gb=0,
        # the same backend for both: vLLM's own class of LLaVA does not know the names that
        # transformers 5 gives a CLIP tower's weights, and a guarded folder's it does not read
        hf_overrides={"architectures": [BACKEND[(folder / "vqguard.json").is_file()]]},
        enable_prefix_caching=False,
    )
    processor = open_processor(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    files = sorted(pictures.glob("*.png"))
    shown = [Image.open(files[i % len(files)]).convert("RGB") for i in range(requests)]
    prompts = [{"prompt": text, "multi_modal_data": {"image": picture}} for picture in shown]
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    print("{}", flush=True)
    for _ in sys.stdin:
        started, used = time.perf_counter(), _processor_seconds()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds, used = time.perf_counter() - started, _processor_seconds() - used
        said = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"rate": said / seconds, "processor": used / said}), flush=True)


def _processor_seconds() -> float:
    """What this process and the engine's own, which are its children, have used."""
    whole = psutil.Process()
    times = [process.cpu_times() for process in (whole, *whole.children(recursive=True))]
    return float(sum(used.user + used.system for used in times))


def alone(folder: Path, pictures: Path, requests: int) -> tuple[float, float]:
    """Seconds for the pictures of a round, one by one: (judge and quantise, the tower in it)."""
    from vqguard.adapters.vllm_engine.judging import PictureJudge  # as the engines

    judge = PictureJudge(folder, "cpu")
    image_processor = open_processor(folder).image_processor
    files = sorted(pictures.glob("*.png"))[:requests]
    batches = [
        dict(image_processor(images=[Image.open(f).convert("RGB")], return_tensors="pt"))
        for f in files
    ]
    unguard: Any = load_guarded(folder, dtype=torch.float32)
    plain = unguard_model(unguard)
    whole: list[float] = []
    tower: list[float] = []
    for _ in range(5):
        for seconds, call in (
            (whole, lambda batch: judge.look(batch, 1)),
            (tower, lambda batch: plain.get_image_features(**batch, return_dict=True)),
        ):
            started = time.perf_counter()
            with torch.no_grad():
                for batch in batches:
                    call(batch)
            seconds.append((time.perf_counter() - started) * requests / len(files))
    return statistics.median(whole), statistics.median(tower)


def unguarded(folder: Path, into: Path) -> Path:
    """The same model and processor without the guard."""
    model = unguard_model(load_guarded(folder, dtype=torch.float32))
    model.save_pretrained(into)
    open_processor(folder).save_pretrained(into)
    return into


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        engine(given.folder, given.pictures, given.requests, given.tokens)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"guarded": given.folder, "unguarded": unguarded(given.folder, Path(scratch))}
        options = ["--pictures", str(given.pictures), "--requests", str(given.requests)]
        options += ["--tokens", str(given.tokens), "--engine"]
        engines = {
            name: subprocess.Popen(
                [sys.executable, "-m", "benchmarks.vllm_engine", str(folder), *options],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name, folder in folders.items()
        }
        try:
            for running in engines.values():
                _line(running)
            rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
            for turn in range(given.rounds + 1):
                for name in sorted(engines, reverse=bool(turn % 2)):
                    assert engines[name].stdin is not None
                    print(file=engines[name].stdin, flush=True)
                    measured = _line(engines[name])
                    rounds[name] += [measured] if turn else []  # the first warms up
        finally:
            for running in engines.values():
                running.terminate()
    said = given.requests * given.tokens
    for name, measured in rounds.items():
        rates = [measure["rate"] for measure in measured]
        used = statistics.median(measure["processor"] for measure in measured) * said
        print(
            f"{name}: {statistics.median(rates):.0f} tokens a second ({min(rates):.0f} to "
            f"{max(rates):.0f}), {used:.2f} processor seconds a round"
        )
    for what, above, below in (
        ("tokens a second", "guarded", "unguarded"),
        ("tokens a processor second", "unguarded", "guarded"),
    ):
        key = "rate" if what == "tokens a second" else "processor"
        ratios = [a[key] / b[key] for a, b in zip(rounds[above], rounds[below], strict=True)]
        print(f"guarded / unguarded, {what}: {_shown(ratios)}")
    whole, tower = alone(given.folder, given.pictures, given.requests)
    print(f"its pictures alone, together: {whole:.3f} s, of which the tower {tower:.3f} s")
    print(f"load {os.getloadavg()[0]:.1f}, {os.cpu_count()} processors")


def _shown(ratios: list[float]) -> str:
    """`median (quartiles)`."""
    if len(ratios) < 2:
        return f"{ratios[0]:.3f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _line(running: subprocess.Popen[str]) -> Any:
    """The next line of an engine that is JSON: vLLM prints others."""
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise SystemExit("an engine ended; see above")


if __name__ == "__main__":
    main()
