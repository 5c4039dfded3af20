"""Shared models of the recipes' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from vqguard.adapters import build_guard, guard_model
from vqguard.recipes.image_batches import collect_features
from vqguard.recipes.recipe import Stage1Recipe, Stage2Recipe
from vqguard.recipes.tiny.model import TinySizes, build_model, build_processor, build_tokenizer
from vqguard.safety_map import SafetyMap

SIZES = TinySizes(
    patch_size=32,
    vision_width=24,
    vision_layers=1,
    vision_heads=2,
    vision_mlp=32,
    text_width=24,
    text_layers=1,
    text_heads=2,
    text_mlp=32,
)
MakeModel = Callable[..., tuple[Any, Any]]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """torch with two threads, whatever the test run gives it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_model() -> MakeModel:
    """Makes an untrained model of the world's family, of a size that trains in a second."""

    def make(seed: int = 0) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        model = build_model(SIZES, tokenizer)
        return model.eval(), build_processor(SIZES, tokenizer)

    return make


@pytest.fixture
def small_guarded(small_model: MakeModel) -> MakeModel:
    """Makes the same with a guard of 32 patch codes and 8 semantic codes."""

    def make(seed: int = 0, **options: Any) -> tuple[Any, Any]:
        model, processor = small_model(seed)
        sizes = {"patch_codes": 32, "semantic_codes": 8, "refusal_text": "sorry ."}
        guard_model(model, build_guard(model, **{**sizes, **options}), processor)
        return model, processor

    return make


def noisy_pictures(count: int) -> list[Image.Image]:
    """Pictures whose features are well apart."""
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (count, 1, 1, 3))
    noise = rng.integers(-60, 60, (count, 96, 96, 3))
    return [Image.fromarray(values.astype(np.uint8)) for values in (colours + noise).clip(0, 255)]


def calibrate_on(model: Any, processor: Any, pictures: list[Image.Image]) -> None:
    """Codewords that are features of these pictures, and a map that flags about half of them."""
    guard = model.vqguard
    patches, semantic = collect_features(model, processor, pictures)
    guard.patch.codebook.start_from(patches, "sample")
    guard.semantic.codebook.start_from(semantic, "sample")
    codes = guard.encode_semantic(semantic[:, None]).flatten().tolist()
    toxic = set(sorted(set(codes))[::2])
    counts = torch.tensor([[3, 0] if code in toxic else [0, 3] for code in range(8)])
    guard.safety_map = SafetyMap(("gun",), counts, codebook_checksum=guard.checksum("semantic"))


@pytest.fixture
def small_sizes() -> TinySizes:
    return SIZES


@pytest.fixture
def stage1_recipe() -> Stage1Recipe:
    return Stage1Recipe(
        samples=32, batch=4, learning_rate=1e-3, checkpoint_every=2, revive_every=3, max_length=128
    )


@pytest.fixture
def stage2_recipe() -> Stage2Recipe:
    return Stage2Recipe(samples=32, batch=4, learning_rate=1e-3, checkpoint_every=2, max_length=256)


CHAT_TEMPLATES = yaml.safe_load((Path(__file__).parent / "chat_templates.yaml").read_text())
# Written anew as those of the file; its answers are found by their marks alone.
_ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' ~ message['role'] ~ ' ' }}"
    "{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{%- for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    "{%- for part in message['content'] if part['type'] == 'text' %}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{ '\\n' ~ part['text'] }}{% endgeneration %}"
    "{%- else %}{{ '\\n' ~ part['text'] }}{% endif %}"
    "{%- endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_TEXT = [
    "What is this? A red field. Are you sure? Yes. Which of the two is larger? The first one.",
    "USER: ASSISTANT: system You are a helpful assistant. user assistant Compare with and then",
]
_SPECIAL = {
    "llava-1.5": ["<s>", "</s>", "<image>", "<pad>"],
    "llava-next": [
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<image>",
        "<pad>",
        "<|start_header_id|>",
        "<|end_header_id|>",
    ],
    "qwen2-vl": [
        "<|endoftext|>",
        "<|im_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        "<|im_start|>",
        "<|vision_start|>",
        "<|vision_end|>",
    ],
    "instructblip": ["<s>", "</s>", "<unk>", "<pad>"],
}
_SPECIAL["qwen3-vl"] = _SPECIAL["qwen2.5-vl"] = _SPECIAL["qwen2-vl"]
_SPECIAL["llava-onevision"] = ["<|endoftext|>", "<|im_end|>", "<image>", "<video>", "<|im_start|>"]


def _tokenizer(kind: str) -> Any:
    """A byte-pair tokenizer of the family's sort, trained on a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = _SPECIAL[kind]
    bytewise = kind not in ("llava-1.5", "instructblip")
    core = Tokenizer(models.BPE(byte_fallback=not bytewise, unk_token=None if bytewise else "<s>"))
    if bytewise:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = ["\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(_TEXT, trainer)
    bos = special[0] if "<|endoftext|>" not in special else None
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=special[1],
        pad_token=special[3] if bos else special[0],
        extra_special_tokens={"image_token": "<image>"} if "llava" in kind else {},
    )


@pytest.fixture
def family_processor() -> Callable[[str], Any]:
    """Makes a family's real processor around a small tokenizer, with its chat template."""

    def make(kind: str) -> Any:
        import transformers

        hf: Any = transformers
        tokenizer = _tokenizer(kind)
        template = CHAT_TEMPLATES.get(kind, {}).get("template")
        size = {"height": 32, "width": 32}
        if kind == "llava-1.5":
            images = hf.CLIPImageProcessor(size=size, crop_size=size)
            return hf.LlavaProcessor(
                images,
                tokenizer,
                patch_size=8,
                vision_feature_select_strategy="default",
                num_additional_image_tokens=1,
                chat_template=template,
            )
        if kind == "llava-next":
            tiles = hf.LlavaNextImageProcessor(
                size={"shortest_edge": 32},
                crop_size=size,
                image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
            )
            return hf.LlavaNextProcessor(
                tiles,
                tokenizer,
                patch_size=8,
                vision_feature_select_strategy="default",
                num_additional_image_tokens=1,
                chat_template=template,
            )
        if kind == "instructblip":
            blip = hf.BlipImageProcessor(size=size)
            return hf.InstructBlipProcessor(blip, tokenizer, _tokenizer(kind), num_query_tokens=4)
        if kind == "llava-onevision":
            pinpoints = [[32, 64], [64, 32], [64, 64]]
            return hf.LlavaOnevisionProcessor(
                hf.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints),
                tokenizer,
                hf.LlavaOnevisionVideoProcessor(size=size),
                num_image_tokens=16,
                vision_feature_select_strategy="full",
                chat_template=_ONEVISION,
            )
        options = {"patch_size": 8, "min_pixels": 32 * 32, "max_pixels": 64 * 64}
        images = hf.Qwen2VLImageProcessor(**options)
        if kind == "qwen3-vl":
            edges = {"shortest_edge": 4 * 32 * 32, "longest_edge": 4 * 64 * 64}
            clips = hf.Qwen3VLVideoProcessor(patch_size=8, size=edges)
            return hf.Qwen3VLProcessor(images, tokenizer, clips, chat_template=template)
        cls = hf.Qwen2VLProcessor if kind == "qwen2-vl" else hf.Qwen2_5_VLProcessor
        clips = hf.Qwen2VLVideoProcessor(**options)
        template = CHAT_TEMPLATES["qwen2-vl"]["template"]
        return cls(images, tokenizer, clips, chat_template=template)

    return make
