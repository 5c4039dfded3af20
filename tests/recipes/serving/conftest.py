"""A small guarded model behind the server's application, and pictures that it flags or not."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.recipes.conftest import MakeModel, calibrate_on, noisy_pictures
from vqguard.recipes.run import LoadedRun
from vqguard.recipes.serving.app import make_app
from vqguard.recipes.serving.limits import Limits
from vqguard.recipes.serving.service import Service

QUESTION = "what is it ?"
NAME = "small"
CHAT = "/v1/chat/completions"
PICTURES = noisy_pictures(12)


def data_uri(image: Image.Image, form: str = "PNG") -> str:
    content = io.BytesIO()
    image.save(content, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def asking(*images: Image.Image, question: str = QUESTION, **fields: Any) -> dict[str, Any]:
    """The body of a request that shows pictures and asks about them."""
    shown = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    content = [*shown, {"type": "text", "text": question}]
    return {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 6,
        **fields,
    }


@pytest.fixture
def run(small_guarded: MakeModel) -> LoadedRun:
    model, processor = small_guarded()
    calibrate_on(model, processor, PICTURES)
    return LoadedRun(model, processor)


@pytest.fixture
def flagged(run: LoadedRun) -> list[bool]:
    """Of each of `PICTURES`."""
    verdicts = run.screen_images(PICTURES)
    assert 2 <= sum(v.flagged for v in verdicts) <= len(PICTURES) - 2
    return [verdict.flagged for verdict in verdicts]


Serve = Callable[..., TestClient]


@pytest.fixture
def serve(run: LoadedRun) -> Iterator[Serve]:
    """Starts the application; arguments are limits, but for those of `Service`."""
    with ExitStack() as stack:

        def start(*, reasons: bool = True, fetch: Any = None, **limits: Any) -> TestClient:
            service = Service(run, NAME, Limits(**limits), reasons=reasons, fetch=fetch)
            app: Any = make_app(service)
            client = TestClient(app, raise_server_exceptions=False)
            client.app_state["service"] = service
            stack.enter_context(client)
            return client

        yield start


def service_of(client: TestClient) -> Service:
    service: Service = client.app_state["service"]
    return service
