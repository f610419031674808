"""Input media of requests: pictures and videos, in all forms of reference that the API accepts.

A reference is validated first and its content stored later, after the quota checks. Only the first
bytes of a file are inspected here; workers decode it in a sandboxed process. Remote URLs are
rejected unless the settings allow them, and are fetched from public addresses only.
"""

import base64
import binascii
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import SEEK_END, BytesIO
from typing import Any, BinaryIO, cast

from skyloom.core.errors import RequestError
from skyloom.generate.request import Request
from skyloom.serve.api.errors import ApiError, invalid, missing
from skyloom.serve.api.request_models import Reference
from skyloom.serve.queue.jobs import Job, JobStore, NotFoundError
from skyloom.serve.queue.library import Library
from skyloom.serve.queue.slots import Slots
from skyloom.serve.storage import Asset, AssetStorage
from skyloom.serve.storage.disk_reserve import DiskReserve

Fetch = Callable[[str], bytes]
"""Downloads a URL; raises RequestError for one that is not allowed."""
_DATA_URL = re.compile(r"data:([\w.+/-]{0,100})((?:;[\w=.-]{1,60}){0,4}),", re.ASCII)
_SNIFFED_BYTES = 64
_MAX_DOWNLOADS = 4  # concurrent; each occupies a thread and holds a file in memory
_MAX_DOWNLOADS_PER_OWNER = 1
_SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpg",
    b"\x1aE\xdf\xa3": "webm",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
}
_OTHER_BRANDS = (b"avi", b"hei", b"mif")  # AVIF and HEIF pictures


@dataclass(frozen=True)
class MediaKind:
    """A kind of media that a parameter accepts: file suffixes, and their description for errors."""

    suffixes: tuple[str, ...]
    description: str


PICTURE = MediaKind(("png", "jpg", "webp"), "a PNG, JPEG or WebP picture")
VIDEO = MediaKind(("mp4", "mov", "webm", "gif"), "an MP4, MOV, WebM or GIF video")
ANY_MEDIA = MediaKind(PICTURE.suffixes + VIDEO.suffixes, "a picture or video")


@dataclass(frozen=True)
class ResolvedMedia:
    """A stored picture or video, and the job that made it if this server did."""

    asset: Asset
    job: Job | None = None


@dataclass(frozen=True, eq=False)
class MediaInput:
    """A validated media reference of a request.

    `reference` is the asset's, or a unique placeholder while the content is not stored. `store`
    stores the content if necessary and returns the asset; it raises ApiError, CapacityError or
    DiskFullError.
    """

    reference: str
    store: Callable[[], Asset]
    job: Job | None = None

    @classmethod
    def stored(cls, media: ResolvedMedia) -> "MediaInput":
        """Wrap media that is stored already."""
        return cls(media.asset.reference, lambda: media.asset, media.job)

    @classmethod
    def pending(cls, store: Callable[[], Asset]) -> "MediaInput":
        """Wrap media that `store` will store."""
        return cls(f"pending:{secrets.token_hex(16)}", store)


class MediaResolver:
    """Finds, fetches and stores the media of requests.

    Media of other owners is missing (ApiError, 404).
    """

    def __init__(
        self,
        jobs: JobStore,
        library: Library,
        storage: AssetStorage,
        reserve: DiskReserve,
        fetch: Fetch | None = None,
    ) -> None:
        self._jobs = jobs
        self._library = library
        self._storage = storage
        self._reserve = reserve
        self._fetch = fetch
        self._downloads = Slots(_MAX_DOWNLOADS, _MAX_DOWNLOADS_PER_OWNER)

    def picture(self, owner: str, reference: Reference, param: str) -> ResolvedMedia:
        """Store and return a picture. Raises ApiError."""
        return self._resolve(owner, reference, param, PICTURE)

    def video(self, owner: str, reference: Reference, param: str) -> ResolvedMedia:
        """Store and return a video. Raises ApiError."""
        return self._resolve(owner, reference, param, VIDEO)

    def prepare(
        self, owner: str, reference: Reference, param: str, kind: MediaKind = ANY_MEDIA
    ) -> MediaInput:
        """Validate a reference without storing or fetching anything.

        Raises ApiError for media that is missing, not ready or of another kind. The kind of a
        remote URL is checked when it is stored.
        """
        if reference.upload is not None:
            return self._pending(cast(BinaryIO, reference.upload.file), param, kind)
        if reference.file_id is not None:
            asset = Asset.parse(self._library.file(reference.file_id, owner).asset)
            _check_kind(asset.suffix, param, kind)
            return MediaInput.stored(ResolvedMedia(asset))
        if reference.video_id is not None:
            media = self.finished_video(owner, reference.video_id, param)
            _check_kind(media.asset.suffix, param, kind)
            return MediaInput.stored(media)
        url = reference.url or ""
        if url.startswith("data:"):
            return self._pending(BytesIO(read_data_url(url, param)), param, kind)
        if self._fetch is None:
            message = (
                "This server does not fetch remote URLs. Send the file, a data URL or a file_id."
            )
            raise ApiError(400, message, "url_references_off", param=param)
        return MediaInput.pending(partial(self._store_url, owner, url, param, kind))

    def finished_video(self, owner: str, id: str, param: str | None) -> ResolvedMedia:
        """Return a completed video of the owner. Raises ApiError."""
        try:
            job = self._jobs.get(id, owner)
        except NotFoundError as error:
            raise missing("video", id, param) from error
        if job.status != "completed" or job.result is None or "video" not in job.result.assets:
            message = f"The video {id} must be completed, got {job.status}."
            raise invalid(param, message, "video_not_ready")
        return ResolvedMedia(Asset.parse(job.result.assets["video"]), job)

    def store(self, file: BinaryIO, param: str) -> Asset:
        """Store a picture or video under the suffix of its content.

        Raises ApiError for other files.
        """
        return self.store_as(file, _sniff_file(file, param))

    def store_as(self, file: BinaryIO, suffix: str) -> Asset:
        """Store a file. Raises DiskFullError if it would use up the disk reserve."""
        size = file.seek(0, SEEK_END)
        file.seek(0)
        self._reserve.check(size)
        return self._storage.put(file, suffix)

    def _resolve(
        self, owner: str, reference: Reference, param: str, kind: MediaKind
    ) -> ResolvedMedia:
        prepared = self.prepare(owner, reference, param, kind)
        return ResolvedMedia(prepared.store(), prepared.job)

    def _pending(self, file: BinaryIO, param: str, kind: MediaKind) -> MediaInput:
        suffix = _sniff_file(file, param)
        _check_kind(suffix, param, kind)
        return MediaInput.pending(partial(self.store_as, file, suffix))

    def _store_url(self, owner: str, url: str, param: str, kind: MediaKind) -> Asset:
        """Fetch and store a remote URL. Raises CapacityError for too many concurrent downloads."""
        assert self._fetch is not None
        try:
            with self._downloads.hold(owner, "downloads"):
                content = self._fetch(url)
        except RequestError as error:
            raise invalid(param, str(error), "invalid_url") from error
        return self._pending(BytesIO(content), param, kind).store()


def store_media(request: Request, media: Sequence[MediaInput]) -> Request:
    """Store the media of a request and replace placeholders by the asset references."""
    references = {one.reference: one.store().reference for one in media}
    if all(placeholder == reference for placeholder, reference in references.items()):
        return request
    return Request.from_dict(_replace_strings(request.to_dict(), references))


def read_data_url(url: str, param: str) -> bytes:
    """Decode a base64 data URL. Raises ApiError."""
    found = _DATA_URL.match(url)
    if found is None or not found[2].endswith(";base64"):
        message = "A data URL must have the form data:image/png;base64,..."
        raise invalid(param, message, "invalid_url")
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(param, "A data URL must be valid base64.", "invalid_url") from error


def sniff(head: bytes) -> str | None:
    """Return the suffix of a picture or video from its first bytes; None for any other file."""
    for signature, suffix in _SIGNATURES.items():
        if head.startswith(signature):
            return suffix
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp" and head[8:11] not in _OTHER_BRANDS:
        return "mov" if head[8:12] == b"qt  " else "mp4"
    return None


def _sniff_file(file: BinaryIO, param: str) -> str:
    file.seek(0)
    suffix = sniff(file.read(_SNIFFED_BYTES))
    file.seek(0)
    if suffix is None:
        raise invalid(param, f"'{param}' must be a picture or video.", "invalid_media")
    return suffix


def _check_kind(suffix: str, param: str, kind: MediaKind) -> None:
    if suffix not in kind.suffixes:
        raise invalid(param, f"'{param}' must be {kind.description}.", "invalid_media")


def _replace_strings(value: Any, replacements: Mapping[str, str]) -> Any:
    """Replace whole strings in nested plain values."""
    if isinstance(value, str):
        return replacements.get(value, value)
    if isinstance(value, Mapping):
        return {key: _replace_strings(item, replacements) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_strings(item, replacements) for item in value]
    return value
