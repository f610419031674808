"""Bodies, read within limits: JSON, or multipart with bracketed names, into the same nested plain values.

Everything is capped before it is parsed: bytes, depth, count of fields and of files. Files go to a temporary file
beyond a megabyte. Names of clients' files are labels and never become paths.
"""

import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from tempfile import SpooledTemporaryFile
from typing import Any

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from skyloom.serve.faults import WireError, invalid

MAX_JSON = 32 * 2**20
MAX_BODY = 512 * 2**20
MAX_DEPTH = 32
MAX_VALUES = 200_000  # of a JSON text: an empty list of two bytes takes sixty of memory
MAX_FIELDS, MAX_FILES, MAX_FIELD_BYTES, MAX_NAME = 200, 8, 22 * 2**20, 200
MAX_ITEMS = 1_000  # of a list that is written as name[0], name[1], ...
_STRING = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL
)  # never goes back, so it takes no longer than the text is long
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_STEP = re.compile(r"\[([^\[\]]*)\]")


@dataclass(frozen=True, eq=False)
class Upload:
    """A file that a client sent. `name` is a label; `type` is what the client says it is."""

    name: str
    type: str
    size: int
    file: SpooledTemporaryFile[bytes]


async def read_body(headers: Headers, stream: AsyncIterator[bytes], *, most: int = MAX_BODY) -> dict[str, Any]:
    """The body's fields; an empty body has none. Raises WireError (400, 413, 415)."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return _read_json(await _collect(headers, stream, min(most, MAX_JSON)))
    if kind == "multipart/form-data":
        check_length(headers, most)
        return await _read_form(headers, _limited(stream, most))
    if not await _collect(headers, stream, MAX_JSON) and kind in ("", "application/x-www-form-urlencoded"):
        return {}
    raise WireError(415, "Send application/json or multipart/form-data.", "unsupported_media_type")


def close_uploads(value: Any) -> None:
    """Let go of the temporary files of a body, however deep."""
    if isinstance(value, Upload):
        value.file.close()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            close_uploads(item)


def check_length(headers: Headers, most: int) -> None:
    """Raise WireError for a body that says it is too long, before any of it is read."""
    told = headers.get("content-length")
    if told is None:
        return
    if not (told.isascii() and told.isdigit()):
        raise invalid(None, "Content-Length is no number.", "invalid_header")
    if len(told) > 15 or int(told) > most:  # noqa: PLR2004 - a petabyte
        raise _too_long(most)


async def _collect(headers: Headers, stream: AsyncIterator[bytes], most: int) -> bytes:
    check_length(headers, most)
    parts = [part async for part in _limited(stream, most)]
    return b"".join(parts)


async def _limited(stream: AsyncIterator[bytes], most: int) -> AsyncIterator[bytes]:
    size = 0
    async for part in stream:
        size += len(part)
        if size > most:
            raise _too_long(most)
        yield part


def _too_long(most: int) -> WireError:
    return WireError(413, f"The body is longer than {most // 2**20} MiB.", "request_too_large")


def _read_json(text: bytes) -> dict[str, Any]:
    if not text.strip():
        return {}
    if count_values(text) > MAX_VALUES:
        raise invalid(None, f"The JSON has more than {MAX_VALUES:,} values.", "invalid_json")
    if depth_of(text) > MAX_DEPTH:
        raise invalid(None, f"The JSON is nested more than {MAX_DEPTH} deep.", "invalid_json")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(None, "The body is not valid JSON.", "invalid_json") from error
    if not isinstance(value, dict):
        raise invalid(None, "The body must be a JSON object.", "invalid_json")
    if b"\\u" in text:  # the only way to write what no text may hold
        _check_text(value)
    return value


def _check_text(value: Any) -> None:
    """Raise WireError for NUL and for halves of characters: they are no text, and databases refuse them."""
    if isinstance(value, str):
        if _NO_TEXT.search(value):
            raise invalid(None, "The body holds text that is not valid Unicode.", "invalid_text")
    elif isinstance(value, dict):
        _check_text([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            _check_text(item)


def _refuse_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity are no JSON


def count_values(text: bytes) -> int:
    """How many values a JSON text holds, at most. Texts of very many strings are not looked into further."""
    strings = text.count(b'"') // 2
    if strings > 2 * MAX_VALUES:
        return strings
    outside = _STRING.sub(b"", text)
    return 1 + sum(outside.count(sign) for sign in (b",", b"[", b"{"))


def depth_of(text: bytes) -> int:
    """How deep brackets nest outside of strings; an upper bound for what is no JSON."""
    depth = deepest = 0
    for sign in re.findall(rb"[\[{\]}]", _STRING.sub(b"", text)):
        depth += 1 if sign in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > MAX_DEPTH:
            break
    return deepest


async def _read_form(headers: Headers, stream: AsyncIterator[bytes]) -> dict[str, Any]:
    parser = MultiPartParser(
        headers,
        stream,  # type: ignore[arg-type] - an iterator is all it uses
        max_files=MAX_FILES,
        max_fields=MAX_FIELDS,
        max_part_size=MAX_FIELD_BYTES,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError, ValueError) as error:
        raise invalid(None, "The multipart body cannot be read.", "invalid_multipart") from error
    fields: dict[str, Any] = {}
    try:
        for name, value in _numbered(form.multi_items()):
            _check_text([name, value])
            _place(fields, name, _upload(value) if isinstance(value, UploadFile) else value)
        return {name: _dense(value) for name, value in fields.items()}
    except WireError:
        await form.close()
        raise


def _upload(file: UploadFile) -> Upload:
    label = re.sub(r"[^\w.\- ]", "_", (file.filename or "upload").replace("\\", "/").rsplit("/", maxsplit=1)[-1])
    kind = (file.content_type or "").partition(";")[0].strip().lower()
    return Upload(label[:100] or "upload", kind, file.size or 0, file.file)  # type: ignore[arg-type]


def _numbered(items: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The same fields; where a client of OpenAI sends a list of objects key by key (`a[][b]` twice, `a[][c]` twice),
    each name has its object's number."""
    lists: dict[str, list[str]] = {}
    for name, _ in items:
        root, empty, rest = name.partition("[]")
        if empty and rest and "[]" not in rest:
            lists.setdefault(root, []).append(rest)
    by_key = {root: rests for root, rests in lists.items() if _key_by_key(root, rests)}
    seen: Counter[str] = Counter()
    told: list[tuple[str, Any]] = []
    for name, value in items:
        root, empty, rest = name.partition("[]")
        if empty and rest in by_key.get(root, ()):
            told.append((f"{root}[{seen[name]}]{rest}", value))
            seen[name] += 1
        else:
            told.append((name, value))
    return told


def _key_by_key(root: str, rests: Sequence[str]) -> bool:
    """Whether all of a key come before all of the next. Raises WireError where nobody can tell whose they are."""
    counts = Counter(rests)
    if max(counts.values()) == 1 or len([rest for rest, _ in groupby(rests)]) > len(counts):
        return False
    if len(set(counts.values())) > 1:
        message = f"The objects of '{root}' have different fields, which a form cannot tell apart: send them as JSON."
        raise invalid(root, message, "invalid_multipart")
    return True


def _place(fields: dict[str, Any], name: str, value: object) -> None:
    """Put a value where its name says: `a`, `a[b]`, `a[]`, `a[][b]`, `a[0][b]`."""
    root, steps = name.partition("[")[0], _STEP.findall(name)
    rest = name[len(root) :]
    if not root or len(name) > MAX_NAME or len(steps) > MAX_DEPTH or "".join(f"[{step}]" for step in steps) != rest:
        raise invalid(None, f"The field name {name!r:.60} cannot be read.", "invalid_multipart")
    place: dict[Any, Any] = fields  # lists are tables until they are done
    path: list[str] = [root, *steps]
    for step, following in zip(path, [*path[1:], None], strict=True):
        key = _key(place, step, following, last=following is None)
        if following is None:
            place[key] = value
            return
        inner = place.setdefault(key, {})
        if not isinstance(inner, dict):
            raise invalid(root, f"The field {root!r:.60} is given in two ways.", "invalid_multipart")
        place = inner


def _key(place: Mapping[Any, Any], step: str, following: str | None, *, last: bool) -> str | int:
    """A list's next index for `[]`: a new item unless the newest still lacks what comes."""
    if step.isascii() and step.isdigit() and int(step[:6]) < MAX_ITEMS and len(step) < 6:  # noqa: PLR2004 - digits
        return int(step)
    if step:
        return step
    newest = max((key for key in place if isinstance(key, int)), default=-1)
    if not last and newest >= 0 and isinstance(place[newest], dict) and following not in place[newest]:
        return newest
    if newest + 1 >= MAX_ITEMS:
        raise invalid(None, f"A list has more than {MAX_ITEMS} items.", "invalid_multipart")
    return newest + 1


def _dense(value: Any) -> Any:
    """Tables with whole numbers for keys become lists, in their order."""
    if not isinstance(value, dict):
        return value
    inner = {key: _dense(item) for key, item in value.items()}
    if inner and all(isinstance(key, int) for key in inner):
        return [inner[key] for key in sorted(inner)]
    return {str(key): item for key, item in inner.items()}
