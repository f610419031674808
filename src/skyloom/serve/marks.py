"""Marks of the assets that are in use, in a fixed amount of memory: a Bloom filter over their hashes."""

from collections.abc import Iterable, Iterator

_BITS = 2**25  # 4 MiB: of 300,000 marks one unused file in a million is taken for used, of 3,000,000 one in 100
_PARTS = range(0, 32, 8)  # hex digits of a sha256, in four numbers


class Marks:
    """A set of sha256 digests (hex) that forgets none, but may take one for marked that is not: such a file is kept."""

    def __init__(self, digests: Iterable[str]) -> None:
        self._bits = bytearray(_BITS // 8)
        for digest in digests:
            for place in _places(digest):
                self._bits[place >> 3] |= 1 << (place & 7)

    def __contains__(self, digest: str) -> bool:
        return all(self._bits[place >> 3] & 1 << (place & 7) for place in _places(digest))


def _places(digest: str) -> Iterator[int]:
    return (int(digest[part : part + 8], 16) % _BITS for part in _PARTS)
