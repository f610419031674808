# pyright: basic
"""Cache of the latents of generated spans, keyed by everything that determines them.

A repeated edit generates only the spans that changed. The folder may be deleted at any time. File
names are digests of prompt, seed, steps, weights and the frames that condition the span. When the
folder exceeds its size limit, the least recently used files are removed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyloom.core.files import atomic_path
from skyloom.generate.timeline import Generate

MAX_BYTES = 2 * 2**30
_STORED_NAMES = {"init_clips": "under", "mix_shares": "shares"}  # keys of existing caches


@dataclass(frozen=True)
class SpanIdentity:
    """Cache key of an edit's spans: `settings` common to all, and an id per source."""

    settings: Mapping[str, Any]
    source_ids: Sequence[str]

    def of(self, span: Generate) -> dict[str, Any]:
        """Everything that determines a span's latents, as JSON values."""
        values = {_STORED_NAMES.get(name, name): value for name, value in asdict(span).items()}
        for clip in (values["before"], values["after"], *values["under"]):
            if clip is not None:
                clip["source"] = self.source_ids[clip["source"]]
        return {"about": dict(self.settings), "span": values}


class SpanStore:
    """A folder of span latents with a size limit in bytes."""

    def __init__(self, folder: Path, identity: SpanIdentity, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self.identity = identity
        self.max_bytes = max_bytes
        self.hits = 0
        self._used: list[Path] = []

    def load(self, span: Generate) -> Float[Tensor, "1 c t h w"] | None:
        """The latents of a span, if they are cached and the file is intact."""
        path = self._path(span)
        try:
            latent = load_file(path)["latent"]
            path.touch()
            self._used.append(path)
        except (OSError, SafetensorError, KeyError):
            return None
        self.hits += 1
        return latent

    def save(self, span: Generate, latent: Float[Tensor, "1 c t h w"]) -> None:
        """Cache a span's latents. Write errors are ignored."""
        path = self._path(span)
        with suppress(OSError, SafetensorError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({"latent": latent.contiguous()}, temporary)
            self._used.append(path)
            self._prune()

    def remove_used(self) -> None:
        """Remove every span that was saved or loaded, after moderation blocked the video."""
        for path in self._used:
            path.unlink(missing_ok=True)

    def _path(self, span: Generate) -> Path:
        text = json.dumps(self.identity.of(span), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _prune(self) -> None:
        files = sorted(
            self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True
        )
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > self.max_bytes:
                path.unlink(missing_ok=True)
