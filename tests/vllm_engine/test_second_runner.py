"""vLLM's second model runner, on the interpreter of Triton's kernels: it forces refusals too.

vLLM starts it on processors only with a build of Triton that PyPI does not have. Its kernels run,
slowly, as Python: what is left to show is that the engine is told that a back end is there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from vqguard.adapters import load_guarded
from vqguard.adapters.sizes.pictures import open_processor

from .conftest import ALONE
from .test_parity import expected, llava_requests

pytestmark = ALONE
PROGRAM = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
from PIL import Image

if sys.argv[1] == "interpreted":
    from triton.backends import backends

    driver = SimpleNamespace(is_active=lambda: True)
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)

from vllm import LLM, SamplingParams

folder, asked, told = map(Path, sys.argv[2:])
try:
    llm = LLM(str(folder), dtype="float32", enforce_eager=True, max_model_len=256,
              distributed_executor_backend="uni", limit_mm_per_prompt={"image": 3})
except Exception as error:
    raise SystemExit(f"REFUSED {error}")
worker = llm.llm_engine.model_executor.driver_worker.worker
prompts = [
    {"prompt": text, "multi_modal_data": {"image": [Image.open(file) for file in files]}}
    for text, files in json.loads(asked.read_text())
]
out = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24), use_tqdm=False)
runner = type(worker.model_runner)
told.write_text(json.dumps([runner.__module__, [list(o.outputs[0].token_ids) for o in out]]))
"""


def serve(
    tmp_path: Path, folder: Path, asked: list[Any], kernels: str
) -> tuple[subprocess.CompletedProcess[str], Path]:
    program, questions, told = (tmp_path / name for name in ("serve.py", "asked", "told"))
    program.write_text(PROGRAM)
    questions.write_text(json.dumps(asked))
    arguments = [sys.executable, str(program), kernels, str(folder), str(questions), str(told)]
    environment = {**os.environ, "VLLM_USE_V2_MODEL_RUNNER": "1"}
    if kernels == "interpreted":
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        arguments, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    return done, told


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_it_answers_and_refuses_as_transformers_do(
    llava_folder: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    processor = open_processor(llava_folder)
    requests = [(text, shown) for text, shown in llava_requests(processor, pictures) if shown][:12]
    model = load_guarded(llava_folder, dtype=torch.float32)
    answers, refused = expected(model, processor, requests)
    assert 2 < refused < 10
    asked: list[tuple[str, list[str]]] = []
    for text, shown in requests:
        files = [str(tmp_path / f"{len(asked)}-{i}.png") for i in range(len(shown))]
        for picture, file in zip(shown, files, strict=True):
            picture.save(file)
        asked.append((text, files))
    done, told = serve(tmp_path, llava_folder, asked, "interpreted")
    assert done.returncode == 0, done.stderr[-3000:]
    runner, given = json.loads(told.read_text())
    assert runner == "vllm.v1.worker.cpu.model_runner"
    assert given == answers


def test_where_it_cannot_run_the_folder_does_not_start(llava_folder: Path, tmp_path: Path) -> None:
    """vLLM's own refusal: it does not take the first runner in its place."""
    if torch.cuda.is_available():
        pytest.skip("Triton runs on this GPU")
    done, told = serve(tmp_path, llava_folder, [], "compiled")
    assert "REFUSED" in done.stderr, done.stderr[-3000:]
    assert not told.exists()
