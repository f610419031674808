"""Logging for the whole package: one set-up, lines for people or JSON lines for machines, always to stderr.

Modules write `log = logging.getLogger(__name__)`; only programs (cli, serve) call `set_up_logging`.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

from skyloom.core.errors import ConfigError

ROOT = "skyloom"
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up_logging(
    level: str = "info", style: Literal["human", "json"] = "human", stream: TextIO | None = None
) -> logging.Logger:
    """Send the package's log to `stream` (stderr by default); a second call replaces the first."""
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ConfigError(f"{level!r} is not a log level.", hint="Use debug, info, warning or error.")
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(
        JsonLines() if style == "json" else logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    )
    logger = logging.getLogger(ROOT)
    logger.handlers[:] = [handler]
    logger.setLevel(number)
    logger.propagate = False
    return logger


class JsonLines(logging.Formatter):
    """One JSON object per record: time (UTC), level, logger, message, the `extra` fields, the traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON; what JSON cannot hold is written as text."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: value for key, value in vars(record).items() if key not in _STANDARD | line.keys()}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)
