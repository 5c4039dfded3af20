"""Screen a folder of images with a run's guard and list the flagged ones. No language model runs.

python examples/screen_a_folder.py runs/llava-tiny my-images
"""

from __future__ import annotations

import sys
from pathlib import Path

from vqguard.errors import ImageError
from vqguard.images import iter_images, open_readings
from vqguard.names import printable
from vqguard.recipes.run import open_run


def left_out(path: Path, reason: str) -> None:
    print(printable(f"skipped: {path}: {reason}"), file=sys.stderr)


def main(run: Path, folder: Path) -> int:
    """Print a line for each image; the number of flagged ones."""
    loaded = open_run(run)
    flagged = 0
    for path in iter_images(folder, left_out):
        try:
            readings = open_readings(path, converted=loaded.converts_to_rgb)
        except ImageError as error:
            print(printable(f"skipped: {error}"), file=sys.stderr)
            continue
        if readings.ambiguous:
            flagged += 1
            print(printable(f"{path.name}: {readings.ambiguous}"))
            continue
        (verdict,) = loaded.screen_images([readings.picture])
        flagged += verdict.flagged
        print(printable(f"{path.name}: {verdict.category} (p = {verdict.probability:.2f})"))
    print(f"{flagged} flagged")
    return flagged


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} RUN FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
