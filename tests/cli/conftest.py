"""Fixture that runs the command line in the test process: exit code, stdout and stderr."""

import os
from collections.abc import Callable
from typing import NamedTuple

import pytest

from skyloom.cli.app import main


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def skyloom(capsys, monkeypatch, tmp_path) -> Callable[..., Ran]:
    """`skyloom("generate", "a cat")` in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: object) -> Ran:
        code = 0
        os.umask(mask := os.umask(0))  # verbs of the server narrow it for their process
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            os.umask(mask)
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return run
