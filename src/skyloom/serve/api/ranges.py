"""The Range header: one range of bytes, or none. Several at once are answered with the whole, as RFC 9110 allows."""

import re
from dataclasses import dataclass

_ONE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})", re.ASCII)
_LONGEST = 64  # characters; no honest single range is longer


@dataclass(frozen=True)
class ByteRange:
    """Bytes [start, stop) of `total`; `partial` says whether they were asked for."""

    start: int
    stop: int
    total: int
    partial: bool

    @property
    def length(self) -> int:
        """How many bytes there are."""
        return self.stop - self.start

    @property
    def header(self) -> str:
        """The value of Content-Range."""
        return f"bytes {self.start}-{self.stop - 1}/{self.total}"


def read_range(header: str | None, total: int) -> ByteRange | None:
    """The bytes to send of a file of `total` bytes; None where the range lies outside (status 416).

    What is no single range of bytes is ignored, in time that does not depend on what it says.
    """
    whole = ByteRange(0, total, total, partial=False)
    if header is None or len(header) > _LONGEST:
        return whole
    found = _ONE.fullmatch(header.strip())
    if not found or found[1] == found[2] == "":
        return whole
    if found[1] == "":
        last = min(int(found[2]), total)
        return ByteRange(total - last, total, total, partial=True) if last else None
    start, stop = int(found[1]), min(int(found[2]) + 1, total) if found[2] else total
    if found[2] and int(found[2]) < start:
        return whole
    return ByteRange(start, stop, total, partial=True) if start < total else None
