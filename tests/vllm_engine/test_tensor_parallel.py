"""Two ranks: each looks up whole features, whatever else is split between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from .conftest import ALONE, noise

pytestmark = ALONE
PROGRAM = """
import json, sys
from pathlib import Path
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, ranks, prompt, told, *files = sys.argv[1:]
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8,
              tensor_parallel_size=int(ranks))
    shown = [{"image": Image.open(file)} for file in files]
    prompts = [{"prompt": prompt, "multi_modal_data": data} for data in shown]
    out = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    Path(told).write_text(json.dumps([list(o.outputs[0].token_ids) for o in out]))
"""


def test_two_ranks_answer_as_one(qwen_folder: Path, tmp_path: Path) -> None:
    """Deep-stack and all. llava-tiny's three heads vLLM does not split, guarded or not."""
    shown, prompt = noise(8), "<|vision_start|> <|image_pad|> <|vision_end|> w11 w12"
    files = [str(tmp_path / f"{i}.png") for i in range(len(shown))]
    for picture, file in zip(shown, files, strict=True):
        picture.save(file)
    program = tmp_path / "serve.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    answers = []
    told = tmp_path / "answers.json"  # engines that stop write to the standard output too
    for ranks in ("1", "2"):
        done = subprocess.run(
            [sys.executable, str(program), str(qwen_folder), ranks, prompt, str(told), *files],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        answers.append(json.loads(told.read_text()))
        told.unlink()
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers[0]}) > 1
