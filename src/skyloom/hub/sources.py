"""Where files of the catalogue come from: a hub, a mirror, an address or a folder; tokens."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import quote

import httpx2

from skyloom.core.errors import DownloadError, GatedError, RequestError
from skyloom.hub.catalog import CatalogFile

HUGGING_FACE = "https://huggingface.co"
MODELSCOPE = "https://modelscope.cn/models"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LATER = "Run the same command later: it goes on where it stopped."
_BY_HAND = (
    "Files that were fetched another way are used in place with: skyloom models add FOLDER. "
    "`skyloom models info NAME --urls` prints the addresses."
)


@dataclass(frozen=True)
class Source:
    """A hub (`address`/REPOSITORY/resolve/REVISION/PATH), or with `flat` a folder of files by name.

    folder: a local folder instead of an address. token: sent to the host of `address` only.
    """

    name: str
    address: str = ""
    flat: bool = False
    folder: Path | None = None
    default_revision: str = "main"
    token: str | None = field(default=None, repr=False)

    def url(self, file: CatalogFile) -> str:
        """Return the address of a file."""
        if self.flat:
            return f"{self.address}/{quote(file.name)}"
        pinned = file.revision if self.name == "hf" else None  # other hubs have other commits
        revision = pinned or self.default_revision
        return f"{self.address}/{file.repository}/resolve/{revision}/{quote(file.path)}"

    def headers(self) -> dict[str, str]:
        """Return the headers of a request to `address`."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}

    @property
    def host(self) -> str:
        """Host name, for messages."""
        return httpx2.URL(self.address).host


def find_source(name: str | None) -> Source:
    """Interpret --from: hf (default), modelscope, an http(s) address, or a folder.

    Raises RequestError for anything else.
    """
    if name in (None, "hf"):
        endpoint = os.environ.get("HF_ENDPOINT") or HUGGING_FACE
        return Source("hf", endpoint.rstrip("/"), token=read_token())
    if name == "modelscope":
        return Source("modelscope", MODELSCOPE, default_revision="master")
    if name.startswith(("http://", "https://")):
        return Source("url", name.rstrip("/"), flat=True)
    if Path(name).expanduser().is_dir():
        return Source("folder", folder=Path(name).expanduser().resolve())
    raise RequestError(
        f"from must be hf, modelscope, an address with https:// or a folder, got {name!r}.",
        hint="A folder holds the files by name, as `skyloom models info NAME --urls` lists them.",
        field="from",
    )


def read_token() -> str | None:
    """Return HF_TOKEN, else the token that the hub's own program has stored; None without one."""
    if token := os.environ.get("HF_TOKEN", "").strip():
        return token
    home = os.environ.get("HF_HOME")
    path = Path(home) if home else Path.home() / ".cache" / "huggingface"
    try:
        return (path / "token").read_text().strip() or None
    except OSError:
        return None


@dataclass(frozen=True)
class RemoteFile:
    """What a server says about a file. sha256: of hubs that name it; revision: the commit."""

    size: int | None
    etag: str | None
    sha256: str | None
    revision: str | None


def read_remote_file(responses: Sequence[httpx2.Response]) -> RemoteFile:
    """Read size, etag, hash and commit from the headers of a request and its redirects.

    `X-Linked-Size` and `X-Linked-Etag` describe the file, whose hash the latter is. An etag of the
    host that a hub redirects to is not a hash.
    """
    found: dict[str, str] = {}
    for response in responses:
        for name in ("X-Linked-Size", "X-Linked-Etag", "X-Repo-Commit"):
            if value := response.headers.get(name):
                found.setdefault(name, value.removeprefix("W/").strip('"'))
    last = responses[-1]
    own_etag = last.headers.get("ETag", "").removeprefix("W/").strip('"') or None
    linked = found.get("X-Linked-Etag") or (own_etag if len(responses) == 1 else None)
    size = found.get("X-Linked-Size") or _content_size(last)
    return RemoteFile(
        size=int(size) if size and size.isdigit() else None,
        etag=found.get("X-Linked-Etag") or own_etag,
        sha256=linked if linked and _SHA256.fullmatch(linked) else None,
        revision=found.get("X-Repo-Commit"),
    )


def _content_size(response: httpx2.Response) -> str | None:
    """Read the size of the whole file from a response with all of it, or with a range."""
    if response.status_code == HTTPStatus.PARTIAL_CONTENT:
        return response.headers.get("Content-Range", "").rpartition("/")[2]
    return response.headers.get("Content-Length") if response.is_success else None


def make_client() -> httpx2.Client:
    """Make the client of downloads; proxies come from the environment (HTTPS_PROXY, NO_PROXY)."""
    timeout = httpx2.Timeout(30.0, connect=15.0)
    return httpx2.Client(timeout=timeout, headers={"Accept-Encoding": "identity"})


def ask_remote_file(client: httpx2.Client, source: Source, file: CatalogFile) -> RemoteFile:
    """Ask for size and hash of a file, without its content.

    A redirect to another host is not followed once size or hash are known; the token stays here.
    Raises DownloadError or GatedError.
    """
    responses: list[httpx2.Response] = []
    url = httpx2.URL(source.url(file))
    home = url.origin
    for _ in range(client.max_redirects):
        try:
            headers = source.headers() if url.origin == home else {}
            response = client.head(url, headers=headers)
        except httpx2.TransportError as error:
            raise unreachable(url.host, error) from error
        if response.next_request is None or "X-Linked-Size" in response.headers:
            responses.append(response)
            break
        responses.append(response)
        url = response.next_request.url
    if responses[-1].is_error:
        if url.origin != home:  # signed addresses may answer to GET only
            return read_remote_file(responses)
        raise refusal(responses[-1], source, file)
    return read_remote_file(responses)


def unreachable(host: str, error: Exception) -> DownloadError:
    """Make the error of a host that does not answer or of a broken connection."""
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError):
        return DownloadError(
            f"{host} does not answer ({error}).",
            hint=f"Check the network, HTTPS_PROXY and HF_ENDPOINT. {_BY_HAND}",
            transient=True,
        )
    return DownloadError(
        f"The connection to {host} broke ({str(error) or type(error).__name__}).",
        hint=_LATER,
        transient=True,
    )


def refusal(response: httpx2.Response, source: Source, file: CatalogFile) -> DownloadError:
    """Make the error of a response with an error status: one cause, and what to do."""
    status = response.status_code
    host = response.url.host
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return DownloadError(
            f"{host} allows no more requests for now (429).",
            hint=f"{_LATER} HF_TOKEN raises the limit." if source.name == "hf" else _LATER,
            transient=True,
            retry_after=_retry_after(response),
        )
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.REQUEST_TIMEOUT:
        return DownloadError(
            f"{host} has a fault ({status}).",
            hint=f"{_LATER} Or take another source with --from.",
            transient=True,
            retry_after=_retry_after(response),
        )
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return _denial(response, source, file)
    if status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE):
        return DownloadError(
            f"{file.name} is not at {_plain(response.url)} ({status}): it was moved or deleted.",
            hint=f"Try --from modelscope or a newer skyloom. {_BY_HAND}",
        )
    return DownloadError(
        f"{host} answered {status} for {file.name}.",
        hint="Take another source with --from, or a newer skyloom.",
    )


def _denial(response: httpx2.Response, source: Source, file: CatalogFile) -> DownloadError:
    """Make the error of 401 or 403: conditions to accept, a token, or an address that ran out."""
    status = response.status_code
    host = response.url.host
    at_hub = response.url.origin == httpx2.URL(source.address).origin and not source.flat
    page = f"{source.address}/{file.repository}"
    forbidden = status == HTTPStatus.FORBIDDEN
    if response.headers.get("X-Error-Code") == "GatedRepo" or (forbidden and at_hub):
        return GatedError(
            f"{file.repository} is gated: its owners want you to accept their conditions first.",
            hint=f"Accept them at {page}, set HF_TOKEN to a token of the same account, "
            "then run the command again.",
        )
    if forbidden:  # of a storage host, a signed address that has run out
        return DownloadError(
            f"{host} refused {file.name} (403).",
            hint=f"{_LATER} Or take another source with --from.",
            transient=not source.flat,
        )
    cause = "refused the token" if source.token else "wants a token, or has no such repository"
    return DownloadError(
        f"{host} {cause} for {file.repository} (401).",
        hint=f"Make a token that can read it, set HF_TOKEN, and check that {page} exists.",
    )


def _plain(url: httpx2.URL) -> str:
    """Return an address without its query, which may hold a signature."""
    return str(url.copy_with(query=None))


def _retry_after(response: httpx2.Response) -> float | None:
    """Read Retry-After in seconds; a date is left to the back-off."""
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None
