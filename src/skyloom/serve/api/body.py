"""Parse request bodies within limits: JSON, or multipart forms whose names have brackets.

Both become the same nested plain values. Limits are checked before parsing: bytes, bytes of text,
number of values, fields and files, and bytes of all bodies in flight. Large texts are parsed off
the event loop. Files above 1 MiB are spooled to disk. File names sent by clients are labels and are
never used as paths.
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

MAX_JSON = 32 * 2**20  # bytes, where data URLs are accepted
MAX_PLAIN_JSON = 2**20  # bytes, where they are not
MAX_BODY = 512 * 2**20
MAX_DEPTH = 32
MAX_VALUES = 200_000  # of a JSON text; "[]" has two bytes and takes sixty bytes of memory
MAX_ESCAPES = 1_000_000  # of a JSON text; some clients escape the slashes of base64
MAX_FIELDS = 200
MAX_FILES = 8
MAX_NAME = 200
MAX_FORM_TEXT = 24 * 2**20  # bytes of all text parts, where data URLs are accepted
MAX_PLAIN_FORM_TEXT = 2**20  # bytes of all text parts, where they are not
MAX_ITEMS = 1_000  # of a list written as name[0], name[1], ...
SMALL = 16 * 1024  # bytes of text parsed on the event loop
_MAX_LENGTH_DIGITS = 15  # of Content-Length
_INVALID_TEXT = re.compile("[\0\ud800-\udfff]")
_BRACKETED = re.compile(r"\[([^\[\]]*)\]")
_CHARSETS = ("", "utf-8", "utf8", "us-ascii", "ascii")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, eq=False)
class Upload:
    """An uploaded file.

    `name` and `type` (media type) are claims of the client; `size` is in bytes.
    """

    name: str
    type: str
    size: int
    file: SpooledTemporaryFile[bytes]


async def _run_inline(work: Callable[[], Any]) -> Any:
    return work()


def _ignore(_count: int) -> None:
    pass


@dataclass(frozen=True)
class BodyOptions:
    """Limits and hooks of `read_body`.

    `media` raises the limits on text, for data URLs. `off_loop` runs the parsing of large texts.
    `on_read` is called with the number of bytes read, `on_buffer` with the number of bytes buffered
    in memory; both may raise ApiError.
    """

    max_bytes: int = MAX_BODY
    media: bool = True
    off_loop: Callable[[Callable[[], Any]], Awaitable[Any]] = _run_inline
    on_read: Callable[[int], None] = _ignore
    on_buffer: Callable[[int], None] = _ignore


async def read_body(
    headers: Headers, stream: AsyncIterator[bytes], options: BodyOptions = BodyOptions()
) -> dict[str, Any]:
    """Parse a body into its fields; an empty body gives {}. Raises ApiError (400, 413, 415)."""
    media_type, _, parameters = headers.get("content-type", "").partition(";")
    media_type = media_type.strip().lower()
    _check_encoding(headers)
    if media_type == "application/json":
        _check_charset(parameters)
        return await _read_json_body(headers, stream, options)
    check_length(headers, options.max_bytes)
    if media_type == "multipart/form-data":
        limited = _limit(stream, options.max_bytes, options.on_read)
        return await _read_form(headers, limited, options)
    async for chunk in stream:
        if chunk:
            raise _unsupported_type()
    if media_type in ("", "application/x-www-form-urlencoded"):
        return {}
    raise _unsupported_type()


def _check_encoding(headers: Headers) -> None:
    """Raise ApiError (415) for a compressed body."""
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = (
            f"Content-Encoding must be identity, got {encoding[:40]!r}."
            " Send the body as it is, not compressed."
        )
        raise ApiError(415, message, "unsupported_content_encoding")


def _check_charset(parameters: str) -> None:
    """Raise ApiError (415) unless the charset of a JSON body is UTF-8."""
    found = re.search(r"charset\s*=\s*\"?([^\s;\"]{0,40})", parameters, re.IGNORECASE)
    if found is not None and found[1].lower() not in _CHARSETS:
        raise ApiError(415, f"charset must be utf-8, got {found[1]!r}.", "unsupported_charset")


def _unsupported_type() -> ApiError:
    message = "Content-Type must be application/json or multipart/form-data."
    return ApiError(415, message, "unsupported_media_type")


def close_uploads(value: Any) -> None:
    """Close the temporary files of all uploads in nested fields."""
    if isinstance(value, Upload):
        value.file.close()
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            close_uploads(item)


def check_length(headers: Headers, max_bytes: int) -> None:
    """Check Content-Length before the body is read. Raises ApiError (400, 413)."""
    length = headers.get("content-length")
    if length is None:
        return
    if not (length.isascii() and length.isdigit()):
        raise invalid(None, "Content-Length must be a number.", "invalid_header")
    if len(length) > _MAX_LENGTH_DIGITS or int(length) > max_bytes:
        raise _too_long(max_bytes)


async def _collect(stream: AsyncIterator[bytes], on_buffer: Callable[[int], None]) -> bytes:
    text = bytearray()
    async for chunk in stream:
        on_buffer(len(chunk))
        text += chunk
    return bytes(text)


async def _limit(
    stream: AsyncIterator[bytes], max_bytes: int, on_read: Callable[[int], None]
) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in stream:
        size += len(chunk)
        if size > max_bytes:
            raise _too_long(max_bytes)
        on_read(len(chunk))
        yield chunk


def _too_long(max_bytes: int) -> ApiError:
    message = f"The body must be at most {max_bytes // 2**20} MiB."
    return ApiError(413, message, "request_too_large")


async def _read_json_body(
    headers: Headers, stream: AsyncIterator[bytes], options: BodyOptions
) -> dict[str, Any]:
    max_bytes = min(options.max_bytes, MAX_JSON if options.media else MAX_PLAIN_JSON)
    check_length(headers, max_bytes)
    text = await _collect(_limit(stream, max_bytes, options.on_read), options.on_buffer)
    if len(text) <= SMALL:
        return _read_json(text)
    return await options.off_loop(lambda: _read_json(text))


def _read_json(text: bytes) -> dict[str, Any]:
    if not text.strip():
        return {}
    try:
        value = load_json(text)
    except ValueError as error:
        raise invalid(None, "The body is not valid JSON.", "invalid_json") from error
    if not isinstance(value, dict):
        raise invalid(None, "The body must be a JSON object.", "invalid_json")
    return value


def load_json(text: bytes) -> Any:
    """Parse untrusted JSON within limits; every JSON text of a client goes through this function.

    Raises ApiError for text over a limit, not UTF-8 or with invalid characters, and ValueError for
    invalid JSON.
    """
    try:
        decoded = text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise invalid(None, "JSON must be UTF-8.", "invalid_json") from error
    if "\0" in decoded[:4]:
        raise invalid(None, "JSON must be UTF-8, got UTF-16 or UTF-32.", "invalid_json")
    if text.count(b"\\") > MAX_ESCAPES:
        raise invalid(None, f"JSON must have at most {MAX_ESCAPES:,} escapes.", "invalid_json")
    if count_values(text) > MAX_VALUES:
        raise invalid(None, f"JSON must have at most {MAX_VALUES:,} values.", "invalid_json")
    try:
        value = json.loads(decoded, parse_constant=_reject_constant)
        _check_depth(value)
    except RecursionError as error:
        message = f"JSON must be nested at most {MAX_DEPTH} deep."
        raise invalid(None, message, "invalid_json") from error
    if b"\\u" in text:  # UTF-8 itself cannot encode surrogates, escapes can
        _check_text(value)
    return value


def count_values(text: bytes) -> int:
    """Return an upper bound on the number of values in a JSON text, without parsing it.

    Every list item, and every pair of an object, follows a comma or an opening bracket. Signs
    inside strings are counted too.
    """
    return 1 + sum(text.count(sign) for sign in (b",", b"[", b"{"))


def _check_depth(value: Any, depth: int = 1) -> None:
    """Raise RecursionError for lists and objects nested more than MAX_DEPTH deep."""
    if isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise RecursionError
        for item in value.values() if isinstance(value, dict) else value:
            _check_depth(item, depth + 1)


def _check_text(value: Any) -> None:
    """Raise ApiError for NUL and unpaired surrogates, which databases reject."""
    if isinstance(value, str):
        if _INVALID_TEXT.search(value):
            raise invalid(None, "The body has text that is not valid Unicode.", "invalid_text")
    elif isinstance(value, dict):
        _check_text([*value, *value.values()])
    elif isinstance(value, list):
        for item in value:
            _check_text(item)


def _reject_constant(name: str) -> float:
    raise ValueError(name)  # json.loads accepts NaN and Infinity, JSON does not


class _FormParser(MultiPartParser):
    """Starlette's parser with a limit on the bytes of all text parts together.

    A part with the media type of a file is a file even without a file name.
    """

    def __init__(
        self, headers: Headers, stream: AsyncIterator[bytes], options: BodyOptions
    ) -> None:
        self._max_text = MAX_FORM_TEXT if options.media else MAX_PLAIN_FORM_TEXT
        self._on_buffer = options.on_buffer
        self.text_size = 0
        super().__init__(
            headers,
            stream,  # type: ignore[arg-type] - declared as an async generator, used as an iterator
            max_files=MAX_FILES,
            max_fields=MAX_FIELDS,
            max_part_size=self._max_text,
        )

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None:
            self.text_size += end - start
            if self.text_size > self._max_text:
                limit = f"{self._max_text >> 20} MiB together"
                message = f"The text parts of the form must be at most {limit}."
                raise ApiError(413, message, "request_too_large")
            self._on_buffer(end - start)
        super().on_part_data(data, start, end)

    def on_headers_finished(self) -> None:
        part = self._current_part
        content_type = dict(part.item_headers).get(b"content-type", b"text/plain")
        media_type = content_type.partition(b";")[0].strip().lower()
        _, parameters = parse_options_header(part.content_disposition)
        is_file = media_type.startswith((b"image/", b"video/", b"application/octet-stream"))
        if b"filename" not in parameters and is_file:
            part.content_disposition = (part.content_disposition or b"") + b'; filename="upload"'
        super().on_headers_finished()


async def _read_form(
    headers: Headers, stream: AsyncIterator[bytes], options: BodyOptions
) -> dict[str, Any]:
    parser = _FormParser(headers, stream, options)
    try:
        form = await parser.parse()
    except (MultiPartException, UnicodeError, ValueError) as error:
        raise invalid(None, "The multipart body cannot be read.", "invalid_multipart") from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            message = "The disk has no room for the files of the form."
            raise DiskFullError(message, hint="Free some space.") from error
        raise
    try:
        items = form.multi_items()
        if parser.text_size <= SMALL:
            return _nest(items)
        return await options.off_loop(lambda: _nest(items))
    except BaseException:
        await form.close()
        raise


def _nest(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Convert form fields with bracketed names into nested values."""
    fields: dict[str, Any] = {}
    for name, value in _number_objects(items):
        _check_text([name])
        if isinstance(value, str) and _INVALID_TEXT.search(value):
            message = f"The field {name!r:.60} must be text."
            hint = "A file needs a filename in its Content-Disposition."
            raise invalid(name.partition("[")[0], f"{message} {hint}", "invalid_text")
        _assign(fields, name, _to_upload(value) if isinstance(value, UploadFile) else value)
    return {name: _to_lists(value) for name, value in fields.items()}


def _to_upload(file: UploadFile) -> Upload:
    name = (file.filename or "upload").replace("\\", "/").rsplit("/", maxsplit=1)[-1]
    label = re.sub(r"[^\w.\- ]", "_", name)[:100] or "upload"
    media_type = (file.content_type or "").partition(";")[0].strip().lower()
    return Upload(label, media_type, file.size or 0, file.file)  # type: ignore[arg-type]


def _number_objects(items: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Number the objects of lists that are sent key by key.

    OpenAI's clients send a list of objects as `a[][b]` twice, then `a[][c]` twice; here each name
    gets the index of its object: `a[0][b]`, `a[1][b]`, `a[0][c]`, `a[1][c]`.
    """
    keys_by_list: dict[str, list[str]] = {}
    for name, _ in items:
        root, brackets, key = name.partition("[]")
        if brackets and key and "[]" not in key:
            keys_by_list.setdefault(root, []).append(key)
    grouped = {root: keys for root, keys in keys_by_list.items() if _is_key_by_key(root, keys)}
    counts: Counter[str] = Counter()
    numbered: list[tuple[str, Any]] = []
    for name, value in items:
        root, brackets, key = name.partition("[]")
        if brackets and key in grouped.get(root, ()):
            numbered.append((f"{root}[{counts[name]}]{key}", value))
            counts[name] += 1
        else:
            numbered.append((name, value))
    return numbered


def _is_key_by_key(root: str, keys: Sequence[str]) -> bool:
    """Return whether all values of one key precede those of the next.

    Raises ApiError if the objects have different keys: then a value cannot be assigned to its
    object.
    """
    counts = Counter(keys)
    if max(counts.values()) == 1 or len([key for key, _ in groupby(keys)]) > len(counts):
        return False
    if len(set(counts.values())) > 1:
        message = f"The objects of '{root}' must have the same fields in a form: send them as JSON."
        raise invalid(root, message, "invalid_multipart")
    return True


def _assign(fields: dict[str, Any], name: str, value: object) -> None:
    """Set a value at the path that a name describes: `a`, `a[b]`, `a[]`, `a[][b]`, `a[0][b]`.

    Lists are dicts with integer keys until `_to_lists` converts them.
    """
    path = _parse_name(name)
    container: dict[Any, Any] = fields
    for step, next_step in zip(path, [*path[1:], None], strict=True):
        key = _key(container, step, next_step)
        if next_step is None:
            container[key] = value
            return
        inner = container.setdefault(key, {})
        if not isinstance(inner, dict):
            message = f"The field {path[0]!r:.60} must be a value or an object, got both."
            raise invalid(path[0], message, "invalid_multipart")
        container = inner


def _parse_name(name: str) -> list[str]:
    """Split `a[b][c]` into its steps. Raises ApiError for a malformed, long or deep name."""
    root = name.partition("[")[0]
    steps = _BRACKETED.findall(name)
    well_formed = root + "".join(f"[{step}]" for step in steps) == name
    if not root or not well_formed or len(name) > MAX_NAME or len(steps) > MAX_DEPTH:
        message = f"The field name {name!r:.60} cannot be parsed."
        raise invalid(None, message, "invalid_multipart")
    return [root, *steps]


def _key(container: Mapping[Any, Any], step: str, next_step: str | None) -> str | int:
    """Return the key of a step in its container.

    `[]` is the index of a new item, or of the newest item while that lacks the key `next_step`.
    """
    index = find_whole(step)
    if index is not None and index < MAX_ITEMS:
        return index
    if step:
        return step
    newest = max((key for key in container if isinstance(key, int)), default=-1)
    if next_step is not None and newest >= 0:
        item = container[newest]
        if isinstance(item, dict) and next_step not in item:
            return newest
    if newest + 1 >= MAX_ITEMS:
        message = f"A list must have at most {MAX_ITEMS} items."
        raise invalid(None, message, "invalid_multipart")
    return newest + 1


def _to_lists(value: Any) -> Any:
    """Convert dicts whose keys are all integers into lists, in the order of the keys."""
    if not isinstance(value, dict):
        return value
    inner = {key: _to_lists(item) for key, item in value.items()}
    if inner and all(isinstance(key, int) for key in inner):
        return [inner[key] for key in sorted(inner)]
    return {str(key): item for key, item in inner.items()}
