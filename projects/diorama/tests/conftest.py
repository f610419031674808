"""What every test may use: registered setups, and the command line in the test process."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from diorama.cli.app import main
from diorama.train.setups import register


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True, scope="session")
def setups():
    """The setups are registered, whether the package is installed or only on the path."""
    register()


@pytest.fixture
def diorama(capsys, monkeypatch, tmp_path) -> Callable[..., Ran]:
    """`diorama("world", "render")` in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Ran:
        code = 0
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code or 0
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return run
