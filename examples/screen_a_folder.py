"""Screen a folder of images with a run's guard and list the flagged ones. No language model runs.

python examples/screen_a_folder.py runs/llava-tiny my-images
"""

from __future__ import annotations

import sys
from pathlib import Path

from vqguard.errors import ImageError
from vqguard.images import iter_images, open_image
from vqguard.recipes.run import open_run


def main(run: Path, folder: Path) -> int:
    """Print a line for each image; the number of flagged ones."""
    loaded = open_run(run)
    flagged = 0
    for path in iter_images(folder):
        try:
            image = open_image(path)
        except ImageError as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        (verdict,) = loaded.screen_images([image])
        flagged += verdict.flagged
        print(f"{path.name}: {verdict.category} (p = {verdict.probability:.2f})")
    print(f"{flagged} flagged")
    return flagged


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} RUN FOLDER")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
