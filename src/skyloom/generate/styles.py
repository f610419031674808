"""Styles: short names for what a restyled video is to look like. Bundled ones, and users' own in a TOML file."""

import difflib
import tomllib
from pathlib import Path

from skyloom.core.errors import ConfigError, RequestError

_BUNDLED = Path(__file__).parent / "styles.toml"
_LONGEST = 500


def list_styles(own: Path | None = None) -> dict[str, str]:
    """Names and words, bundled ones first; one's own win. Raises ConfigError for a file that holds no styles."""
    return {**_read(_BUNDLED), **(_read(own) if own is not None else {})}


def find_style(name: str, own: Path | None = None) -> str:
    """The words of a style. Raises RequestError with the nearest names."""
    styles = list_styles(own)
    if name not in styles:
        near = difflib.get_close_matches(name, styles, n=2)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(styles)}."
        raise RequestError(f"There is no style {name!r}.", hint=hint)
    return styles[name]


def _read(path: Path) -> dict[str, str]:
    hint = 'Write lines like: stormy = "in the rain at night".'
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read as a file of styles ({error}).", hint=hint
        ) from error
    for name, words in found.items():
        if not isinstance(words, str) or not 0 < len(words.strip()) <= _LONGEST:
            raise ConfigError(f"{path}: {name} says nothing that is a style.", hint=hint)
    return found
