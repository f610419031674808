"""Download a file: resume, retry with back-off, check size, SHA-256 and header, then rename.

The unfinished file is FILE.part; FILE.part.json has its address, etag, size and hash. Both outlive
the process, so that the next one asks for the rest.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import httpx2
from safetensors import SafetensorError, safe_open

from skyloom.core.errors import DownloadError
from skyloom.core.files import DISK_FULL, replace_durably, sha256_file, write_atomically
from skyloom.hub.catalog import CatalogFile
from skyloom.hub.sources import (
    RemoteFile,
    Source,
    ask_remote_file,
    read_remote_file,
    refusal,
    unreachable,
)

MAX_TRIES = 8
MAX_WAIT = 300.0
T = TypeVar("T")
_SYNC_BYTES = 64 * 2**20
_AGAIN = "Run the command again: the file is fetched anew. If that does not help, use --from."


@dataclass(frozen=True)
class Transfer:
    """How files are transferred.

    limit: bytes per second. sleep, clock: of `time`, replaced in tests. notice: called with a
    sentence for the user. progress: called with a file's name, bytes on disk, and size in bytes.
    """

    client: httpx2.Client
    source: Source
    limit: float | None = None
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    notice: Callable[[str], None] = lambda text: None
    progress: Callable[[str, int, int], None] = lambda name, done, size: None


@dataclass(frozen=True)
class _PartState:
    """What FILE.part is the beginning of."""

    url: str
    etag: str | None = None
    size: int | None = None
    sha256: str | None = None


class _UnfinishedFile:
    """FILE.part and FILE.part.json."""

    def __init__(self, target: Path) -> None:
        self.path = part_path(target)
        self._state_path = target.with_name(f"{target.name}.part.json")

    @property
    def size(self) -> int:
        """Number of bytes on disk."""
        return self.path.stat().st_size if self.path.exists() else 0

    def read_state(self) -> _PartState | None:
        """Read the state; None if it is missing or damaged, which makes the bytes worthless."""
        try:
            return _PartState(**json.loads(self._state_path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write_state(self, state: _PartState) -> None:
        """Write the state."""
        write_atomically(self._state_path, json.dumps(asdict(state)).encode())

    def discard(self) -> None:
        """Delete both files."""
        self.path.unlink(missing_ok=True)
        self._state_path.unlink(missing_ok=True)

    def publish(self, target: Path) -> None:
        """Rename the finished file."""
        replace_durably(self.path, target)
        self._state_path.unlink(missing_ok=True)


def part_path(target: Path) -> Path:
    """Return the path of the unfinished file."""
    return target.with_name(f"{target.name}.part")


def part_size(target: Path) -> int:
    """Return the number of bytes that an earlier download left."""
    return _UnfinishedFile(target).size


def download(transfer: Transfer, file: CatalogFile, target: Path) -> CatalogFile:
    """Download a file; return its entry with size, hash and commit filled in.

    Raises DownloadError after MAX_TRIES tries that brought nothing new, for a wrong size, hash or
    header, and at once for what another try cannot change.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = _UnfinishedFile(target)
    remote = _patiently(
        transfer,
        lambda: _fetch_rest(transfer, file, unfinished),
        lambda: unfinished.size,
    )
    sha256 = _check(unfinished, file.sha256 or remote.sha256, target.name)
    size = unfinished.size
    unfinished.publish(target)
    return replace(file, bytes=size, sha256=sha256, revision=file.revision or remote.revision)


def ask(transfer: Transfer, file: CatalogFile) -> CatalogFile:
    """Fill in size, hash and commit of a file from the server's headers.

    Raises DownloadError, also if they contradict the catalogue.
    """
    remote = _patiently(
        transfer, lambda: ask_remote_file(transfer.client, transfer.source, file), lambda: 0
    )
    _check_offer(file, remote)
    return replace(
        file,
        bytes=remote.size if file.bytes is None else file.bytes,
        sha256=file.sha256 or remote.sha256,
        revision=file.revision or remote.revision,
    )


def _patiently(transfer: Transfer, attempt: Callable[[], T], progress: Callable[[], int]) -> T:
    """Try again after transient errors, until MAX_TRIES tries in a row brought no progress."""
    tries = 0
    longest = progress()
    while True:
        try:
            return attempt()
        except DownloadError as error:
            reached = progress()
            tries = 0 if reached > longest else tries + 1
            longest = max(longest, reached)
            if not error.transient or tries >= MAX_TRIES:
                raise
            wait = 2.0 ** max(tries - 1, 0) if error.retry_after is None else error.retry_after
            wait = min(wait, MAX_WAIT)
            if tries:
                transfer.notice(f"{error.message} Trying again in {wait:.0f} s.")
            transfer.sleep(wait)


def _fetch_rest(transfer: Transfer, file: CatalogFile, unfinished: _UnfinishedFile) -> RemoteFile:
    """Fetch what is missing, over one connection or, to begin anew, two. Raises DownloadError."""
    url = transfer.source.url(file)
    state = unfinished.read_state()
    if state is None:
        unfinished.discard()
        state = _PartState(url)
    start = unfinished.size
    if state.size is not None and start >= state.size:
        if start == state.size:
            known = state.sha256 if file.sha256 is None else file.sha256
            return RemoteFile(state.size, state.etag, known, file.revision)
        unfinished.discard()
        start = 0
    headers = transfer.source.headers()
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with transfer.client.stream("GET", url, headers=headers, follow_redirects=True) as response:
            remote = read_remote_file([*response.history, response])
            reason = _reason_to_begin_anew(response, remote, state, file) if start else None
            if reason is None:
                _receive(transfer, file, unfinished, response, remote)
                return remote
    except httpx2.TransportError as error:
        raise unreachable(transfer.source.host, error) from error
    transfer.notice(f"{file.name} starts again from 0: {reason}.")
    unfinished.discard()
    return _fetch_rest(transfer, file, unfinished)


def _reason_to_begin_anew(
    response: httpx2.Response, remote: RemoteFile, state: _PartState, file: CatalogFile
) -> str | None:
    """Say why the bytes on disk cannot be continued by this response; None if they can."""
    if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return "the server has fewer bytes than are here"
    if response.is_error:
        return None
    if response.status_code != HTTPStatus.PARTIAL_CONTENT:
        return "the server does not resume"
    same_content = file.sha256 is not None and state.sha256 == file.sha256
    moved = state.url != str(response.history[0].url if response.history else response.url)
    if remote.etag != state.etag and not (moved and same_content):
        return "the file has changed on the server"
    return None


def _receive(
    transfer: Transfer,
    file: CatalogFile,
    unfinished: _UnfinishedFile,
    response: httpx2.Response,
    remote: RemoteFile,
) -> None:
    """Append a response's content. Raises DownloadError if it is not what was asked for."""
    if response.is_error:
        raise refusal(response, transfer.source, file)
    _check_offer(file, remote)
    start = unfinished.size
    offset = _range_start(response)
    if offset != start:
        raise DownloadError(
            f"{transfer.source.host} sent bytes from {offset} on instead of {start}.",
            hint=_AGAIN,
            transient=True,
        )
    size = file.bytes if file.bytes is not None else remote.size
    url = transfer.source.url(file)
    unfinished.write_state(_PartState(url, remote.etag, size, file.sha256 or remote.sha256))
    try:
        with unfinished.path.open("ab") as output:
            _append(transfer, file.name, response, output, start=start, size=size)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise DownloadError(
            f"The disk of {unfinished.path.parent} is full; what was fetched is kept.",
            hint="Free some space and run the command again: it goes on where it stopped.",
        ) from error


def _append(
    transfer: Transfer,
    name: str,
    response: httpx2.Response,
    output: IO[bytes],
    *,
    start: int,
    size: int | None,
) -> None:
    """Write the content to a file, at most as fast as the limit, and flush it now and then."""
    began = transfer.clock()
    done = start
    synced = start
    for chunk in response.iter_raw():
        if size is not None and done + len(chunk) > size:
            raise DownloadError(
                f"{transfer.source.host} sent more than the {size:,} bytes of {name}.",
                hint=_AGAIN,
                transient=True,
            )
        output.write(chunk)
        done += len(chunk)
        transfer.progress(name, done, size or done)
        if done - synced >= _SYNC_BYTES:
            output.flush()
            os.fsync(output.fileno())
            synced = done
        if transfer.limit is not None:
            ahead = (done - start) / transfer.limit - (transfer.clock() - began)
            if ahead > 0:
                transfer.sleep(ahead)
    if size is not None and done < size:
        raise DownloadError(
            f"The connection ended after {done:,} of {size:,} bytes of {name}.",
            hint="Run the command again: it goes on where it stopped.",
            transient=True,
        )


def _range_start(response: httpx2.Response) -> int:
    """Return the offset of the first byte of a response; -1 for an unreadable header."""
    if response.status_code != HTTPStatus.PARTIAL_CONTENT:
        return 0
    first = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(first) if first.isdigit() else -1


def _check_offer(file: CatalogFile, remote: RemoteFile) -> None:
    """Raise DownloadError if the server's file is not the one of the catalogue."""
    for what, expected, offered in (
        ("bytes", file.bytes, remote.size),
        ("sha256", file.sha256, remote.sha256),
    ):
        if expected is not None and offered is not None and expected != offered:
            raise DownloadError(
                f"The server's {file.name} is another file: {what} is {offered}, "
                f"the catalogue has {expected}.",
                hint="Take another source with --from, or a newer skyloom.",
                transient=what == "bytes",
            )


def _check(unfinished: _UnfinishedFile, expected: str | None, name: str) -> str:
    """Check hash and header of a whole file; return its hash. Deletes a wrong file.

    Raises DownloadError.
    """
    sha256 = sha256_file(unfinished.path)
    cause = None
    if expected is not None and sha256 != expected:
        cause = f"its SHA-256 is {sha256}, expected {expected}"
    elif name.endswith(".safetensors"):
        cause = header_damage(unfinished.path)
    if cause is None:
        return sha256
    unfinished.discard()
    raise DownloadError(f"{name} arrived damaged: {cause}.", hint=_AGAIN)


def header_damage(path: Path) -> str | None:
    """Say what is wrong with a safetensors file's header and its size; None if nothing is."""
    try:
        with cast(Any, safe_open(path, framework="numpy")) as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        return str(error)
    return None
