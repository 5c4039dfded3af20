"""Verdicts as a column of a Hugging Face dataset, by `datasets.map`.

python examples/screen_a_dataset.py runs/llava-tiny my-folder-of-images
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from datasets import Image, load_dataset

from vqguard.recipes.run import open_run
from vqguard.recipes.screening.judging import PictureJudge, ReadFile, word_of


def main(run: Path, folder: Path) -> None:
    """Print how many rows have which verdict."""
    judge: PictureJudge[ReadFile] = PictureJudge(open_run(run))

    def verdicts(batch: dict[str, Any], rows: list[int]) -> dict[str, list[str]]:
        files = [
            ReadFile(f"row {row}", cell["bytes"] or Path(cell["path"]).read_bytes())
            for row, cell in zip(rows, batch["image"], strict=True)
        ]
        return {"verdict": [word_of(result) for _, result in judge(files)]}

    dataset = load_dataset("imagefolder", data_dir=str(folder), split="train")
    # vqguard decodes the pictures, within its limits
    encoded = dataset.cast_column("image", Image(decode=False))
    judged = encoded.map(verdicts, batched=True, with_indices=True)
    for word in sorted(set(judged["verdict"])):
        print(f"{word}: {list(judged['verdict']).count(word)}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} RUN FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
