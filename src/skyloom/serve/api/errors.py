"""What a client is told when something cannot be done: OpenAI's error object, and the HTTP status that goes with it.

One table says which status every error of the house has. Nothing internal is told: an error that nobody foresaw has
the request's id, by which the log has the rest.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError

from skyloom.core.errors import CapacityError, RequestError, SafetyError, SkyloomError
from skyloom.serve.queue.errors import AuthenticationError, QueueFullError, QuotaError
from skyloom.serve.redaction import without_folders

INVALID = "invalid_request_error"
_LONGEST_WAIT = 120  # seconds; clients do not wait longer
_AWAY_SECONDS = "5"
AWAY = (OperationalError, InterfaceError, TimeoutError)
"""What a database says that is away, full or too busy."""

# code of the error -> status, type, code that clients see
STATUS: Mapping[str, tuple[int, str, str]] = {
    "error": (500, "server_error", "server_error"),
    "config": (500, "server_error", "server_misconfigured"),
    "checkpoint": (503, "server_error", "model_unavailable"),
    "media": (400, INVALID, "invalid_media"),
    "request": (400, INVALID, "invalid_value"),
    "safety": (400, INVALID, "moderation_blocked"),
    "unchecked": (503, "server_error", "moderation_failed"),
    "capacity": (429, "rate_limit_error", "rate_limit_exceeded"),
    "quota": (429, "rate_limit_error", "quota_exceeded"),
    "disk_full": (429, "rate_limit_error", "disk_full"),
    "job": (409, INVALID, "conflict"),
    "invalid_api_key": (401, "authentication_error", "invalid_api_key"),
    "not_found": (404, INVALID, "not_found"),
    "job_conflict": (409, INVALID, "conflict"),
    "lost_lease": (409, INVALID, "conflict"),
}
# what a Request calls it -> what the wire calls it
PARAMS: Mapping[str, str] = {
    "num_steps": "steps",
    "guidance_scale": "guidance",
    "image": "input_reference",
    "cards": "storyboard",
}


class WireError(SkyloomError):
    """An answer that is not what was asked for: status, type, code, and the parameter that is wrong."""

    code = "fault"

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        param: str | None = None,
        type: str = INVALID,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.wire_code, self.param, self.type = status, code, param, type
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Told:
    """A fault as it goes over the wire."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict[str, str])


def rate_limit(limit: int, remaining: int) -> dict[str, str]:
    """How many jobs may wait, and how many more, in OpenAI's headers."""
    return {
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(remaining),
    }


def missing(what: str, id: str, param: str | None = None) -> WireError:
    """Not there, or somebody else's: the same answer for both."""
    return WireError(404, f"There is no {what} with the id {id!r:.100}.", "not_found", param=param)


def invalid(param: str | None, message: str, code: str = "invalid_value") -> WireError:
    """A parameter that is wrong."""
    return WireError(400, message, code, param=param)


def tell(error: Exception, request_id: str) -> Told:
    """What a client is told of an error."""
    if isinstance(error, WireError):
        return Told(
            error.status,
            _body(error.message, error.type, error.param, error.wire_code),
            error.headers,
        )
    if isinstance(error, AuthenticationError):
        body = _body(error.message, "authentication_error", None, error.code)
        return Told(401, body, {"www-authenticate": "Bearer"})
    if isinstance(error, AWAY):
        message = "The server's database does not answer, or is full. Try again."
        return Told(
            503, _body(message, "server_error", None, "unavailable"), {"retry-after": _AWAY_SECONDS}
        )
    if not isinstance(error, SkyloomError):
        message = f"The server failed. Its log has more under {request_id}."
        return Told(500, _body(message, "server_error", None, "server_error"))
    status, kind, code = STATUS[error.code]
    headers: dict[str, str] = {}
    if status >= 500:  # noqa: PLR2004 - the server's own trouble is in its log; nothing of it is told
        return Told(
            status, _body(f"The server cannot do that now ({request_id}).", kind, None, code)
        )
    if isinstance(error, QuotaError):
        code = f"{error.quota}_{code}" if error.quota else code
    if isinstance(error, QuotaError) and error.retry_after is None:
        headers["x-should-retry"] = "false"  # waiting does not help
    elif isinstance(error, CapacityError):
        wait = headers["retry-after"] = str(min(_LONGEST_WAIT, math.ceil(error.retry_after or 10)))
        if isinstance(error, QueueFullError) or (
            isinstance(error, QuotaError) and error.quota == "queued_jobs"
        ):
            headers |= {**rate_limit(int(error.limit), 0), "x-ratelimit-reset-requests": f"{wait}s"}
    param = error.field if isinstance(error, RequestError) else None
    param = "prompt" if isinstance(error, SafetyError) else param
    if code == "conflict":
        headers["x-should-retry"] = "false"  # the same call again would meet the same state
    return Told(status, _body(str(error), kind, PARAMS.get(param or "", param), code), headers)


def _body(message: str, type: str, param: str | None, code: str) -> dict[str, Any]:
    return {
        "error": {"message": without_folders(message), "type": type, "param": param, "code": code}
    }
