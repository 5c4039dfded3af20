"""The routes of `vqguard serve`."""

from __future__ import annotations

from typing import Any

from fastapi import Request, Response

from vqguard.recipes.serving.chat import chat as answer_chat
from vqguard.recipes.serving.common_routes import (
    CHAT,
    ERRORS,
    MODELS,
    PATHS,
    behind_the_door,
    new_app,
)
from vqguard.recipes.serving.door.admission import App
from vqguard.recipes.serving.door.request_log import FACTS
from vqguard.recipes.serving.page.routes import PATHS as PAGE_PATHS
from vqguard.recipes.serving.page.routes import add_page
from vqguard.recipes.serving.page.undefended import Undefended
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.replies import ChatReply, ModelCard, ModelList
from vqguard.recipes.serving.wire.schema import ChatRequest

_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer."}
}


def make_app(service: Service, *, page: bool = False, undefended: Undefended | None = None) -> App:
    """The ASGI application around a service, whose model's thread it starts and stops.

    `page`: with the page to look at it; `undefended`: what answers beside it there.
    """
    app = new_app(service, "A guarded multimodal model, as OpenAI's clients call one.")

    @app.post(CHAT, response_model=ChatReply, responses={**ERRORS, **_STREAM})
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation. Refusals are answers that end with `content_filter`."""
        return await answer_chat(service, body, request.receive, request.scope[FACTS])

    @app.get(MODELS)
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[ModelCard(id=service.name, created=service.created)])

    @app.get(MODELS + "/{model}", responses={404: ERRORS[404], 422: ERRORS[422]})
    async def model(model: str) -> ModelCard:
        """One model."""
        service.require_model(model)
        return ModelCard(id=service.name, created=service.created)

    if page:
        add_page(app, service, undefended)
    return behind_the_door(app, service, PATHS | PAGE_PATHS)
