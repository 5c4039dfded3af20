"""What every application here has: errors in one form, moderations, health, metrics, the door."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from vqguard.recipes.serving.door.admission import Admission, App
from vqguard.recipes.serving.door.request_log import FACTS, RequestLog
from vqguard.recipes.serving.guardrail import guardrail
from vqguard.recipes.serving.moderation import moderate
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.guardrail import GuardrailReply, GuardrailRequest
from vqguard.recipes.serving.wire.refusals import ErrorReply, RequestError
from vqguard.recipes.serving.wire.replies import Health, ModerationReply
from vqguard.recipes.serving.wire.schema import ModerationRequest
from vqguard.version import __version__

CHAT, MODERATIONS, MODELS = "/v1/chat/completions", "/v1/moderations", "/v1/models"
HEALTH, METRICS = "/health", "/metrics"
LITELLM = "/beta/litellm_basic_guardrail_api"
PATHS = frozenset({CHAT, MODERATIONS, MODELS, HEALTH, METRICS, LITELLM})

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorReply, "description": "The request cannot be served; it says why."},
    404: {"model": ErrorReply, "description": "No such model."},
    408: {"model": ErrorReply, "description": "The body took too long."},
    413: {"model": ErrorReply, "description": "Larger than a limit allows."},
    422: {"model": ErrorReply, "description": "Not used: a request of another form is a 400."},
    429: {"model": ErrorReply, "description": "Too many wait; `Retry-After` says how long."},
    503: {"model": ErrorReply, "description": "The server stops, or the model was too slow."},
}
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def new_app(service: Service, description: str, lifespan: Lifespan | None = None) -> FastAPI:
    """An application with the routes that all have; the model's thread lives as long as it.

    `lifespan`: what else does.
    """

    @asynccontextmanager
    async def lives(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        if lifespan is None:
            yield
        else:
            async with lifespan(app):
                yield
        await service.stop()

    app = FastAPI(
        title="vqguard",
        version=__version__,
        description=description,
        lifespan=lives,
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _bug)

    @app.post(MODERATIONS, responses=ERRORS)
    async def moderations(body: ModerationRequest, request: Request) -> ModerationReply:
        """Judge pictures without an answer."""
        return await moderate(service, body, request.receive, request.scope[FACTS])

    @app.post(LITELLM, responses=ERRORS)
    async def litellm(body: GuardrailRequest, request: Request) -> GuardrailReply:
        """Judge pictures for a LiteLLM proxy."""
        return await guardrail(service, body, request.receive, request.scope[FACTS])

    @app.get(HEALTH, responses={503: ERRORS[503]})
    async def health() -> Health:
        """200 while requests are answered."""
        if not service.engine.alive:
            raise RequestError(503, "the model's thread has ended", code="unhealthy")
        version = service.engine.safety_map.version
        return Health(status="ok", model=service.name, map_version=version)

    @app.get(METRICS, response_class=Response)
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    return app


def behind_the_door(app: FastAPI, service: Service, paths: frozenset[str] = PATHS) -> App:
    """The application as it is served: requests are let in one by one and written down.

    `paths` are named in the metrics.
    """
    return RequestLog(Admission(app, service.limits, service.metrics), service.metrics, paths)


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
