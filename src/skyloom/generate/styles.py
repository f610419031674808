"""Styles: named texts that `edit restyle` appends to a prompt; bundled, and from a TOML file."""

import difflib
import tomllib
from pathlib import Path

from skyloom.core.errors import ConfigError, RequestError

_BUNDLED = Path(__file__).parent / "styles.toml"
_MAX_CHARACTERS = 500


def list_styles(file: Path | None = None) -> dict[str, str]:
    """Texts by name; those of `file` override bundled ones. Raises ConfigError."""
    return {**_read(_BUNDLED), **(_read(file) if file is not None else {})}


def find_style(name: str, file: Path | None = None) -> str:
    """The text of a style. Raises RequestError with the nearest names."""
    styles = list_styles(file)
    if name not in styles:
        near = difflib.get_close_matches(name, styles, n=2)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Styles: {', '.join(styles)}."
        raise RequestError(f"There is no style {name!r}.", hint=hint)
    return styles[name]


def _read(path: Path) -> dict[str, str]:
    hint = 'Write lines like: stormy = "in the rain at night".'
    try:
        styles = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as a file of styles ({error}).", hint=hint
        ) from error
    for name, text in styles.items():
        if not isinstance(text, str) or not 0 < len(text.strip()) <= _MAX_CHARACTERS:
            raise ConfigError(
                f"{path}: {name} must be text of 1 to {_MAX_CHARACTERS} characters.", hint=hint
            )
    return styles
