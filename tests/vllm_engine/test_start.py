"""What an engine does not start with, and what does not open a guarded folder at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vqguard.errors import ConfigError

from .conftest import BACKEND, MakeEngine

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"enable_mm_embeds": True}, "--enable-mm-embeds"),
        ({"mm_processor_kwargs": {"do_resize": False}}, "--mm-processor-kwargs"),
        ({"media_io_kwargs": {"image": {"rgba_background_color": [0, 0, 0]}}}, "--media-io-kwargs"),
        ({"trust_remote_code": True}, "--trust-remote-code"),
        ({"compilation_config": {"cudagraph_mm_encoder": True}}, "cudagraph_mm_encoder"),
        ({"speculative_config": SPECULATIVE}, "speculative decoding"),
        # vLLM itself turns embeddings on for it
        ({"kv_transfer_config": CONNECTOR}, "KV connector|--enable-mm-embeds"),
    ],
)
def test_an_engine_does_not_start_with_a_way_past(
    start: MakeEngine, llava_folder: Path, options: dict[str, Any], named: str
) -> None:
    if "kv_transfer_config" in options:
        from vllm.config import KVTransferConfig  # not everybody has it

        options = {"kv_transfer_config": KVTransferConfig(**options["kv_transfer_config"])}
    # pydantic has it in an error of its own, where it checks the configuration
    with pytest.raises((ConfigError, ValueError), match=named):
        start(llava_folder, **options)


def test_deep_stack_is_refused_where_the_backend_leaves_it_out(
    start: MakeEngine, qwen_folder: Path
) -> None:
    with pytest.raises(Exception, match="later layers"):
        start(qwen_folder, hf_overrides={"architectures": [BACKEND]})


def test_a_folder_that_was_changed_does_not_start(
    start: MakeEngine, llava_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llava_folder, tmp_path / "changed")
    config = folder / "processor_config.json"
    config.write_text(config.read_text().replace('"do_normalize": true', '"do_normalize": false'))
    with pytest.raises(Exception, match="not the file that was saved"):
        start(folder)


def test_another_class_of_vllm_answers_about_no_picture(
    start: MakeEngine, llava_folder: Path, pictures: list[Any]
) -> None:
    """An operator may name one: vLLM opens the weights, whatever they are called."""
    llm = start(llava_folder, hf_overrides={"architectures": ["TransformersMultiModalForCausalLM"]})
    with pytest.raises(Exception, match="did not come through the guard"):
        llm.generate({"prompt": "<image> what", "multi_modal_data": {"image": pictures[0]}})


OPEN = """
import sys
{before}
from vllm import LLM
try:
    LLM(sys.argv[1], dtype="float32", enforce_eager=True, distributed_executor_backend="uni",
        max_model_len=128)
except BaseException as error:
    print("REFUSED", type(error).__name__, str(error)[:300])
else:
    print("OPENED")
"""


@pytest.mark.parametrize(
    ("before", "plugins"),
    [
        ("", "none"),  # vLLM without the plugin
        ("import vqguard, transformers", "none"),  # the package imported, the plugin not loaded
        (
            "import sys; sys.modules['vqguard.adapters.vllm_engine.admission'] = None",
            None,
        ),  # a plugin that fails to import: vLLM logs it and goes on
        (
            "import vllm.v1.engine.input_processor as m; del m.InputProcessor.resolve_watermarking",
            None,
        ),  # a vLLM that has admission in another form
    ],
)
def test_without_the_plugin_a_folder_does_not_open(
    start: MakeEngine, llava_folder: Path, before: str, plugins: str | None
) -> None:
    environment = dict(os.environ)
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    done = subprocess.run(
        [sys.executable, "-c", OPEN.format(before=before), str(llava_folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert "REFUSED" in done.stdout, done.stdout + done.stderr[-2000:]
