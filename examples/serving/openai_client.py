"""OpenAI's own client on `vqguard serve` or `vqguard gateway`: an answer, a stream and a verdict.

python examples/serving/openai_client.py http://127.0.0.1:8000 photo.png "What is in the image?"
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

from openai import OpenAI


def main(address: str, picture: Path, question: str) -> None:
    client = OpenAI(base_url=f"{address}/v1", api_key="none")
    model = next(iter(client.models.list())).id
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    shown: Any = {"type": "image_url", "image_url": {"url": url}}

    result = client.moderations.create(model="omni-moderation-latest", input=[shown]).results[0]
    names = [name for name, flagged in result.categories.model_dump().items() if flagged]
    print(f"flagged: {result.flagged} {' '.join(names)}".rstrip())

    asked: Any = [{"role": "user", "content": [shown, {"type": "text", "text": question}]}]
    answer = client.chat.completions.create(model=model, messages=asked, max_tokens=32)
    print(f"{answer.choices[0].finish_reason}: {answer.choices[0].message.content}")

    stream = client.chat.completions.create(model=model, messages=asked, max_tokens=32, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    print(f"streamed: {''.join(pieces)}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: python {sys.argv[0]} ADDRESS PICTURE QUESTION")
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
