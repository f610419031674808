"""Errors of the API: OpenAI's error object, and the HTTP status of every error code.

Internal details stay in the log: the answer to an unexpected error carries the request id, by which
the log has the rest.
"""

import logging
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from skyloom.core.errors import (
    CapacityError,
    RequestError,
    SafetyError,
    SkyloomError,
    UncheckedError,
)
from skyloom.serve.queue.errors import AuthenticationError, QueueFullError, QuotaError
from skyloom.serve.queue.job import BLOCKED, FAILED
from skyloom.serve.redaction import without_folders

INVALID_REQUEST = "invalid_request_error"
DATABASE_ERRORS = (OperationalError, InterfaceError, TimeoutError)
"""What SQLAlchemy raises when the database is unreachable, full or too busy."""
_MAX_RETRY_SECONDS = 120  # OpenAI's clients wait no longer
_DATABASE_RETRY_SECONDS = "5"
_CLIENT_CLOSED_REQUEST = 499
_SERVER_ERROR = 500
log = logging.getLogger(__name__)

# code of the error -> HTTP status, type, code on the wire
STATUS: Mapping[str, tuple[int, str, str]] = {
    "error": (500, "server_error", "server_error"),
    "config": (500, "server_error", "server_misconfigured"),
    "checkpoint": (503, "server_error", "model_unavailable"),
    "download": (502, "server_error", "model_unavailable"),
    "gated": (403, "permission_error", "model_gated"),
    "media": (400, INVALID_REQUEST, "invalid_media"),
    "request": (400, INVALID_REQUEST, "invalid_value"),
    "model_not_held": (400, INVALID_REQUEST, "model_not_found"),
    "safety": (400, INVALID_REQUEST, "moderation_blocked"),
    "unchecked": (503, "server_error", "moderation_failed"),
    "capacity": (429, "rate_limit_error", "rate_limit_exceeded"),
    "quota": (429, "rate_limit_error", "quota_exceeded"),
    "disk_full": (429, "rate_limit_error", "disk_full"),
    "numerics": (500, "server_error", "server_error"),
    "job": (409, INVALID_REQUEST, "conflict"),
    "not_found": (404, INVALID_REQUEST, "not_found"),
    "job_conflict": (409, INVALID_REQUEST, "conflict"),
    "invalid_api_key": (401, "authentication_error", "invalid_api_key"),
    "lost_lease": (409, INVALID_REQUEST, "conflict"),
}
# field of a Request -> parameter on the wire
PARAMS: Mapping[str, str] = {
    "num_steps": "steps",
    "guidance_scale": "guidance",
    "image": "input_reference",
    "cards": "storyboard",
}


class ApiError(SkyloomError):
    """An error answer: HTTP status, OpenAI's `type`, `code` and `param`, and further headers."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        type: str = INVALID_REQUEST,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.type = type
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error envelope."""
        details = {"type": self.type, "param": self.param, "code": self.code}
        return {"error": {"message": without_folders(self.message), **details}}


def missing(kind: str, id: str, param: str | None = None) -> ApiError:
    """Error 404, the same for an id that does not exist and for one of another owner."""
    return ApiError(404, f"There is no {kind} with the id {id!r:.100}.", "not_found", param=param)


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """Error 400 for a parameter."""
    return ApiError(400, message, code, param=param)


def rate_limit(limit: int, remaining: int) -> dict[str, str]:
    """OpenAI's headers: how many jobs may wait, and how many more."""
    return {
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(remaining),
    }


def to_api_error(error: Exception, request_id: str) -> ApiError:
    """Translate any exception; what is the server's own trouble stays in its log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DATABASE_ERRORS):
        message = "The server's database does not answer, or is full. Try again."
        headers = {"retry-after": _DATABASE_RETRY_SECONDS}
        return ApiError(503, message, "unavailable", type="server_error", headers=headers)
    if not isinstance(error, SkyloomError):
        message = f"The server failed. Its log has more under {request_id}."
        return ApiError(500, message, "server_error", type="server_error")
    if isinstance(error, AuthenticationError):
        headers = {"www-authenticate": "Bearer"}
        return ApiError(
            401, error.message, error.code, type="authentication_error", headers=headers
        )
    status, type, code = STATUS[error.code]
    if status >= _SERVER_ERROR:
        message = f"The server cannot do that now ({request_id})."
        return ApiError(status, message, code, type=type)
    if isinstance(error, QuotaError) and error.quota:
        code = f"{error.quota}_{code}"
    headers = _retry_headers(error, code)
    return ApiError(status, str(error), code, param=_param(error), type=type, headers=headers)


def respond(error: Exception, request_id: str, route: str) -> Response:
    """Log a server error and answer with the envelope. `route`: method and path template."""
    answer = to_api_error(error, request_id)
    fields = {"request_id": request_id, "call": route}
    if isinstance(error, DATABASE_ERRORS):  # one line per request: an outage may be long
        log.warning("the database does not answer", extra=fields)
    elif answer.status >= _SERVER_ERROR:
        log.error("a call failed", exc_info=error, extra=fields)
    return JSONResponse(answer.body, answer.status, answer.headers)


def add_error_handlers(app: FastAPI) -> None:
    """Register handlers for every expected exception; RequestLogMiddleware answers the others."""
    for kind in (SkyloomError, *DATABASE_ERRORS):
        app.add_exception_handler(kind, _on_error)
    app.add_exception_handler(SafetyError, _on_refusal)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameter)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)


def explain_invalid(errors: list[dict[str, Any]]) -> ApiError:
    """Turn the first of pydantic's errors into OpenAI's words, with the name of the parameter."""
    error = errors[0]
    param = _name_param(error["loc"])
    reason = error["msg"].removeprefix("Value error, ").rstrip(".")
    reason = f"{reason[:1].lower()}{reason[1:]}"
    if error["type"] == "missing":
        message = f"Missing required parameter: '{param}'."
        return invalid(param, message, "missing_required_parameter")
    if error["type"].endswith(("_type", "_parsing")) or reason.startswith(
        "expected an object, but"
    ):
        return invalid(param, f"Invalid type for '{param}': {reason}.", "invalid_type")
    return invalid(param, f"Invalid value for '{param}': {reason}.", "invalid_value")


async def _on_error(request: Request, error: Exception) -> Response:
    return respond(error, request.state.request_id, getattr(request.state, "route", "other"))


async def _on_refusal(request: Request, error: Exception) -> Response:
    """Count what the policy refuses, if the database answers."""
    assert isinstance(error, SafetyError)
    services = request.app.state.services
    code = FAILED if isinstance(error, UncheckedError) else BLOCKED
    count = partial(services.jobs.count_refusal, error.rule or "", error.target, code)
    with suppress(CapacityError, *DATABASE_ERRORS):
        await services.limiters["auth"].run("", count)
    return await _on_error(request, error)


async def _on_invalid_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    details = [{**one, "loc": one["loc"][1:]} for one in error.errors()]  # without "query"
    return await _on_error(request, explain_invalid(details))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Answer what Starlette's router refuses."""
    assert isinstance(error, HTTPException)
    code, message = {
        404: ("not_found", "There is nothing at that path."),
        405: ("method_not_allowed", "That path does not take this method."),
    }.get(error.status_code, ("invalid_request", "The request is wrong."))
    headers = error.headers
    return await _on_error(request, ApiError(error.status_code, message, code, headers=headers))


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_CLOSED_REQUEST)  # for the log; the client is gone


def _retry_headers(error: SkyloomError, code: str) -> dict[str, str]:
    """Headers by which OpenAI's clients decide whether and when to try again."""
    if code == "conflict":
        return {"x-should-retry": "false"}  # the state would still be the same
    if not isinstance(error, CapacityError):
        return {}
    if isinstance(error, QuotaError) and error.retry_after is None:
        return {"x-should-retry": "false"}  # waiting does not help
    wait = str(min(_MAX_RETRY_SECONDS, math.ceil(error.retry_after or 10)))
    headers = {"retry-after": wait}
    is_queue = isinstance(error, QueueFullError)
    if is_queue or (isinstance(error, QuotaError) and error.quota == "queued_jobs"):
        headers.update(rate_limit(int(error.limit), 0))
        headers["x-ratelimit-reset-requests"] = f"{wait}s"
    return headers


def _param(error: SkyloomError) -> str | None:
    if isinstance(error, SafetyError):
        return "prompt"
    name = error.field if isinstance(error, RequestError) else None
    return PARAMS.get(name or "", name)


def _name_param(location: tuple[str | int, ...]) -> str:
    """A pydantic location as OpenAI writes it, `cards[0].prompt`, without union members."""
    steps = [step for step in location if isinstance(step, int) or not re.search(r"\W", step)]
    name = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)
    return re.sub(
        r"\.(constrained|function|float|str|int|bool|list|dict)\b.*", "", name.lstrip(".")
    )
