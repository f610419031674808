"""Every error that skyloom raises on purpose.

SkyloomError          code, message, hint
  ConfigError         a settings file, key or value is invalid
  CheckpointError     weights are missing, unexpected, of the wrong shape or corrupt
  DownloadError       a file of a model could not be downloaded
    GatedError        the owners of a repository want their conditions to be accepted first
  MediaError          a picture or video is unreadable, unsupported or a decompression bomb
  RequestError        a request parameter is invalid
  SafetyError         content was blocked by the policy
    UncheckedError    a required moderation check could not run
  CapacityError       memory, disk or queue is exhausted
    DiskFullError     a disk is full
  NumericsError       a network returned values that are not finite
  QueueError          the job queue rejected an operation
"""


class SkyloomError(Exception):
    """Base class: one sentence with the cause (`message`) and what to do next (`hint`)."""

    code = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class ConfigError(SkyloomError):
    """A settings file, key or value is invalid."""

    code = "config"


class CheckpointError(SkyloomError):
    """Weights are missing, unexpected, of the wrong shape or corrupt."""

    code = "checkpoint"


class DownloadError(SkyloomError):
    """A file of a model could not be downloaded.

    transient: another try may succeed, after `retry_after` seconds if the server named a time.
    """

    code = "download"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        transient: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.transient = transient
        self.retry_after = retry_after


class GatedError(DownloadError):
    """The owners of a repository want their conditions to be accepted first, on its page."""

    code = "gated"


class MediaError(SkyloomError):
    """A picture or video could not be read or written."""

    code = "media"


class RequestError(SkyloomError):
    """A request is invalid; `field` is the name of the wrong parameter, if there is only one."""

    code = "request"

    def __init__(self, message: str, *, hint: str | None = None, field: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field


class SafetyError(SkyloomError):
    """Content was blocked by the policy.

    `rule` is the name of the rule, `span` the first and last character of the matching text, `at`
    the time in a video in seconds. `target` is what was blocked: "prompt", "input" (a source file)
    or "output" (generated frames).
    """

    code = "safety"

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        rule: str | None = None,
        span: tuple[int, int] | None = None,
        at: float | None = None,
        target: str = "prompt",
    ) -> None:
        super().__init__(message, hint=hint)
        self.rule = rule
        self.span = span
        self.at = at
        self.target = target


class UncheckedError(SafetyError):
    """A required moderation check could not run; the request fails closed."""

    code = "unchecked"


class CapacityError(SkyloomError):
    """Memory, disk or queue is exhausted; `retry_after` in seconds if waiting may help."""

    code = "capacity"

    def __init__(
        self, message: str, *, hint: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class DiskFullError(CapacityError):
    """A disk is full; the unfinished file was removed."""

    code = "disk_full"

    def __init__(
        self, message: str, *, hint: str | None = None, retry_after: float | None = 60.0
    ) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)


class NumericsError(SkyloomError):
    """A network returned NaN or infinite values."""

    code = "numerics"


class QueueError(SkyloomError):
    """The job queue rejected an operation: unknown job, wrong state or lost lease."""

    code = "job"
