"""Training setups: what a recipe can train. Packages register theirs.

An installed package names a function without arguments under the entry point group `skyloom.setups`
that calls `register_setup`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from skyloom.train.loop import LoopConfig, Task

ENTRY_POINTS = "skyloom.setups"


@dataclass(frozen=True)
class Setup:
    """A training setup.

    settings: dataclass of its table in a recipe. build: makes the task from these settings.
    """

    settings: type
    build: Callable[[Any, LoopConfig], Task]


_SETUPS: dict[str, Setup] = {}


def register_setup(name: str, setup: Setup) -> None:
    """Register a setup under the name of its table in a recipe, in place of an earlier one."""
    _SETUPS[name] = setup


def find_setups() -> dict[str, Setup]:
    """Return the setups by name: those of installed packages, and those registered already."""
    for entry_point in entry_points(group=ENTRY_POINTS):
        entry_point.load()()
    return dict(_SETUPS)
