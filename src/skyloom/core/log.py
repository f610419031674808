"""Logging to stderr, as plain lines or JSON lines, with secrets redacted.

Modules use `log = logging.getLogger(__name__)`; only programs (cli, serve) call `set_up_logging`.
Keys, webhook secrets, and the passwords and queries of URLs are removed from every line.
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
_TRACEBACK_LINE = re.compile(r'  File "|Traceback |[A-Za-z_][\w.]*(?:Error|Exception|Interrupt)\b')
ExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]


def set_up_logging(
    level: str = "info",
    style: Literal["human", "json"] = "human",
    stream: TextIO | None = None,
    *,
    details: bool = True,
) -> logging.Logger:
    """Log this package at `level`, and warnings of other packages, to `stream` (default: stderr).

    A second call replaces the first. `details=False` logs exceptions without their messages, which
    may quote client input. Raises ConfigError for an unknown level.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(f"The log level must be debug, info, warning or error, got {level!r}.")
    formatter = JsonLines(details=details) if style == "json" else PlainLines(details=details)
    handler = _Handler(stream or sys.stderr)
    handler.setFormatter(formatter)
    warnings_handler = _Handler(stream or sys.stderr)
    warnings_handler.setFormatter(formatter)
    warnings_handler.setLevel(logging.WARNING)
    logger = logging.getLogger(ROOT)
    logger.handlers[:] = [handler]
    root = logging.getLogger()
    kept = [one for one in root.handlers if not isinstance(one, _Handler)]
    root.handlers[:] = [*kept, warnings_handler]
    logger.setLevel(number)
    logger.propagate = False
    threading.excepthook = _log_dead_thread
    return logger


def redact(text: str) -> str:
    """Remove keys, tokens, webhook secrets, and user, password and query of URLs from a text."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def format_exception(error: BaseException) -> str:
    """Format an exception and its causes by type and traceback, without messages.

    Operating system errors keep the text of their error number.
    """
    parts: list[str] = []
    seen: set[int] = set()
    pending = [error]
    while pending and id(pending[-1]) not in seen:
        current = pending.pop()
        seen.add(id(current))
        frames = "".join(traceback.format_tb(current.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{_type_name(current)}")
        cause = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
        group = getattr(current, "exceptions", ())
        pending += [one for one in (*group, cause) if one is not None]
    return "\n\nled to\n\n".join(reversed(parts))


def redact_traceback(text: str) -> str:
    """Keep only the file positions and exception types of tracebacks in a program's output."""
    kept = [match for line in text.splitlines() if (match := _TRACEBACK_LINE.match(line))]
    return "\n".join(
        line.string if line[0].startswith("  File") else line[0].strip() for line in kept
    )


class _Handler(logging.StreamHandler[TextIO]):
    """Marks the handlers that `set_up_logging` installed."""


class PlainLines(logging.Formatter):
    """Formats a record as one readable line, then the traceback."""

    def __init__(self, *, details: bool = True) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
        self._details = details

    def format(self, record: logging.LogRecord) -> str:
        """Format and redact a record."""
        record.exc_text = None  # another handler may have cached it with messages
        text = redact(super().format(record))
        record.exc_text = None
        return text

    def formatException(self, ei: ExcInfo) -> str:  # noqa: N802 - name given by logging
        """Format a traceback, without messages if `details` is False."""
        if self._details or ei[1] is None:
            return super().formatException(ei)
        return format_exception(ei[1])


class JsonLines(PlainLines):
    """Formats a record as one JSON object.

    Keys: time (UTC), level, logger, message, the `extra` fields, traceback.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line of JSON; values that are not JSON become text."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for key, value in vars(record).items():
            if key not in _STANDARD and key not in line:
                line[key] = value
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, default=str, ensure_ascii=False))


def _type_name(error: BaseException) -> str:
    """Return the qualified type, and for OSError the text of its error number."""
    kind = f"{type(error).__module__}.{type(error).__qualname__}".removeprefix("builtins.")
    number = error.errno if isinstance(error, OSError) else None
    return f"{kind}: {os.strerror(number)}" if number else kind


def _log_dead_thread(args: threading.ExceptHookArgs) -> None:
    """Log the uncaught exception of a thread."""
    if args.exc_value is not None and args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "?"
        logging.getLogger(ROOT).error("a thread died: %s", name, exc_info=args.exc_value)
