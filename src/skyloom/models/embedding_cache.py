"""Embeddings of prompts on disk, so that a repeated prompt does not need the text encoder.

A file holds an embedding in the precision in which the encoder made it, so that a video is the same
with and without the cache. Prompts are private: the file's name is a digest, and only its owner may
read it. It may be deleted at any time.
"""

import contextlib
import hashlib
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from skyloom.core.paths import cache_folder
from skyloom.core.tensor_files import read_tensors, remove_least_recently_used, write_tensors

MAX_CACHE_BYTES = 2**30
_SUFFIX = ".embedding"
_NAME = "embedding"


class EmbeddingCache:
    """A folder of embeddings by key, with a size limit in bytes. Write errors are ignored."""

    def __init__(self, folder: Path, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def load(self, key: str) -> Float[Tensor, "n d"] | None:
        """Return an embedding, if it is cached and the file is intact."""
        path = self._path(key)
        tensors = read_tensors(path, key.encode())
        if tensors is None:
            return None
        with contextlib.suppress(OSError):
            path.touch()
        return tensors.get(_NAME)

    def save(self, key: str, embedding: Float[Tensor, "n d"]) -> None:
        """Cache an embedding and remove the least recently used ones above the limit."""
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_tensors(self._path(key), key.encode(), {_NAME: embedding.cpu()})
            remove_least_recently_used(self.folder.glob(f"*{_SUFFIX}"), self.max_bytes)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}{_SUFFIX}"


def embedding_cache() -> EmbeddingCache | None:
    """Return this user's cache; None if SKYLOOM_CACHE is "off"."""
    folder = cache_folder()
    return None if folder is None else EmbeddingCache(folder / "embeddings")
