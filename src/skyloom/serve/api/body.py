"""Bodies, read within limits: JSON, or multipart with bracketed names, into the same nested plain values.

Everything is capped before it is parsed: bytes, text in all, depth, counts of values, fields and files, and bytes of
all bodies in flight. What takes long is parsed off the event loop. Files go to a temporary file beyond a megabyte.
Names of clients' files are labels and never become paths.
"""

import errno
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from tempfile import SpooledTemporaryFile
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from skyloom.core.errors import DiskFullError
from skyloom.serve.api.errors import ApiError, invalid
from skyloom.serve.api.numbers import find_whole

MAX_JSON, MAX_PLAIN_JSON = 32 * 2**20, 2**20  # bytes, where data URLs are expected and where not
MAX_BODY = 512 * 2**20
MAX_DEPTH = 32
MAX_VALUES = 200_000  # of a JSON text: an empty list of two bytes takes sixty of memory
MAX_ESCAPES = 1_000_000  # of a JSON text; some clients write the slashes of base64 as escapes
MAX_FIELDS, MAX_FILES, MAX_NAME = 200, 8, 200
MAX_FORM_TEXT, MAX_PLAIN_FORM_TEXT = (
    24 * 2**20,
    2**20,
)  # bytes of all text parts, with data URLs and without
MAX_ITEMS = 1_000  # of a list that is written as name[0], name[1], ...
SMALL = 16 * 1024  # bytes of text that are parsed on the event loop
_STRING = re.compile(
    rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL
)  # never goes back, so it takes no longer than the text is long
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_STEP = re.compile(r"\[([^\[\]]*)\]")
_CHARSETS = ("", "utf-8", "utf8", "us-ascii", "ascii")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, eq=False)
class Upload:
    """A file that a client sent. `name` is a label; `type` is what the client says it is."""

    name: str
    type: str
    size: int
    file: SpooledTemporaryFile[bytes]


async def _at_once(work: Callable[[], Any]) -> Any:
    return work()


def _take_nothing(_count: int) -> None:
    pass


@dataclass(frozen=True)
class Intake:
    """How a body is taken: `most` bytes; `media` says whether data URLs are expected, and so long texts; `off_loop`
    runs what takes long; `take` and `hold` are told of bytes that were read, and that are held in memory."""

    most: int = MAX_BODY
    media: bool = True
    off_loop: Callable[[Callable[[], Any]], Awaitable[Any]] = _at_once
    take: Callable[[int], None] = _take_nothing
    hold: Callable[[int], None] = _take_nothing


async def read_body(
    headers: Headers, stream: AsyncIterator[bytes], intake: Intake = Intake()
) -> dict[str, Any]:
    """The body's fields; an empty body has none. Raises ApiError (400, 413, 415)."""
    kind, _, options = headers.get("content-type", "").partition(";")
    kind, coding = kind.strip().lower(), headers.get("content-encoding", "identity").strip().lower()
    if coding not in ("", "identity"):
        message = f"Content-Encoding must be identity, got {coding[:40]!r}. Send the body as it is, not compressed."
        raise ApiError(415, message, "unsupported_content_encoding")
    if kind == "application/json":
        _check_charset(options)
        most = min(intake.most, MAX_JSON if intake.media else MAX_PLAIN_JSON)
        check_length(headers, most)
        text = await _collect(_limited(stream, most, intake.take), intake.hold)
        return (
            _read_json(text)
            if len(text) <= SMALL
            else await intake.off_loop(lambda: _read_json(text))
        )
    if kind == "multipart/form-data":
        check_length(headers, intake.most)
        return await _read_form(headers, _limited(stream, intake.most, intake.take), intake)
    check_length(headers, intake.most)
    async for part in stream:
        if part:
            raise _unsupported()
    if kind in ("", "application/x-www-form-urlencoded"):
        return {}
    raise _unsupported()


def _unsupported() -> ApiError:
    return ApiError(415, "Send application/json or multipart/form-data.", "unsupported_media_type")


def _check_charset(options: str) -> None:
    """Raise ApiError (415) for JSON in another charset than UTF-8."""
    found = re.search(r"charset\s*=\s*\"?([^\s;\"]{0,40})", options, re.IGNORECASE)
    if found is not None and found[1].lower() not in _CHARSETS:
        raise ApiError(415, f"charset must be utf-8, got {found[1]!r}.", "unsupported_charset")


def close_uploads(value: Any) -> None:
    """Let go of the temporary files of a body, however deep."""
    if isinstance(value, Upload):
        value.file.close()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            close_uploads(item)


def check_length(headers: Headers, most: int) -> None:
    """Raise ApiError for a body that says it is too long, before any of it is read."""
    told = headers.get("content-length")
    if told is None:
        return
    if not (told.isascii() and told.isdigit()):
        raise invalid(None, "Content-Length is no number.", "invalid_header")
    if len(told) > 15 or int(told) > most:  # noqa: PLR2004 - a petabyte
        raise _too_long(most)


async def _collect(stream: AsyncIterator[bytes], hold: Callable[[int], None]) -> bytes:
    text = bytearray()
    async for part in stream:
        hold(len(part))
        text += part
    return bytes(text)


async def _limited(
    stream: AsyncIterator[bytes], most: int, take: Callable[[int], None]
) -> AsyncIterator[bytes]:
    size = 0
    async for part in stream:
        size += len(part)
        if size > most:
            raise _too_long(most)
        take(len(part))
        yield part


def _too_long(most: int) -> ApiError:
    return ApiError(413, f"The body is longer than {most // 2**20} MiB.", "request_too_large")


def _read_json(text: bytes) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        value = load_json(text)
    except (ValueError, RecursionError) as error:
        raise invalid(None, "The body is not valid JSON.", "invalid_json") from error
    if not isinstance(value, dict):
        raise invalid(None, "The body must be a JSON object.", "invalid_json")
    return value


def load_json(text: bytes) -> Any:
    """The value of a JSON text from a client: the only way to read one. Raises ApiError for what is over a limit, not
    UTF-8, or holds text that is none; ValueError and RecursionError for what is not JSON."""
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise invalid(None, "The JSON must be UTF-8.", "invalid_json") from error
    if "\0" in decoded[:4]:
        raise invalid(None, "The JSON must be UTF-8, got UTF-16 or UTF-32.", "invalid_json")
    if text.count(b"\\") > MAX_ESCAPES:
        raise invalid(None, f"The JSON has more than {MAX_ESCAPES:,} escapes.", "invalid_json")
    if count_values(text) > MAX_VALUES:
        raise invalid(None, f"The JSON has more than {MAX_VALUES:,} values.", "invalid_json")
    if depth_of(text) > MAX_DEPTH:
        raise invalid(None, f"The JSON is nested more than {MAX_DEPTH} deep.", "invalid_json")
    value = json.loads(decoded, parse_constant=_refuse_constant)
    if b"\\u" in text:  # the only way to write what no text may hold
        _check_text(value)
    return value


def _check_text(value: Any) -> None:
    """Raise ApiError for NUL and for halves of characters: they are no text, and databases refuse them."""
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


class _FormParser(MultiPartParser):
    """Starlette's parser, with a cap on all text parts together. A part with a media type is a file, also where it has
    no file name."""

    def __init__(self, headers: Headers, stream: AsyncIterator[bytes], intake: Intake) -> None:
        self._most_text, self._text = MAX_FORM_TEXT if intake.media else MAX_PLAIN_FORM_TEXT, 0
        self._hold = intake.hold
        super().__init__(
            headers,
            stream,  # type: ignore[arg-type] - an iterator is all it uses
            max_files=MAX_FILES,
            max_fields=MAX_FIELDS,
            max_part_size=self._most_text,
        )

    @property
    def text(self) -> int:
        """Bytes of all text parts."""
        return self._text

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None:
            self._text += end - start
            if self._text > self._most_text:
                message = f"The text parts of the form are longer than {self._most_text >> 20} MiB together."
                raise ApiError(413, message, "request_too_large")
            self._hold(end - start)
        super().on_part_data(data, start, end)

    def on_headers_finished(self) -> None:
        part = self._current_part
        kind = (
            dict(part.item_headers)
            .get(b"content-type", b"text/plain")
            .partition(b";")[0]
            .strip()
            .lower()
        )
        _, options = parse_options_header(part.content_disposition)
        if b"filename" not in options and kind.startswith(
            (b"image/", b"video/", b"application/octet-stream")
        ):
            part.content_disposition = (part.content_disposition or b"") + b'; filename="upload"'
        super().on_headers_finished()


async def _read_form(
    headers: Headers, stream: AsyncIterator[bytes], intake: Intake
) -> dict[str, Any]:
    parser = _FormParser(headers, stream, intake)
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError, ValueError) as error:
        raise invalid(None, "The multipart body cannot be read.", "invalid_multipart") from error
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFullError(
                "There is no room for the files of the form.", hint="Free some space."
            ) from error
        raise
    try:
        items = form.multi_items()
        return _nest(items) if parser.text <= SMALL else await intake.off_loop(lambda: _nest(items))
    except BaseException:
        await form.close()
        raise


def _nest(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a form where their names say."""
    fields: dict[str, Any] = {}
    for name, value in _numbered(items):
        _check_text([name])
        if isinstance(value, str) and _NO_TEXT.search(value):
            message = f"The field {name!r:.60} must be text. A file needs a filename in its Content-Disposition."
            raise invalid(name.partition("[")[0], message, "invalid_text")
        _place(fields, name, _upload(value) if isinstance(value, UploadFile) else value)
    return {name: _dense(value) for name, value in fields.items()}


def _upload(file: UploadFile) -> Upload:
    label = re.sub(
        r"[^\w.\- ]",
        "_",
        (file.filename or "upload").replace("\\", "/").rsplit("/", maxsplit=1)[-1],
    )
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
    """Whether all of a key come before all of the next. Raises ApiError where nobody can tell whose they are."""
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
    if (
        not root
        or len(name) > MAX_NAME
        or len(steps) > MAX_DEPTH
        or "".join(f"[{step}]" for step in steps) != rest
    ):
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
            raise invalid(
                root, f"The field {root!r:.60} is given in two ways.", "invalid_multipart"
            )
        place = inner


def _key(place: Mapping[Any, Any], step: str, following: str | None, *, last: bool) -> str | int:
    """A list's next index for `[]`: a new item unless the newest still lacks what comes."""
    index = find_whole(step)
    if index is not None and index < MAX_ITEMS:
        return index
    if step:
        return step
    newest = max((key for key in place if isinstance(key, int)), default=-1)
    if (
        not last
        and newest >= 0
        and isinstance(place[newest], dict)
        and following not in place[newest]
    ):
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
