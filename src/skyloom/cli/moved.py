"""Verbs that moved to another package: they say where they went and exit with 2."""

from skyloom.core.errors import ConfigError

_INSTALL = "install it with `pip install ./projects/diorama`"


def world() -> None:
    """Moved to the package diorama: `diorama world`."""
    raise ConfigError(f"`skyloom world` is now `diorama world`; {_INSTALL}.")


def evaluate() -> None:
    """Moved to the package diorama: `diorama evaluate`."""
    raise ConfigError(f"`skyloom evaluate` is now `diorama evaluate`; {_INSTALL}.")
