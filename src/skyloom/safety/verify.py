"""One answer about a file from three layers: its manifest, its watermark, and the registry of this machine."""

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
from skyloom.safety.provenance import FrameHasher, Match, Registry, sha256_file
from skyloom.safety.watermark_detector import Mark, find_watermarks


@dataclass(frozen=True)
class Findings:
    """What is known of a file. `credentials` None: it has no manifest; `marks` empty: no watermark was found, which
    does not show that there was none; `matches`: makings of this machine that it is, or comes from."""

    file: str
    sha256: str
    credentials: Credentials | None
    marks: tuple[Mark, ...]
    matches: tuple[Match, ...]

    @property
    def generated(self) -> bool:
        """Whether any layer says that a model made the file or a part of it. False does not mean that none did."""
        whole = self.credentials is not None and self.credentials.state != "invalid"
        said = whole and "rainedAlgorithmicMedia" in (
            (self.credentials and self.credentials.source_type) or ""
        )
        return bool(said or self.marks or any(match.by != "look" for match in self.matches))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "generated": self.generated,
            "c2pa": None if self.credentials is None else self.credentials.to_dict(),
            "watermark": [asdict(mark) for mark in self.marks],
            "registry": [match.to_dict() for match in self.matches],
        }


def check(path: Path, registry: Registry | None = None) -> Findings:
    """Look at a video or picture with all three layers, without any network. Raises MediaError for what is neither."""
    digest = sha256_file(path)
    credentials = read(path)
    taken, glimpses = (
        hashlib.sha256(),
        FrameHasher(1 if is_picture(path) else open_source(path).fps),
    )

    def watched() -> Iterator[UInt8[Tensor, "t h w c"]]:
        for run in _runs(path):
            taken.update(run.contiguous().numpy().data)
            glimpses.append(run)
            yield run

    marks = find_watermarks(watched())
    matches = (registry or Registry()).find(
        sha256=digest,
        frames=taken.hexdigest(),
        identities=[mark.identity for mark in marks],
        looks=glimpses.hashes,
    )
    return Findings(str(path), digest, credentials, tuple(marks), tuple(matches))


def _runs(path: Path) -> Iterator[UInt8[Tensor, "t h w c"]]:
    """The frames of a file, some at a time, decoded by the limited child: it may come from anywhere."""
    if is_picture(path):
        yield read_image(path)
    else:
        yield from open_source(path).stream()
