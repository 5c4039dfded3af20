"""Retrofit on data of your own, in LLaVA's JSON form.

This example writes forty pictures and their conversations first, so that it runs anywhere; put your
own file and folder in their place. The run is cut to a few steps.

    python examples/retrofit_your_data.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from vqguard.recipes.recipe import load_recipe
from vqguard.recipes.retrofit import retrofit
from vqguard.recipes.tiny.world import TinyWorld


def write_data(folder: Path, count: int = 40) -> tuple[Path, Path]:
    """A LLaVA-format file and its images."""
    images = folder / "images"
    images.mkdir(parents=True)
    entries = []
    for number, sample in enumerate(TinyWorld(seed=5).captions(count)):
        assert sample.image is not None
        sample.image().save(images / f"{number}.png")
        (question, answer), *_ = sample.turns
        entries.append(
            {
                "id": sample.id,
                "image": f"{number}.png",
                "conversations": [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": answer},
                ],
            }
        )
    data = folder / "data.json"
    data.write_text(json.dumps(entries))
    return data, images


def main(folder: Path) -> None:
    data, images = write_data(folder)
    recipe = load_recipe("llava-tiny").override(
        [
            f"data={data}",
            f"images={images}",
            "guard.patch_codes=64",
            "guard.semantic_codes=8",
            "stage1.batch=8",
            "stage2.batch=8",
            "stage1.samples=32",
            "stage2.samples=32",
        ]
    )
    result = retrofit(recipe, folder / "run", command="python examples/retrofit_your_data.py")
    for record in result.records:
        print(f"{record.metric:20} {record.subject:10} {record.value:.3f} (n = {record.n})")
    print(f"report: {result.report_html}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
