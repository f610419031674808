"""Stored files as responses, with ETag, a byte range and headers that forbid to run them.

Starlette's FileResponse answers wrong ranges as plain text and reads local files only; an object
store needs the ranges too.
"""

import re
from collections.abc import Iterator

from fastapi import Request, Response
from fastapi.responses import StreamingResponse

from skyloom.serve.api.dependencies import Services
from skyloom.serve.api.errors import ApiError
from skyloom.serve.storage import Asset, AssetStorage

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)
_MAX_RANGE = 64  # characters of a single range
_MAX_IF_NONE_MATCH = 1_000
_HEADERS = {
    "accept-ranges": "bytes",
    "cache-control": "private, max-age=0, must-revalidate",
    "content-security-policy": "default-src 'none'; sandbox; frame-ancestors 'none'",
}


def send_asset(
    request: Request, services: Services, owner: str, asset: Asset, filename: str
) -> Response:
    """A stored file, whole (200), in part (206) or not at all (304). Raises ApiError (416)."""
    etag = f'"{asset.sha256}"'
    headers = {
        **_HEADERS,
        "etag": etag,
        "content-disposition": f'attachment; filename="{filename}"',
    }
    if etag in request.headers.get("if-none-match", "")[:_MAX_IF_NONE_MATCH]:
        return Response(status_code=304, headers=headers)
    size = services.storage.size(asset)
    is_current = request.headers.get("if-range", etag) == etag
    part = parse_range(request.headers.get("range") if is_current else None, size)
    start, stop = part or (0, size)
    headers["content-length"] = str(stop - start)
    if part is not None:
        headers["content-range"] = f"bytes {start}-{stop - 1}/{size}"
    status = 200 if part is None else 206
    if request.method == "HEAD":
        return Response(status_code=status, headers=headers, media_type=asset.media_type)
    pieces = services.limiters["download"].stream(
        owner, _read(services.storage, asset, start, stop)
    )
    return StreamingResponse(pieces, status, headers, asset.media_type)


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes [start, stop) that a Range header names, of a file of `size` bytes.

    None means the whole file: for no header, several ranges (RFC 9110 allows that) and anything
    malformed. Raises ApiError (416) for a range outside of the file.
    """
    found = _RANGE.fullmatch(header.strip()) if header and len(header) <= _MAX_RANGE else None
    if found is None or not (found[1] or found[2]):
        return None
    if not found[1]:
        start, stop = size - min(int(found[2]), size), size
    else:
        start = int(found[1])
        stop = min(int(found[2]) + 1, size) if found[2] else size
        if found[2] and int(found[2]) < start:
            return None
    if start >= size:
        headers = {"content-range": f"bytes */{size}", "accept-ranges": "bytes"}
        message = f"The file has {size} bytes."
        raise ApiError(416, message, "range_not_satisfiable", headers=headers)
    return start, stop


def _read(storage: AssetStorage, asset: Asset, start: int, stop: int) -> Iterator[bytes]:
    """The bytes, from a file that is opened with the first of them."""
    yield from storage.read(asset, start, stop)
