"""Guarded folders, and engines that serve them: skipped where vLLM is not installed."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vqguard.adapters import build_guard, guard_model, visual_features
from vqguard.adapters.proof.random_models.build import build_tiny
from vqguard.adapters.sizes.pictures import open_processor
from vqguard.recipes.tiny.weights import load_base
from vqguard.recipes.tiny.world import TinyWorld
from vqguard.safety_map import SafetyMap

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: what it logs and raises is seen
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
BACKEND = "VQGuardedTransformersMultiModal"
WHY = "vLLM is not installed: `make test-vllm` has it in a virtual environment of its own"
MakeEngine = Callable[..., Any]
ALONE = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.alone,
    pytest.mark.skipif(find_spec("vllm") is None, reason=WHY),
]
"""Marks of tests that start engines in processes of their own."""


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Scenes of the embedded world, half of them with a toxic object."""
    world = TinyWorld()
    toxic = [
        image for category in world.categories[:4] for image in world.toxic_images(category, 0, 6)
    ]
    neutral = world.neutral_images((1, 3), len(toxic))
    return [image for pair in zip(toxic, neutral, strict=True) for image in pair]


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory, pictures: list[Image.Image]) -> Path:
    """llava-tiny as it ships, with codewords of the pictures' own; about half are flagged."""
    model, processor = load_base()
    guard = build_guard(
        model,
        patch_codes=512,
        semantic_codes=16,
        search="torch",
        refusal_text="sorry , i cannot help with that .",
    )
    inputs = processor(images=pictures, text=["<image>"] * len(pictures), return_tensors="pt")
    guard_model(model, guard, processor)
    _calibrate(model, inputs)
    folder = tmp_path_factory.mktemp("llava")
    model.save_pretrained(folder, processor=processor)
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-VL with deep-stack, of heads that vLLM's kernels for CPUs take."""
    return make_qwen(tmp_path_factory.mktemp("qwen"), "qwen3_vl")


def make_qwen(folder: Path, kind: str) -> Path:
    """A random guarded model of one of Qwen's families, with a processor of a few words."""
    # transformers' processors of these families need torchvision, which only this needs
    from transformers import AutoProcessor  # noqa: F401
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

    newer = kind == "qwen3_vl"
    model = build_tiny(
        kind,
        text_config__rope_parameters__mrope_section=[6, 5, 5],
        vision_config__patch_size=16,
        **(_QWEN3 if newer else _QWEN2_5),
    )
    sizes = {"shortest_edge": 64 * 64, "longest_edge": 128 * 128}
    vision = model.config.vision_config
    shape = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
    videos = (Qwen3VLVideoProcessor if newer else Qwen2VLVideoProcessor)(size=sizes, **shape)
    processor = (Qwen3VLProcessor if newer else Qwen2_5_VLProcessor)(
        Qwen2VLImageProcessor(size=sizes, **shape),
        qwen_tokenizer(),
        videos,
        chat_template="{{ messages[0]['content'] }}",
    )
    guard = build_guard(model, patch_codes=64, semantic_codes=8, search="torch")
    guard_model(model, guard, processor, refusal_ids=(9, 8, 7))
    inputs = processor(images=noise(12), text=[_QWEN_IMAGE] * 12, return_tensors="pt", padding=True)
    _calibrate(model, inputs)
    model.save_pretrained(folder, processor=processor)
    return folder


# heads of 32, as vLLM's kernels take them
_QWEN2_5 = {"text_config__hidden_size": 128, "vision_config__out_hidden_size": 128}
_QWEN3 = {
    "text_config__head_dim": 32,
    # transformers always does, vLLM where the configuration says it, as the public ones do
    "text_config__rope_parameters__mrope_interleaved": True,
}
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def qwen_tokenizer() -> Any:
    """A word for each id of a tiny model, `w0` to `w127`, and Qwen's names for its special ones."""
    named = {
        100: "<|image_pad|>",
        101: "<|video_pad|>",
        103: "<|vision_start|>",
        104: "<|vision_end|>",
    }
    words = {named.get(i, f"w{i}"): i for i in range(128)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="w3", eos_token="w2", pad_token="w1"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(named.values())})
    for name in ("image", "video"):
        setattr(tokenizer, f"{name}_token", f"<|{name}_pad|>")
    return tokenizer


def noise(count: int, sides: tuple[int, ...] = (64, 96, 128)) -> list[Image.Image]:
    """Pictures of several sizes whose features are well apart."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        side = sides[i % len(sides)]
        colour = rng.integers(0, 255, (1, 1, 3))
        values = (colour + rng.integers(-60, 60, (side, side, 3))).clip(0, 255)
        made.append(Image.fromarray(values.astype(np.uint8)))
    return made


def _calibrate(model: Any, inputs: Any) -> None:
    """Codewords that are features of these pictures, and a map that flags every second code."""
    guard = model.vqguard
    with torch.no_grad():
        features = visual_features(model, **inputs)
    tokens = torch.cat([unit.reshape(-1, unit.shape[-1]) for unit in features.tokens])
    guard.patch.codebook.start_from(tokens, "sample")
    for level, deep in zip(guard.deep, features.deep, strict=True):
        level.codebook.start_from(torch.cat(list(deep)).reshape(-1, tokens.shape[-1]), "sample")
    guard.semantic.codebook.start_from(features.semantic.flatten(0, 1), "sample")
    codes = guard.encode_semantic(features.semantic).flatten().tolist()
    toxic = set(sorted(set(codes))[::2])
    counts = [[3, 0] if code in toxic else [0, 3] for code in range(guard.config.semantic_codes)]
    guard.safety_map = SafetyMap(
        ("gun",), torch.tensor(counts), codebook_checksum=guard.checksum("semantic")
    )


@pytest.fixture(scope="session")
def start() -> MakeEngine:
    """Starts an engine in this process, in float32; keywords as `vllm.LLM` takes them."""
    if find_spec("vllm") is None:
        pytest.skip(WHY)
    # Before each engine for CPUs vLLM asks all that modules hold for a `__dict__`, and numba's
    # library, which vLLM loads with the first, answers with a function of that name.
    from llvmlite.binding.ffi import _lib_wrapper  # comes with vLLM

    original = _lib_wrapper.__getattr__

    def named(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found: Any = original(self, name)
        return found

    _lib_wrapper.__getattr__ = named

    def make(folder: Path, **options: Any) -> Any:
        from vllm import LLM  # not everybody has it

        settings: dict[str, Any] = {
            "dtype": "float32",
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "max_model_len": 512,
            "max_num_seqs": 16,
            "limit_mm_per_prompt": {"image": 3},
        }
        return LLM(str(folder), **{**settings, **options})

    return make


@pytest.fixture(scope="module")
def engine(start: MakeEngine, llava_folder: Path) -> Any:
    """llava-tiny in vLLM's own class."""
    return start(llava_folder)


@pytest.fixture(scope="module")
def sorted_pictures(
    llava_folder: Path, pictures: list[Image.Image]
) -> tuple[list[Image.Image], list[Image.Image]]:
    """(flagged, others)."""
    # which vLLM's modules are not needed for
    from vqguard.adapters.vllm_engine.judging import PictureJudge

    judge = PictureJudge(llava_folder, "cpu")
    inputs = open_processor(llava_folder).image_processor(images=pictures, return_tensors="pt")
    seen = judge.look(dict(inputs), len(pictures))
    refused = [judge.actions[picture.action].refuses for picture in seen]
    flagged = [image for image, is_flagged in zip(pictures, refused, strict=True) if is_flagged]
    return flagged, [i for i, is_flagged in zip(pictures, refused, strict=True) if not is_flagged]


@pytest.fixture
def flagged(sorted_pictures: tuple[list[Image.Image], list[Image.Image]]) -> Image.Image:
    return sorted_pictures[0][0]


@pytest.fixture
def clean(sorted_pictures: tuple[list[Image.Image], list[Image.Image]]) -> Image.Image:
    return sorted_pictures[1][0]
