"""Latents of spans that were made before, found by what made them: an edit that changes makes only what changed.

A folder that may be deleted at any time. Its files are named after a digest of everything that a span hangs on: prompt,
seed, steps, weights, and the very frames that it sees. When it grows beyond its bound, the oldest go.
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
from skyloom.generate.timeline import Make

MAX_BYTES = 2 * 2**30


@dataclass(frozen=True)
class SpanIdentity:
    """What makes a span of an edit the same: `about` says what it hangs on besides its own words, `clips` what each
    source is."""

    about: Mapping[str, Any]
    clips: Sequence[str]

    def of(self, span: Make) -> dict[str, Any]:
        """Everything that a span's latents hang on, as JSON has it."""
        told = asdict(span)
        for clip in (told["before"], told["after"], *told["under"]):
            if clip is not None:
                clip["source"] = self.clips[clip["source"]]
        return {"about": dict(self.about), "span": told}


class SpanStore:
    """Latents of made spans."""

    def __init__(self, folder: Path, identity: SpanIdentity, most: int = MAX_BYTES) -> None:
        self.folder, self.identity, self.most = folder, identity, most
        self.found = 0
        self._used: list[Path] = []

    def load(self, span: Make) -> Float[Tensor, "1 c t h w"] | None:
        """The latents of a span, if it was made before and its file is whole."""
        path = self._path(span)
        try:
            latent = load_file(path)["latent"]
            path.touch()
            self._used.append(path)
        except (OSError, SafetensorError, KeyError):
            return None
        self.found += 1
        return latent

    def save(self, span: Make, latent: Float[Tensor, "1 c t h w"]) -> None:
        """Keep a span; where that is not possible, it will be made again."""
        path = self._path(span)
        with suppress(OSError, SafetensorError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                save_file({"latent": latent.contiguous()}, temporary)
            self._used.append(path)
            self._prune()

    def forget(self) -> None:
        """Remove every span that was saved or found: the policy refuses to show one of them."""
        for path in self._used:
            path.unlink(missing_ok=True)

    def _path(self, span: Make) -> Path:
        text = json.dumps(self.identity.of(span), sort_keys=True)
        return self.folder / f"{hashlib.sha256(text.encode()).hexdigest()}.safetensors"

    def _prune(self) -> None:
        files = sorted(
            self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime, reverse=True
        )
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > self.most:
                path.unlink(missing_ok=True)
