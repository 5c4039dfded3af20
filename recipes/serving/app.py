"""The routes of `vqguard serve`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from vqguard.recipes.serving.chat import chat as answer_chat
from vqguard.recipes.serving.door.admission import Admission, App
from vqguard.recipes.serving.door.request_log import FACTS, RequestLog
from vqguard.recipes.serving.moderation import moderate
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.refusals import ErrorReply, RequestError
from vqguard.recipes.serving.wire.replies import (
    ChatReply,
    Health,
    ModelCard,
    ModelList,
    ModerationReply,
)
from vqguard.recipes.serving.wire.schema import ChatRequest, ModerationRequest
from vqguard.version import __version__

CHAT, MODERATIONS, MODELS = "/v1/chat/completions", "/v1/moderations", "/v1/models"
HEALTH, METRICS = "/health", "/metrics"
PATHS = frozenset({CHAT, MODERATIONS, MODELS, HEALTH, METRICS})

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The request cannot be served; it says why."},
    404: {"model": ErrorReply, "description": "No such model."},
    408: {"model": ErrorReply, "description": "The body took too long."},
    413: {"model": ErrorReply, "description": "Larger than a limit allows."},
    422: {"model": ErrorReply, "description": "Not used: a request of another form is a 400."},
    429: {"model": ErrorReply, "description": "Too many wait; `Retry-After` says how long."},
    503: {"model": ErrorReply, "description": "The server stops, or the model was too slow."},
}
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "The answer."}
}


def make_app(service: Service) -> App:
    """The ASGI application around a service, whose model's thread it starts and stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await service.stop()

    app = FastAPI(
        title="vqguard",
        version=__version__,
        description="A guarded multimodal model, as OpenAI's clients call one.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)

    @app.post(CHAT, response_model=ChatReply, responses={**_ERRORS, **_STREAM})
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation. Refusals are answers that end with `content_filter`."""
        return await answer_chat(service, body, request.receive, request.scope[FACTS])

    @app.post(MODERATIONS, responses=_ERRORS)
    async def moderations(body: ModerationRequest, request: Request) -> ModerationReply:
        """Judge pictures without an answer."""
        return await moderate(service, body, request.receive, request.scope[FACTS])

    @app.get(MODELS)
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[ModelCard(id=service.name, created=service.created)])

    @app.get(MODELS + "/{model}", responses={404: _ERRORS[404], 422: _ERRORS[422]})
    async def model(model: str) -> ModelCard:
        """One model."""
        service.require_model(model)
        return ModelCard(id=service.name, created=service.created)

    @app.get(HEALTH, responses={503: _ERRORS[503]})
    async def health() -> Health:
        """200 while requests are answered."""
        if not service.engine.alive:
            raise RequestError(503, "the model's thread has ended", code="unhealthy")
        version = service.engine.require_map().version
        return Health(status="ok", model=service.name, map_version=version)

    @app.get(METRICS, response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    admitted = Admission(app, service.limits, service.metrics)
    return RequestLog(admitted, service.metrics, PATHS)


async def _refused(_: Request, error: Exception) -> JSONResponse:
    refusal = cast(RequestError, error)
    return JSONResponse(refusal.body(), refusal.status, refusal.headers())


async def _malformed(request: Request, error: Exception) -> JSONResponse:
    problems = cast(RequestValidationError, error).errors()
    problem = next(iter(problems), {"loc": (), "msg": "not a request", "type": "invalid"})
    place = ".".join(str(part) for part in problem["loc"] if part != "body")
    said = f"{place}: {problem['msg']}" if place else str(problem["msg"])
    refusal = RequestError(400, said, code=str(problem["type"]), param=place or None)
    return await _refused(request, refusal)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    known = cast(HTTPException, error)
    refusal = RequestError(known.status_code, str(known.detail), code="http_error")
    answer = await _refused(request, refusal)
    answer.headers.update(known.headers or {})
    return answer


async def _bug(request: Request, error: Exception) -> JSONResponse:
    # It goes on to `RequestLog`, which writes it down.
    return await _refused(request, RequestError(500, "the server failed", code="internal"))
