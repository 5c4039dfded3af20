"""Train a LoRA adapter of PEFT over a guarded model and share the two without the base.

python examples/lora_on_a_guarded_model.py [FOLDER]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from vqguard import build_guard, guard_model, load_guarded, save_guard_only
from vqguard.recipes.data.encoding import Collator, EncodedSamples
from vqguard.recipes.tiny.weights import load_base
from vqguard.recipes.tiny.world import TinyWorld


def main(folder: Path) -> None:
    torch.manual_seed(0)
    base: Any
    base, processor = load_base()
    guard_model(base, build_guard(base, patch_codes=64, semantic_codes=8), processor)

    # The language model's layers only: the vision encoder and the guard stay as they are.
    target = r".*language_model.*\.(q_proj|v_proj)"
    model: Any = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=target))
    samples = EncodedSamples(TinyWorld(seed=3).instructions(16), processor, 256)
    batch = Collator(processor.tokenizer.pad_token_id)([samples[i] for i in range(16)])
    batch = {name: value for name, value in batch.items() if not name.startswith("caption")}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    losses = []
    for _ in range(6):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss: {losses[0]:.3f}, then {losses[-1]:.3f}")

    save_guard_only(model, folder, "llava-tiny", processor=processor)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    again = load_guarded(folder)  # llava-tiny's own weights, the guard, the adapter merged in
    with torch.no_grad():
        difference = (again(**batch).logits - model.eval()(**batch).logits).abs().max()
    print(f"guard and adapter: {size / 1e6:.2f} MB")
    print(f"largest difference in logits after loading: {difference:.1e}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
