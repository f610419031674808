"""Latents of spans that were made before, found by what made them: an edit that changes makes only what changed.

A folder that may be deleted at any time. Its files are named after a digest of everything that a span hangs on: prompt,
seed, steps, weights, and the very frames that it sees. When it grows beyond its bound, the oldest go.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from skyloom.generate.timeline import Generate

CACHE_VARIABLE = "SKYLOOM_CACHE"
MAX_BYTES = 2 * 2**30
_STORED_NAMES = {"init_clips": "under", "mix_shares": "shares"}  # as in existing caches


def cache_folder() -> Path | None:
    """Where skyloom may keep what it can make again; None where SKYLOOM_CACHE is "off"."""
    said = os.environ.get(CACHE_VARIABLE)
    if said == "off":
        return None
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(said) if said else (Path(base) if base else Path.home() / ".cache") / "skyloom"


@dataclass(frozen=True)
class SpanIdentity:
    """What makes a span of an edit the same: `about` says what it hangs on besides its own words, `clips` what each
    source is."""

    about: Mapping[str, Any]
    clips: Sequence[str]

    def of(self, span: Generate) -> dict[str, Any]:
        """Everything that a span's latents hang on, as JSON has it."""
        values = {_STORED_NAMES.get(name, name): value for name, value in asdict(span).items()}
        for clip in (values["before"], values["after"], *values["under"]):
            if clip is not None:
                clip["source"] = self.clips[clip["source"]]
        return {"about": dict(self.about), "span": values}


class SpanStore:
    """Latents of made spans."""

    def __init__(self, folder: Path, identity: SpanIdentity, most: int = MAX_BYTES) -> None:
        self.folder, self.identity, self.most = folder, identity, most
        self.found = 0
        self._used: list[Path] = []

    def load(self, span: Generate) -> Float[Tensor, "1 c t h w"] | None:
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

    def save(self, span: Generate, latent: Float[Tensor, "1 c t h w"]) -> None:
        """Keep a span; where that is not possible, it will be made again."""
        path = self._path(span)
        partial = path.with_suffix(f".{os.getpid()}.part")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({"latent": latent.contiguous()}, partial)
            partial.replace(path)
            self._used.append(path)
            self._prune()
        except (OSError, SafetensorError):
            with suppress(OSError):
                partial.unlink()

    def forget(self) -> None:
        """Remove every span that was saved or found: the policy refuses to show one of them."""
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
            if total > self.most:
                path.unlink(missing_ok=True)
