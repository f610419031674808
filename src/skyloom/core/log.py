"""Logging for the whole package: one set-up, lines for people or JSON lines for machines, always to stderr.

Modules write `log = logging.getLogger(__name__)`; only programs (cli, serve) call `set_up_logging`. Keys, webhook
secrets, and the passwords and queries of URLs are taken out of every line.
"""

import json
import logging
import os
import re
import sys
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal, TextIO

from skyloom.core.errors import ConfigError

ROOT = "skyloom"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_HIDDEN = "[hidden]"
_SECRETS = (
    (re.compile(r"(\b\w[\w+.-]{0,20}://)[^\s/@\"'\\]*@"), rf"\1{_HIDDEN}@"),
    (re.compile(r"(\b\w[\w+.-]{0,20}://[^\s?#\"'<>\\]+)\?[^\s\"'<>\\]*"), rf"\1?{_HIDDEN}"),
    (re.compile(r"\bwhsec_[\w+/=-]+"), f"whsec_{_HIDDEN}"),
    (re.compile(r"\bsk-[\w-]{8,}"), f"sk-{_HIDDEN}"),
    (re.compile(r"\b([Bb]earer\s+)[\w.~+/=-]+"), rf"\1{_HIDDEN}"),
)
_CHILD_LINE = re.compile(r'  File "|Traceback |[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b')
ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def set_up_logging(
    level: str = "info",
    style: Literal["human", "json"] = "human",
    stream: TextIO | None = None,
    *,
    details: bool = True,
) -> logging.Logger:
    """Send the package's log, and warnings of all others, to `stream` (stderr by default); a second call replaces the
    first. Without `details` an exception is logged by its type and where it was raised: its message may quote what a
    client has sent."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(
            f"{level!r} is not a log level.", hint="Use debug, info, warning or error."
        )
    formatter = JsonLines(details=details) if style == "json" else PlainLines(details=details)
    handler, of_others = _Handler(stream or sys.stderr), _Handler(stream or sys.stderr)
    handler.setFormatter(formatter)
    of_others.setFormatter(formatter)
    of_others.setLevel(logging.WARNING)
    logger, root = logging.getLogger(ROOT), logging.getLogger()
    logger.handlers[:] = [handler]
    root.handlers[:] = [*(one for one in root.handlers if not isinstance(one, _Handler)), of_others]
    logger.setLevel(number)
    logger.propagate = False
    threading.excepthook = _log_dead_thread
    return logger


def redact(text: str) -> str:
    """A text without keys, tokens, webhook secrets, and the user, password and query of its URLs."""
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


def describe(error: BaseException) -> str:
    """An exception, and those that led to it, by types and places. Of messages only the system's own are shown."""
    parts: list[str] = []
    seen: set[int] = set()
    waiting = [error]
    while waiting and id(waiting[-1]) not in seen:
        found = waiting.pop()
        seen.add(id(found))
        frames = "".join(traceback.format_tb(found.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{_name(found)}")
        before = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
        waiting += [one for one in (*getattr(found, "exceptions", ()), before) if one is not None]
    return "\n\nled to\n\n".join(reversed(parts))


def describe_output(text: str) -> str:
    """What a program wrote before it failed: the places and types of its tracebacks, and no messages."""
    kept = [found for line in text.splitlines() if (found := _CHILD_LINE.match(line))]
    return "\n".join(
        line.string if line[0].startswith("  File") else line[0].strip() for line in kept
    )


class _Handler(logging.StreamHandler[TextIO]):
    """A handler of `set_up_logging`."""


class PlainLines(logging.Formatter):
    """One line for people per record, then the traceback."""

    def __init__(self, *, details: bool = True) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
        self._details = details

    def format(self, record: logging.LogRecord) -> str:
        """The record, without secrets."""
        record.exc_text = None  # another handler may have written it with its messages
        text = redact(super().format(record))
        record.exc_text = None
        return text

    def formatException(self, ei: ExcInfo) -> str:  # noqa: N802 - logging's name
        """The traceback, with messages or without."""
        return super().formatException(ei) if self._details or ei[1] is None else describe(ei[1])


class JsonLines(PlainLines):
    """One JSON object per record: time (UTC), level, logger, message, the `extra` fields, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON; what JSON cannot hold is written as text."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {
            key: value for key, value in vars(record).items() if key not in _STANDARD | line.keys()
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=str, ensure_ascii=False))


def _name(error: BaseException) -> str:
    """The type, and the system's words for a number of its own."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    number = error.errno if isinstance(error, OSError) else None
    return f"{kind}: {os.strerror(number)}" if number else kind


def _log_dead_thread(died: threading.ExceptHookArgs) -> None:
    """A thread that ends by an exception is logged like everything else."""
    if died.exc_value is not None and died.exc_type is not SystemExit:
        name = died.thread.name if died.thread else "?"
        logging.getLogger(ROOT).error("a thread died: %s", name, exc_info=died.exc_value)
