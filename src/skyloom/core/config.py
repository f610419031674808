"""Load frozen dataclasses from TOML and dump them: strict keys and types, inheritance, overrides.

`base = "x.toml"` inherits from a file in the same folder. None is written by omitting the key or,
if the default is another value, as `key = false`. Overrides are dotted keys with TOML values, e.g.
`{"loop.steps": "200"}`; a value that is not valid TOML is used as a string. Field types: bool, int,
float, str, Path, enums, Literal, tuples, other dataclasses, and unions of these with None.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from skyloom.core.errors import ConfigError

Table = dict[str, Any]
T = TypeVar("T")


def load_config(path: Path, kind: type[T], overrides: Mapping[str, str] | None = None) -> T:
    """Load a TOML file as `kind`. Raises ConfigError naming file, key and nearest match."""
    table = read_table(path)
    for key, text in (overrides or {}).items():
        _set_key(table, key, text)
    return from_table(table, kind, str(path))


def read_table(path: Path) -> Table:
    """Read a TOML file and its bases; tables are merged, other values replaced."""
    return _read_chain(path, ())


def from_table(table: Table, kind: type[T], where: str) -> T:
    """Convert a table to the dataclass `kind`; `where` is the file (and table) named in errors."""
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, kind))}
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(fields)}."
            raise ConfigError(f"{where}: unknown key {key!r}.", hint=hint)
    hints = typing.get_type_hints(kind)
    values = {key: _convert(value, hints[key], f"{where}: {key}") for key, value in table.items()}
    missing = [name for name, field in fields.items() if name not in values and _required(field)]
    if missing:
        raise ConfigError(
            f"{where}: missing {', '.join(map(repr, missing))}.", hint="Add the missing keys."
        )
    return kind(**values)


def to_table(config: object) -> Table:
    """Convert a dataclass to plain tables; None is omitted, or False if the default is not None."""
    table: Table = {}
    for field in dataclasses.fields(typing.cast(Any, config)):
        value = getattr(config, field.name)
        if value is not None:
            table[field.name] = _plain(value)
        elif isinstance(field.default, bool):
            raise ConfigError(
                f"{field.name}: None cannot be written as TOML.", hint="Make None its default."
            )
        elif not _required(field) and field.default is not None:
            table[field.name] = False
    return table


def dump_config(config: object) -> str:
    """Return TOML text from which `load_config` restores an equal object."""
    return "\n".join(_lines(to_table(config), "")) + "\n"


def _read_chain(path: Path, children: tuple[Path, ...]) -> Table:
    """Merge a file over its base; `children` are the inheriting files, to detect a cycle."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    base = table.pop("base", None)
    if base is None:
        return table
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base must be the name of a file, got {base!r}.")
    chain = (*children, path.resolve())
    if (path.parent / base).resolve() in chain:
        raise ConfigError(
            f"{path} inherits from itself (base = {base!r}).", hint="Remove one `base`."
        )
    return _merge(_read_chain(path.parent / base, chain), table)


def _convert(value: Any, kind: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where)
    if origin is Literal:
        matches = [one for one in arguments if one == value and type(one) is type(value)]
        return matches[0] if matches else _raise_choice_error(value, arguments, where)
    if origin is tuple:
        return _convert_tuple(value, arguments, where)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where} must be a table, got {value!r}.")
        return from_table(typing.cast(Table, value), typing.cast(type[Any], kind), where)
    return _convert_plain(value, kind, where)


def _convert_plain(value: Any, kind: Any, where: str) -> Any:
    if issubclass(kind, Enum):
        matches = [one for one in kind if one.value == value and type(one.value) is type(value)]
        choices = [one.value for one in kind]
        return matches[0] if matches else _raise_choice_error(value, choices, where)
    if issubclass(kind, Path) and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where} must be of type {kind.__name__}, got {value!r}.")
    return typing.cast(Any, value)


def _convert_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if type(None) in options and (value is None or (value is False and bool not in options)):
        return None
    errors: list[ConfigError] = []
    for option in options:
        if option is not type(None):
            try:
                return _convert(value, option, where)
            except ConfigError as error:
                errors.append(error)
    raise errors[0]


def _raise_choice_error(value: Any, options: Iterable[Any], where: str) -> Any:
    names = [str(option) for option in options]
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else None
    raise ConfigError(f"{where} must be one of {', '.join(names)}, got {value!r}.", hint=hint)


def _convert_tuple(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} must be a list, got {value!r}.")
    items = typing.cast(list[Any], value)
    kinds = arguments[:1] * len(items) if arguments[-1:] == (Ellipsis,) else arguments
    if len(items) != len(kinds):
        raise ConfigError(f"{where} must have {len(kinds)} values, got {len(items)}.")
    pairs = enumerate(zip(items, kinds, strict=True))
    return tuple(_convert(item, kind, f"{where}[{index}]") for index, (item, kind) in pairs)


def _required(field: Any) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _merge(base: Table, table: Table) -> Table:
    merged = dict(base)
    for key, value in table.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], typing.cast(Table, value)) if both else value
    return merged


def _set_key(table: Table, key: str, text: str) -> None:
    """Set a dotted key to a TOML value; create missing tables."""
    *parents, last = key.split(".")
    for parent in parents:
        inner: Any = table.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {key}: {parent!r} is not a table.")
        table = typing.cast(Table, inner)
    try:
        table[last] = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        table[last] = text


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in typing.cast(Iterable[Any], value)]
    if isinstance(value, Enum):
        return value.value
    return False if value is None else str(value) if isinstance(value, Path) else value


def _lines(table: Table, path: str) -> list[str]:
    tables: dict[str, Table] = {
        key: value for key, value in table.items() if isinstance(value, dict)
    }
    lists: dict[str, list[Table]] = {
        key: value for key, value in table.items() if _is_list_of_tables(value)
    }
    lines = [
        f"{key} = {_text(value)}" for key, value in table.items() if key not in {*tables, *lists}
    ]
    for key, value in tables.items():
        lines += ["", f"[{path}{key}]", *_lines(value, f"{path}{key}.")]
    for key, rows in lists.items():
        for row in rows:
            lines += ["", f"[[{path}{key}]]", *_lines(row, f"{path}{key}.")]
    return lines


def _is_list_of_tables(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(item, dict) for item in typing.cast(list[Any], value))


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_text, typing.cast(list[Any], value)))}]"
    if isinstance(value, dict):
        pairs = (f"{key} = {_text(item)}" for key, item in typing.cast(Table, value).items())
        return f"{{{', '.join(pairs)}}}"
    return repr(value)
