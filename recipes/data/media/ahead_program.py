"""The process that `ahead.py` starts: it looks at pictures of a folder, a line of names at a time.

    ahead_program.py FOLDER FOLLOW_LINKS DECODE

A line of its input is a JSON list of names. Its answer is a line too: for each name a picture's
width and height, or what is wrong with it, `{"error": class, "text": ...}`.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

from vqguard.errors import InputError
from vqguard.recipes.data.image_roots import FolderRoot


def main(folder: str, follow_links: bool, decode: bool) -> None:
    """Answer until the input ends, as it does when whoever asks has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the other one decides
    root = FolderRoot(Path(folder), follow_links=follow_links)
    for line in sys.stdin.buffer:
        answers = [_answer(root, name, decode) for name in json.loads(line)]
        sys.stdout.write(json.dumps(answers) + "\n")
        sys.stdout.flush()


def _answer(root: FolderRoot, name: str, decode: bool) -> Any:
    try:
        return root.check(name, decode=decode)
    except InputError as error:
        return {"error": type(error).__name__, "text": str(error)}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "True", sys.argv[3] == "True")
