"""Errors of the model that are about the request, as a client is told of them."""

from __future__ import annotations

from vqguard.errors import BypassError, FlaggedImageError, InputError
from vqguard.judging.verdict import Reason
from vqguard.recipes.serving.wire.refusals import RequestError, bad_request
from vqguard.recipes.serving.wire.replies import reason_reply


def raise_request_error(error: BaseException, param: str, *, reasons: bool) -> None:
    """Raise what a client is told of an error that is about its request.

    Raises:
        RequestError: 400; nothing is raised for errors of another kind.
    """
    if isinstance(error, FlaggedImageError):
        known = [reason for reason in error.reasons if isinstance(reason, Reason)]
        raise RequestError(
            400,
            "the request shows a picture whose policy is an error",
            code="content_filter",
            param=param,
            guard={"reasons": [reason_reply(reason) for reason in known]} if reasons else None,
        ) from error
    if isinstance(error, InputError | BypassError):
        raise bad_request(str(error), param=param) from error
