"""LangChain on `vqguard serve` or `vqguard gateway` (pip install langchain-openai).

python examples/serving/langchain_client.py http://127.0.0.1:8000 photo.png "What is in the image?"
"""

from __future__ import annotations

import base64
import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI


def main(address: str, picture: Path, question: str) -> None:
    with urllib.request.urlopen(f"{address}/v1/models") as models:
        name = json.load(models)["data"][0]["id"]
    options: Any = {"base_url": f"{address}/v1", "api_key": "none", "max_tokens": 32}
    model = ChatOpenAI(model=name, **options)
    content = base64.b64encode(picture.read_bytes()).decode()
    asked = HumanMessage(
        content=[
            {"type": "image", "base64": content, "mime_type": "image/png"},
            {"type": "text", "text": question},
        ]
    )
    answer = model.invoke([asked])
    # a refusal is an answer like any other; this tells them apart
    print(f"{answer.response_metadata['finish_reason']}: {answer.text}")
    print(f"streamed: {''.join(chunk.text for chunk in model.stream([asked]))}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(f"usage: python {sys.argv[0]} ADDRESS PICTURE QUESTION")
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
