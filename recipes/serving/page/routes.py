"""The page's files and the routes that only it calls."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from starlette.responses import RedirectResponse, StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from vqguard.recipes.serving.chat import answer_job
from vqguard.recipes.serving.common_routes import ERRORS
from vqguard.recipes.serving.door.request_log import FACTS
from vqguard.recipes.serving.page.looking import PictureReply, PictureRequest, look
from vqguard.recipes.serving.page.undefended import Kind, Undefended
from vqguard.recipes.serving.service import Service
from vqguard.recipes.serving.wire.schema import ChatRequest

FILES = "/ui"
STATE, PICTURE, UNDEFENDED = f"{FILES}/state", f"{FILES}/picture", f"{FILES}/undefended"
PATHS = frozenset({"/", STATE, PICTURE, UNDEFENDED})
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
"""Of every file of the page: it loads nothing from elsewhere, and is shown inside of nothing."""


class State(BaseModel):
    """What the page says before it is asked anything."""

    model: str
    map_version: str
    shadow: bool
    undefended: Kind | None
    picture_bytes: int
    """Of a file at most; a data URI is a third longer."""
    new_tokens: int


class _Files(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def add_page(app: FastAPI, service: Service, undefended: Undefended | None) -> None:
    """Add the page to an application; `undefended` answers beside the served model, if given."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """Where the page is."""
        return RedirectResponse(f"{FILES}/", headers=HEADERS)

    @app.get(STATE)
    async def state() -> State:
        """What is served."""
        return State(
            model=service.name,
            map_version=service.engine.safety_map.version,
            shadow=service.shadow,
            undefended=None if undefended is None else undefended.kind,
            picture_bytes=service.limits.body_bytes * 3 // 4 - _AROUND,
            new_tokens=service.limits.new_tokens,
        )

    @app.post(PICTURE, responses=ERRORS)
    async def picture(body: PictureRequest, request: Request) -> PictureReply:
        """All that the guard says of a picture."""
        return await look(service, body, request.receive, request.scope[FACTS])

    if undefended is not None:
        _add_undefended(app, service, undefended)
    files: Any = _Files(packages=[("vqguard.recipes.serving.page", "assets")], html=True)
    app.mount(FILES, files)


_AROUND = 4096
"""Bytes of a request around its picture."""


def _add_undefended(app: FastAPI, service: Service, undefended: Undefended) -> None:
    @app.post(UNDEFENDED, responses=ERRORS, response_class=StreamingResponse)
    async def answer(body: ChatRequest, request: Request) -> Response:
        """What the model without a guard answers. Streamed, whatever is asked for."""
        facts = request.scope[FACTS]
        job = await answer_job(service, body.model_copy(update={"stream": True}), facts)
        events = undefended.events(service, job, facts)
        return StreamingResponse(events, media_type="text/event-stream")
