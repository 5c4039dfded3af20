"""What the guard costs in vLLM: tokens a second, beside the same engine without it.

    python -m benchmarks.vllm_engine FOLDER --pictures DIR

Three engines, one process each, serve the guarded folder, the same with its judge taken out (which
nothing but this benchmark can do), and the model without its guard. They answer the same requests
in turn, in alternating order. Prints the rounds' medians and the ratios of neighbours, in seconds
of the clock and of the processors, which other work on the machine hardly changes where an engine
has one thread (several wait for one another in loops), and how long the guard and its tower take
for the same pictures alone. `--width` puts a random language model in the place of the folder's
own: beside a tiny one any fixed cost looks large.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.timing import alternate
from vqguard.adapters import (
    build_guard,
    guard_model,
    load_guarded,
    unguard_model,
    visual_features,
)
from vqguard.adapters.sizes.pictures import open_processor
from vqguard.codebooks.quantizer import Quantized
from vqguard.safety_map import SafetyMap

BACKEND = {
    True: "VQGuardedTransformersMultiModal",
    False: "TransformersMultiModalForCausalLM",
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""One process an engine, whose threads nothing binds to the processors of the others."""
QUESTION = "what is in the image ?"


def engine(folder: Path, pictures: Path, requests: int, tokens: int, judged: bool) -> None:
    """Serve rounds: a line on stdin starts one, a line of JSON on stdout ends it."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
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
    if not judged:
        from vqguard.adapters.vllm_engine.processing import judge_for  # imports vLLM

        take_judge_out(judge_for(llm.model_config))
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
        started, used = time.perf_counter(), time.process_time()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds, used = time.perf_counter() - started, time.process_time() - used
        said = sum(len(output.outputs[0].token_ids) for output in outputs)
        assert said == requests * tokens, "a picture is flagged: show clean scenes"
        print(json.dumps({"rate": said / seconds, "processor": used / said}), flush=True)


def take_judge_out(judge: Any) -> None:
    """Leave of a `PictureJudge` what quantises; its verdicts are one that flags nothing."""
    guard = judge._link.guard
    codes = torch.arange(guard.safety_map.cells)[:, None]
    unflagged = next(v for v in guard.safety_map.judge(codes) if not v.flagged)
    guard.regional, guard.safety_map = None, None
    guard.judge_codes = lambda codes, *rest: [unflagged] * len(codes)

    def kept(semantic: torch.Tensor, mask: torch.Tensor | None) -> Quantized:
        codes = torch.zeros(semantic.shape[:-1], dtype=torch.int64)
        return Quantized(semantic, codes, None, None)

    guard._quantise_semantic = kept


def alone(folder: Path, pictures: Path, requests: int) -> dict[int, tuple[float, float]]:
    """Seconds for the pictures of a round, so many at a time: (judge and quantise, its tower)."""
    from vqguard.adapters.vllm_engine.judging import PictureJudge  # as the engines

    judge = PictureJudge(folder, "cpu")
    guarded: Any = load_guarded(folder, dtype=torch.float32)
    plain: Any = unguard_model(guarded)
    files = sorted(pictures.glob("*.png"))
    shown = [Image.open(files[i % len(files)]).convert("RGB") for i in range(requests)]
    image_processor = open_processor(folder).image_processor
    medians = {}
    for size in (1, 16):
        batches = [
            dict(image_processor(images=shown[first : first + size], return_tensors="pt"))
            for first in range(0, requests, size)
        ]

        def look(batches: list[dict[str, Any]] = batches) -> None:
            for batch in batches:
                judge.look(batch, len(batch["pixel_values"]))

        @torch.no_grad()
        def tower(batches: list[dict[str, Any]] = batches) -> None:
            for batch in batches:
                plain.get_image_features(**batch, return_dict=True)

        seconds = alternate({"look": look, "tower": tower}, rounds=5)
        medians[size] = statistics.median(seconds["look"]), statistics.median(seconds["tower"])
    return medians


def widened(folder: Path, into: Path, pictures: Path, width: int, layers: int) -> Path:
    """The folder's tower and tokenizer with a random language model, and a guard of as many codes.

    The patch codebook is made of the pictures' own features, and no code is flagged.
    """
    given: Any = load_guarded(folder, dtype=torch.float32)
    sizes, tower = given.vqguard.config, given.model.vision_tower.state_dict()
    config = copy.deepcopy(given.config)
    config.text_config.update(
        {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64,
            "head_dim": 64,
        }
    )
    torch.manual_seed(0)
    model = type(unguard_model(given))(config).eval()
    model.model.vision_tower.load_state_dict(tower)
    processor = open_processor(folder)
    guard = build_guard(
        model,
        patch_codes=sizes.patch_codes,
        semantic_codes=sizes.semantic_codes,
        judge=sizes.judge,
        refusal_text=sizes.refusal_text,
    )
    guard_model(model, guard, processor)
    shown = [Image.open(path).convert("RGB") for path in sorted(pictures.glob("*.png"))[:64]]
    with torch.no_grad():
        seen = visual_features(model, **processor.image_processor(shown, return_tensors="pt"))
    guard.patch.codebook.start_from(torch.cat(list(seen.tokens)), "sample")
    level = guard.judge_level
    unflagged = torch.tensor([[0, 3]]).repeat(guard.quantizer_of(level).codebook.codes, 1)
    guard.safety_map = SafetyMap(("any",), unflagged, codebook_checksum=guard.checksum(level))
    model.save_pretrained(into, processor=processor)
    return into


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
    parser.add_argument("--width", type=int, help="of a random language model in place of its own")
    parser.add_argument("--layers", type=int, default=12, help="of that language model")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--engine", choices=("judged", "unjudged"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        judged = given.engine == "judged"
        engine(given.folder, given.pictures, given.requests, given.tokens, judged)
        return
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder
        if given.width:
            folder = widened(
                folder, Path(scratch, "guarded"), given.pictures, given.width, given.layers
            )
        plain = unguarded(folder, Path(scratch, "unguarded"))
        served = {
            "guarded": (folder, "judged"),
            "without its judge": (folder, "unjudged"),
            "unguarded": (plain, "judged"),
        }
        options = ["--pictures", str(given.pictures), "--requests", str(given.requests)]
        options += ["--tokens", str(given.tokens)]
        environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(given.threads)}
        program = [sys.executable, "-m", "benchmarks.vllm_engine"]
        engines = {
            name: subprocess.Popen(
                [*program, str(folder), *options, "--engine", judged],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for name, (folder, judged) in served.items()
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
        medians = alone(folder, given.pictures, given.requests)
    said = given.requests * given.tokens
    for name, measured in rounds.items():
        rates = [measure["rate"] for measure in measured]
        seconds = statistics.median(measure["processor"] for measure in measured) * said
        print(
            f"{name}: {statistics.median(rates):.0f} tokens a second ({min(rates):.0f} to "
            f"{max(rates):.0f}), {seconds:.2f} processor seconds a round"
        )
    for name in ("guarded", "without its judge"):
        pairs = list(zip(rounds[name], rounds["unguarded"], strict=True))
        clock = [own["rate"] / plain["rate"] for own, plain in pairs]
        used = [plain["processor"] / own["processor"] for own, plain in pairs]
        print(f"{name} / unguarded, tokens a second: {_shown(clock)}")
        print(f"{name} / unguarded, tokens a processor second: {_shown(used)}")
    for size, (whole, tower) in medians.items():
        print(f"its pictures, {size} at a time: {whole:.3f} s, of which the tower {tower:.3f} s")
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
