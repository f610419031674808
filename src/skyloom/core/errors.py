"""Every error that skyloom raises on purpose.

SkyloomError          code, message, hint
  ConfigError         wrong file, key or value
  CheckpointError     missing, extra, misshapen or corrupt weights
  MediaError          unreadable, unsupported or a bomb
  RequestError        cannot be made as asked (size, length, model, prompt)
  SafetyError         refused by policy
    UncheckedError    what the policy wants to be checked could not be
  CapacityError       out of memory, disk or queue; `retry_after` in seconds when waiting helps
    DiskFullError     there is no room on a disk
  JobError            cancelled, expired or lost its lease
"""


class SkyloomError(Exception):
    """One sentence with the cause (`message`) and what to do next (`hint`)."""

    code = "error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class ConfigError(SkyloomError):
    """A settings file, key or value is wrong."""

    code = "config"


class CheckpointError(SkyloomError):
    """Weights are missing, extra, misshapen or corrupt."""

    code = "checkpoint"


class MediaError(SkyloomError):
    """A picture or video cannot be read or written."""

    code = "media"


class RequestError(SkyloomError):
    """A request cannot be made as asked; `field` names what of it is wrong, where it is one thing."""

    code = "request"

    def __init__(self, message: str, *, hint: str | None = None, field: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.field = field


class SafetyError(SkyloomError):
    """Refused by policy: the rule's name, and from where to where in the text the words stand, or `at` how many seconds
    of a video; `target` says of what: the "prompt", the "input" (what it starts from) or the "output" (made frames)."""

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
        self.rule, self.span, self.at, self.target = rule, span, at, target


class UncheckedError(SafetyError):
    """What the policy wants to be checked could not be: a refusal, whatever it would have shown."""

    code = "unchecked"


class CapacityError(SkyloomError):
    """Memory, disk or queue is exhausted."""

    code = "capacity"

    def __init__(
        self, message: str, *, hint: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class DiskFullError(CapacityError):
    """A disk is full; what was being written is not there, and may be tried again after a minute."""

    code = "disk_full"

    def __init__(
        self, message: str, *, hint: str | None = None, retry_after: float | None = 60.0
    ) -> None:
        super().__init__(message, hint=hint, retry_after=retry_after)


class JobError(SkyloomError):
    """A job was cancelled, expired or lost its lease."""

    code = "job"
