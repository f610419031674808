"""Logging: one handler, one line per record on stderr, secrets redacted."""

import io
import json
import logging
import threading
from collections.abc import Iterator

import pytest

from skyloom.core.errors import ConfigError
from skyloom.core.log import format_exception, redact, redact_traceback, set_up_logging


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    logger, root = logging.getLogger("skyloom"), logging.getLogger()
    before = logger.handlers[:], logger.level, logger.propagate
    hook, others = threading.excepthook, root.handlers[:]
    yield
    threading.excepthook, root.handlers[:] = hook, others
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_json_lines_carry_message_extras_and_traceback():
    stream = io.StringIO()
    set_up_logging("debug", "json", stream)
    log = logging.getLogger("skyloom.generate")
    log.info("step %d\nof %d", 1, 4, extra={"job": "j1", "odd": {1, 2}})
    try:
        raise ValueError("too small")
    except ValueError:
        log.exception("it broke")
    first, second = (json.loads(line) for line in stream.getvalue().splitlines())
    assert (first["level"], first["logger"], first["message"]) == (
        "info",
        "skyloom.generate",
        "step 1\nof 4",
    )
    assert (first["job"], first["odd"]) == ("j1", "{1, 2}")
    assert set(first) == {"time", "level", "logger", "message", "job", "odd"}
    assert "ValueError: too small" in second["traceback"]


def test_plain_style_writes_one_line_to_stderr(capsys: pytest.CaptureFixture[str]):
    set_up_logging("warning")
    logging.getLogger("skyloom.train").warning("slow disk")
    logging.getLogger("skyloom.train").info("not shown")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.endswith("WARNING slow disk\n")
    assert output.err.count("\n") == 1


def test_second_call_replaces_the_handler():
    old, new = io.StringIO(), io.StringIO()
    set_up_logging(stream=old)
    set_up_logging(stream=new)
    logging.getLogger("skyloom").info("once")
    assert old.getvalue() == ""
    assert new.getvalue().count("once") == 1


def test_unknown_level_is_refused():
    with pytest.raises(ConfigError, match="loud"):
        set_up_logging("loud")


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("at https://u:p@example.org/a?k=v.", "at https://[hidden]@example.org/a?[hidden]"),
        ("postgresql://user@host/db", "postgresql://[hidden]@host/db"),
        ("whsec_AbC+/= and sk-sky-0123456789ab-x_y", "whsec_[hidden] and sk-[hidden]"),
        ("authorization: Bearer abc.def", "authorization: Bearer [hidden]"),
        ("what? a@b and c://d/e", "what? a@b and c://d/e"),
    ],
)
def test_secrets_are_redacted(text, redacted):
    assert redact(text) == redacted
    stream = io.StringIO()
    set_up_logging("debug", "json", stream)
    logging.getLogger("skyloom").info("%s", f'"{text}"')
    assert json.loads(stream.getvalue())["message"] == f'"{redacted}"'


def raised(message: str) -> BaseException:
    """Return an exception with a chain of causes that all have the same message."""
    try:
        try:
            raise FileNotFoundError(2, message, message)
        except OSError as error:
            raise ExceptionGroup(message, [KeyError(message)]) from error
    except ExceptionGroup as error:
        return error


def test_without_details_exceptions_are_logged_without_messages():
    stream = io.StringIO()
    set_up_logging("debug", "human", stream, details=False)
    logging.getLogger("skyloom").error("it failed", exc_info=raised("private"))
    logged = stream.getvalue()
    assert "private" not in logged.replace('raised("private")', "")
    assert all(
        words in logged
        for words in ("ExceptionGroup", "KeyError", "No such file or directory", "in raised")
    )
    set_up_logging("debug", "human", stream, details=True)
    logging.getLogger("skyloom").error("it failed", exc_info=raised("private"))
    assert "private" in stream.getvalue().replace('raised("private")', "")


def test_cyclic_exception_context_terminates():
    first, second = ValueError("x"), ValueError("y")
    first.__context__, second.__context__ = second, first
    assert format_exception(first).count("ValueError") == 2


def test_redact_traceback_keeps_positions_and_types():
    output = (
        "private\nTraceback (most recent call last):\n"
        '  File "a.py", line 3, in f\n    f("x")\nKeyError: private\n'
    )
    assert redact_traceback(output) == 'Traceback\n  File "a.py", line 3, in f\nKeyError'


def test_other_packages_and_dead_threads_use_the_same_format():
    stream = io.StringIO()
    set_up_logging("info", "json", stream, details=False)
    logging.getLogger("uvicorn.error").error("it failed", exc_info=ValueError("private"))
    thread = threading.Thread(target=lambda: int("private"), name="mine")
    thread.start()
    thread.join()
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["message"], first["logger"]) == ("it failed", "uvicorn.error")
    assert "private" not in first["traceback"]
    assert "private" not in second["traceback"].replace('int("private")', "")
    assert (second["message"], "ValueError" in second["traceback"]) == ("a thread died: mine", True)
