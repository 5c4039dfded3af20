"""What is answered to a request that cannot be served, in the form of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

INVALID, OVERLOADED, INTERNAL = "invalid_request_error", "overloaded_error", "server_error"


class ErrorDetail(BaseModel):
    """What is wrong with a request, or with the server."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    guard: dict[str, Any] | None = None
    """Of a picture whose policy is an error: why."""


class ErrorReply(BaseModel):
    """The body of every answer that is not 200."""

    error: ErrorDetail


class RequestError(Exception):
    """A request that is refused with an HTTP status of its own."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
        guard: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.retry_after = retry_after
        self.guard = guard

    def body(self) -> dict[str, Any]:
        """The answer's JSON."""
        kind = INVALID
        if self.status >= 429:
            kind = OVERLOADED if self.retry_after is not None else INTERNAL
        detail = ErrorDetail(
            message=str(self),
            type=kind,
            param=self.param,
            code=self.code,
            guard=None if self.guard is None else dict(self.guard),
        )
        return {"error": detail.model_dump(exclude={"guard"} if self.guard is None else None)}

    def headers(self) -> dict[str, str]:
        """`Retry-After`, in seconds, where trying again helps."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def too_large(what: str, most: int, param: str | None = None) -> RequestError:
    """413: `what` exceeds a limit."""
    return RequestError(
        413, f"{what}: at most {most:,} are accepted", code="too_large", param=param
    )


def bad_request(
    message: str, code: str = "invalid_value", param: str | None = None
) -> RequestError:
    """400."""
    return RequestError(400, message, code=code, param=param)
