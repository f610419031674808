"""The log: one handler, one line per record, nothing on standard output."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from skyloom.core.errors import ConfigError
from skyloom.core.log import set_up_logging


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    logger = logging.getLogger("skyloom")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
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
    assert (first["level"], first["logger"], first["message"]) == ("info", "skyloom.generate", "step 1\nof 4")
    assert (first["job"], first["odd"]) == ("j1", "{1, 2}")
    assert set(first) == {"time", "level", "logger", "message", "job", "odd"}
    assert "ValueError: too small" in second["traceback"]


def test_people_get_one_plain_line_on_stderr(capsys: pytest.CaptureFixture[str]):
    set_up_logging("warning")
    logging.getLogger("skyloom.train").warning("slow disk")
    logging.getLogger("skyloom.train").info("not shown")
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.endswith("WARNING slow disk\n")
    assert output.err.count("\n") == 1


def test_a_second_set_up_replaces_the_first():
    old, new = io.StringIO(), io.StringIO()
    set_up_logging(stream=old)
    set_up_logging(stream=new)
    logging.getLogger("skyloom").info("once")
    assert old.getvalue() == ""
    assert new.getvalue().count("once") == 1


def test_an_unknown_level_is_refused():
    with pytest.raises(ConfigError, match="loud"):
        set_up_logging("loud")
