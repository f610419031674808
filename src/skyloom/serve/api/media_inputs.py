"""What a call starts from: pictures and videos, found or stored, whatever way a client names them.

Media is looked at by its first bytes only: the workers open it, in a limited child. URLs of other machines are
refused unless the settings allow them, and then only asked when they lead to public addresses.
"""

import base64
import binascii
import re
from collections.abc import Callable
from dataclasses import dataclass
from io import SEEK_END, BytesIO
from typing import BinaryIO, cast

from skyloom.core.errors import RequestError
from skyloom.serve.api.errors import WireError, invalid, missing
from skyloom.serve.api.request_models import Reference
from skyloom.serve.queue.jobs import Job, JobStore, MissingJobError
from skyloom.serve.queue.library import Library
from skyloom.serve.queue.slots import Slots
from skyloom.serve.storage import Asset, AssetStorage
from skyloom.serve.storage.disk_reserve import DiskReserve

PICTURES, VIDEOS = ("png", "jpg", "webp"), ("mp4", "mov", "webm", "gif")
Fetch = Callable[[str], bytes]
"""The content of a URL; raises RequestError for one that may not be asked."""
_DATA = re.compile(r"data:([\w.+/-]{0,100})((?:;[\w=.-]{1,60}){0,4}),", re.ASCII)
_HEAD = 64
_DOWNLOADS, _DOWNLOADS_OF_OWNER = 4, 1  # at once; each holds a thread, and a file in memory


@dataclass(frozen=True)
class Source:
    """A stored picture or video, and the job that made it, if it is one of ours."""

    asset: Asset
    job: Job | None = None


class Sources:
    """Finds and stores what calls start from. What is somebody else's is not there (WireError, 404)."""

    def __init__(
        self,
        jobs: JobStore,
        library: Library,
        storage: AssetStorage,
        reserve: DiskReserve,
        fetch: Fetch | None = None,
    ) -> None:
        self._jobs, self._library, self._storage, self._fetch = jobs, library, storage, fetch
        self._reserve = reserve
        self._downloads = Slots(_DOWNLOADS, _DOWNLOADS_OF_OWNER)

    def picture(self, owner: str, reference: Reference, param: str) -> Source:
        """A picture. Raises WireError for what is none."""
        return _only(
            self.find(owner, reference, param), PICTURES, param, "a PNG, JPEG or WebP picture"
        )

    def video(self, owner: str, reference: Reference, param: str) -> Source:
        """A video. Raises WireError for what is none."""
        return _only(
            self.find(owner, reference, param), VIDEOS, param, "an MP4, MOV, WebM or GIF video"
        )

    def find(self, owner: str, reference: Reference, param: str) -> Source:
        """The stored file that a reference means. Raises WireError for what is not there, not ready or no media."""
        if reference.upload is not None:
            return Source(self.store(cast(BinaryIO, reference.upload.file), param))
        if reference.file_id is not None:
            return Source(Asset.parse(self._library.file(reference.file_id, owner).asset))
        if reference.video_id is not None:
            return self.made(owner, reference.video_id, param)
        return Source(self.store(BytesIO(self._content(owner, reference.url or "", param)), param))

    def made(self, owner: str, id: str, param: str | None) -> Source:
        """A finished video of the owner's."""
        try:
            job = self._jobs.get(id, owner)
        except MissingJobError as error:
            raise missing("video", id, param) from error
        if job.status != "completed" or job.result is None or "video" not in job.result.assets:
            raise invalid(
                param,
                f"{id} is {job.status}: only a completed video can be edited.",
                "video_not_ready",
            )
        return Source(Asset.parse(job.result.assets["video"]), job)

    def store(self, file: BinaryIO, param: str) -> Asset:
        """Store media under what its first bytes say it is, whatever its name says."""
        file.seek(0)
        suffix = sniff(file.read(_HEAD))
        if suffix is None:
            raise invalid(
                param, f"'{param}' is no picture or video that can be read.", "invalid_media"
            )
        file.seek(0)
        return self.keep(file, suffix)

    def keep(self, file: BinaryIO, suffix: str) -> Asset:
        """Store what a client sent, unless that would go into the disk reserve (DiskFullError)."""
        size = file.seek(0, SEEK_END)
        file.seek(0)
        self._reserve.check(size)
        return self._storage.put(file, suffix)

    def _content(self, owner: str, url: str, param: str) -> bytes:
        """What a data URL holds, or another, where that is allowed. Raises CapacityError for too many at once."""
        if url.startswith("data:"):
            return read_data_url(url, param)
        if self._fetch is None:
            message = "URLs are not fetched by this server. Send the file, a data URL or a file_id."
            raise WireError(400, message, "url_references_off", param=param)
        try:
            with self._downloads.hold(owner, "downloads"):
                return self._fetch(url)
        except RequestError as error:
            raise invalid(param, str(error), "invalid_url") from error


def read_data_url(url: str, param: str) -> bytes:
    """The bytes of a base64 data URL. Raises WireError."""
    found = _DATA.match(url)
    if found is None or not found[2].endswith(";base64"):
        raise invalid(param, "A data URL must look like data:image/png;base64,...", "invalid_url")
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid(param, "The data URL is not valid base64.", "invalid_url") from error


def sniff(head: bytes) -> str | None:
    """The suffix of a picture or video by its first bytes; None for anything else."""
    starts: dict[bytes, str] = {
        b"\x89PNG\r\n\x1a\n": "png",
        b"\xff\xd8\xff": "jpg",
        b"\x1aE\xdf\xa3": "webm",
    }
    starts |= {b"GIF87a": "gif", b"GIF89a": "gif"}
    for start, suffix in starts.items():
        if head.startswith(start):
            return suffix
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        return (
            "mov"
            if head[8:12] == b"qt  "
            else None
            if head[8:11] in (b"avi", b"hei", b"mif")
            else "mp4"
        )
    return None


def _only(source: Source, kinds: tuple[str, ...], param: str, what: str) -> Source:
    if source.asset.suffix not in kinds:
        raise invalid(param, f"'{param}' must be {what}.", "invalid_media")
    return source
