"""Verify a file by its C2PA manifest, its watermark and the provenance registry."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from torch import Tensor

from skyloom.media.read import read_image
from skyloom.media.sandbox import is_picture
from skyloom.media.source import open_source
from skyloom.safety.credentials import Credentials, read
from skyloom.safety.provenance import FrameHasher, Match, Registry, content_sha256
from skyloom.safety.watermark import WatermarkDetector
from skyloom.safety.watermark_detector import DetectedWatermark, find_watermarks


@dataclass(frozen=True)
class Findings:
    """Result of `check`.

    `credentials` is None without a manifest. `marks` are detected watermarks; a watermark may have
    been removed. `matches` are records of this machine's registry.
    """

    file: str
    sha256: str
    credentials: Credentials | None
    marks: tuple[DetectedWatermark, ...]
    matches: tuple[Match, ...]

    @property
    def generated(self) -> bool:
        """Whether any layer identifies the file as generated; False is no proof of the opposite."""
        declared = (
            self.credentials is not None
            and self.credentials.state != "invalid"
            and "rainedAlgorithmicMedia" in (self.credentials.source_type or "")
        )
        exact = any(match.by != "look" for match in self.matches)
        return bool(declared or self.marks or exact)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "generated": self.generated,
            "c2pa": None if self.credentials is None else self.credentials.to_dict(),
            "watermark": [asdict(mark) for mark in self.marks],
            "registry": [match.to_dict() for match in self.matches],
        }


def check(
    path: Path, registry: Registry | None = None, *, detect: WatermarkDetector = find_watermarks
) -> Findings:
    """Check a video or picture offline. Raises MediaError for other files."""
    digest = content_sha256(path)
    credentials = read(path)
    frames_digest = hashlib.sha256()
    hasher = FrameHasher(1 if is_picture(path) else open_source(path).fps)

    def observed() -> Iterator[UInt8[Tensor, "t h w c"]]:
        for batch in _batches(path):
            frames_digest.update(batch.contiguous().numpy().data)
            hasher.append(batch)
            yield batch

    marks = detect(observed())
    matches = (registry or Registry()).find(
        sha256=digest,
        frames=frames_digest.hexdigest(),
        identities=[mark.identity for mark in marks],
        hashes=hasher.hashes,
    )
    return Findings(str(path), digest, credentials, tuple(marks), tuple(matches))


def _batches(path: Path) -> Iterator[UInt8[Tensor, "t h w c"]]:
    """Yield the frames of a file in batches, decoded in the sandbox."""
    if is_picture(path):
        yield read_image(path)
    else:
        yield from open_source(path).stream()
