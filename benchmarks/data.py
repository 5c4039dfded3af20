"""How long a data set of LLaVA's size is checked before training, and in how much memory.

    python benchmarks/data.py --records 665000

writes records in the shape of LLaVA's instruction mix (`llava_v1_5_mix665k.json`: pictures with one
question, with several short ones, with a list of pictures; long conversations without) and pictures
under as many names as it has, then measures, in a process of its own: the check of all records for
llava-tiny, the first batch, and opening what the check has kept. Where two processors may be used a
second process looks at the pictures; memory is that of both.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from vqguard.recipes.data.encoding import Collator, EncodedSamples, pad_id
from vqguard.recipes.data.media.ahead import LookingAhead
from vqguard.recipes.evaluation.overhead import peak_megabytes
from vqguard.recipes.models import base_processor
from vqguard.recipes.recipe import RetrofitRecipe, load_recipe
from vqguard.recipes.run_samples import RunSamples

SECONDS, MEGABYTES = 180, 1000
"""The bars, for 665 000 records on two cores."""
SHAPES = (
    ("short questions", 0.52),
    ("one question", 0.35),
    ("several pictures", 0.07),
    ("text", 0.06),
)
"""Shares of the records; LLaVA's mix has 40 000 conversations of ShareGPT among 665 000."""
NAMES_A_RECORD = 0.53
"""Names of pictures a record: in LLaVA's mix many records show a picture of COCO again."""
SIZES = ((640, 480), (480, 640), (640, 427), (500, 375), (336, 336), (1024, 768))
WORDS = "the a of image what is in this there on left right red small man woman dog sitting".split()
TEXT = " ".join(random.Random(1).choices(WORDS, k=50_000))
BATCH = 16
LLAVA = ("stage1.max_length=2048", "stage2.max_length=2048", "stage2.samples=1000000")
"""Lengths of LLaVA's own training."""


def main() -> None:
    """Write the records, measure, and say whether the bars hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=int, default=665_000)
    parser.add_argument("--folder", type=Path, help="Default: a temporary one.")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "data.json").is_file():
            write_records(folder, options.records)
        command = [sys.executable, __file__, "--measure", "--folder", str(folder)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        size = (folder / "data.json").stat().st_size
    print(f"{options.records:,} records, {size / 1e6:,.0f} MB of JSON, {os.cpu_count()} processors")
    for name, value in found.items():
        print(f"{name:>28}: {value:,.1f}")
    share = options.records / 665_000
    memory = found["peak memory, MB"] + found["its memory, MB"]
    held = found["check, s"] <= SECONDS * share and memory <= MEGABYTES
    print(f"bars ({SECONDS * share:.0f} s, {MEGABYTES} MB): {'held' if held else 'MISSED'}")


def measure(folder: Path) -> dict[str, float]:
    """Seconds of each part, and the process's peak memory in MB."""
    recipe = load_recipe("llava-tiny").override(
        [f"data={folder / 'data.json'}", f"images={folder}", *LLAVA]
    )
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "checked.safetensors").unlink(missing_ok=True)
    found: dict[str, float] = {}
    start, used = time.perf_counter(), time.process_time()
    others: list[float] = []
    with watching_others(others):
        samples = RunSamples(recipe, skip_bad=False)
    found["check, s"] = time.perf_counter() - start
    found["of it on a processor, s"] = time.process_time() - used
    other = resource.getrusage(resource.RUSAGE_CHILDREN)
    found["and the second process, s"] = other.ru_utime + other.ru_stime
    found["its memory, MB"] = sum(others)
    samples.keep_checks(folder / "run")
    found["first batch, s"] = first_batch(recipe, samples)
    start = time.perf_counter()
    again = RunSamples(recipe, skip_bad=False, run=folder / "run")
    found["opened again, s"] = time.perf_counter() - start
    if len(again.instructions) != len(samples.instructions):
        raise RuntimeError("what was kept is not what was found")
    found["samples"] = len(samples.instructions)
    found["peak memory, MB"] = peak_megabytes()
    return found


@contextmanager
def watching_others(megabytes: list[float]) -> Iterator[None]:
    """Inside, the peak memory of each second process is noted when it is ended."""
    close = LookingAhead.close

    def noted(self: LookingAhead) -> None:
        megabytes.append(peak_megabytes(self.pid))
        close(self)

    LookingAhead.close = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        LookingAhead.close = close  # type: ignore[method-assign]


def first_batch(recipe: RetrofitRecipe, samples: RunSamples) -> float:
    """Seconds until a batch of stage 2 is there."""
    start = time.perf_counter()
    processor = base_processor(recipe)
    data = EncodedSamples(samples.instructions, processor, recipe.stage2.max_length)
    Collator(pad_id(processor))([data[number] for number in range(BATCH)])
    return time.perf_counter() - start


def write_records(folder: Path, count: int) -> None:
    """`data.json` and its pictures, which are few files under many names."""
    names = max(1, int(count * NAMES_A_RECORD))
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(names):
        if number % 1000 == 0:
            (folder / f"{number // 1000}").mkdir(exist_ok=True)
            # a file has 65 000 names at most
            for place, size in enumerate(SIZES):
                picture = Image.effect_noise(size, 60).convert("RGB")
                picture.save(folder / f"{number // 1000}" / f"picture{place}.jpg", quality=50)
        source = folder / f"{number // 1000}" / f"picture{number % len(SIZES)}.jpg"
        os.link(source, folder / picture_name(number))
    with (folder / "data.json").open("w") as file:
        for number, record in enumerate(records(count, names)):
            file.write("[" if number == 0 else ",")
            json.dump(record, file)
        file.write("]")


def records(count: int, names: int) -> Iterator[dict[str, Any]]:
    """Seeded records."""
    draw = random.Random(0)
    shares = dict(SHAPES)
    for number in range(count):
        kind = draw.choices(list(shares), list(shares.values()))[0]
        pictures = {"text": 0, "several pictures": draw.randint(2, 4)}.get(kind, 1)
        turns, asked, told = {
            "short questions": (draw.randint(3, 9), 12, 2),
            "one question": (1, 12, 90),
            "several pictures": (2, 20, 40),
            "text": (draw.randint(2, 12), 60, 250),
        }[kind]
        conversation = []
        for turn in range(turns):
            mark = "<image>\n" * pictures if turn == 0 else ""
            conversation += [
                {"from": "human", "value": mark + sentence(draw, asked)},
                {"from": "gpt", "value": sentence(draw, told)},
            ]
        record: dict[str, Any] = {"id": f"{number:012}", "conversations": conversation}
        if pictures:
            shown = [picture_name(draw.randrange(names)) for _ in range(pictures)]
            record["image"] = shown if pictures > 1 else shown[0]
        yield record


def sentence(draw: random.Random, words: int) -> str:
    """Some words, out of a long text; one of twenty is not ASCII."""
    length = 5 * draw.randint(max(1, words // 2), words + words // 2)
    start = draw.randrange(len(TEXT) - length)
    text = TEXT[start : start + length].strip() or "a"
    return f"{text} – déjà vu" if draw.random() < 0.05 else text


def picture_name(number: int) -> str:
    """The name of a picture."""
    return f"{number // 1000}/{number:012}.jpg"


if __name__ == "__main__":
    main()
