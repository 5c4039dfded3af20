"""NeMo Guardrails with the rail of `nemo/`: pictures are judged before the model is asked.

VQGUARD=http://127.0.0.1:8000 UPSTREAM=http://127.0.0.1:30000/v1 \\
    python examples/serving/nemo_rails.py photo.png "What is in the image?"
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path
from typing import Any

from nemoguardrails import LLMRails, RailsConfig

HERE = Path(__file__).parent


def main(picture: Path, question: str) -> None:
    config = RailsConfig.from_path(str(HERE / "nemo"))
    if "UPSTREAM" in os.environ:
        config.models[0].parameters["base_url"] = os.environ["UPSTREAM"]
    rails = LLMRails(config)
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": question},
    ]
    answer: Any = rails.generate(messages=[{"role": "user", "content": content}])
    print(f"answer: {answer['content']}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} PICTURE QUESTION")
    main(Path(sys.argv[1]), sys.argv[2])
