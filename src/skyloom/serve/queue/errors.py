"""Errors of the queue. serve/api/errors.py maps every `code` to an HTTP status.

NotFoundError         no such row, or it belongs to another owner
JobConflictError      the job's status does not allow the verb, or the idempotency key is taken
LostLeaseError        the worker's lease is no longer valid
QueueFullError        the queue holds its maximum number of jobs
QuotaError            the owner has reached a quota
ModelNotHeldError     no worker has the model or the LoRAs of a request
AuthenticationError   the Authorization header has no valid API key
"""

from skyloom.core.errors import CapacityError, QueueError, RequestError, SkyloomError


class NotFoundError(SkyloomError):
    """There is no row with this id, or it belongs to another owner."""

    code = "not_found"

    def __init__(self, kind: str, id: str, *, hint: str | None = None) -> None:
        super().__init__(f"There is no {kind} with the id {id!r:.100}.", hint=hint)
        self.kind = kind
        self.id = id


class JobConflictError(QueueError):
    """The job's status does not allow this, or an idempotency key belongs to another request."""

    code = "job_conflict"


class LostLeaseError(QueueError):
    """The worker's lease has ended: another token is valid, or the job has left the worker."""

    code = "lost_lease"


class QueueFullError(CapacityError):
    """The queue holds `limit` jobs, which is its maximum."""

    def __init__(self, message: str, *, hint: str, retry_after: float, limit: int) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)
        self.limit = limit


class QuotaError(CapacityError):
    """An owner has reached a quota. `quota` is its name in QUOTAS, `limit` its value.

    `retry_after` is None where waiting does not help.
    """

    code = "quota"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        retry_after: float | None = None,
        quota: str = "",
        limit: float = 0,
    ) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)
        self.quota = quota
        self.limit = limit


class ModelNotHeldError(RequestError):
    """No live worker has the model, or the LoRAs, of a request. `field` is "model" or "loras"."""

    code = "model_not_held"


class AuthenticationError(SkyloomError):
    """The API key is missing, invalid or expired.

    `code` is missing_api_key, invalid_api_key or expired_api_key.
    """

    code = "invalid_api_key"

    def __init__(self, message: str, code: str = code) -> None:
        super().__init__(message)
        self.code = code
