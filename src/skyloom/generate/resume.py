# pyright: basic
"""Checkpoints of a generation on disk, so that a crash loses no finished step.

A folder holds the receipt of the request, the clean latent of every finished window and, for the
current window, the latents after the last steps of each take. An edit's folder has one such folder
per generated span. Everything else is recomputed bit for bit: noise is drawn from the seed, window
and take; key-value and decoder caches are refilled from the finished latents. Files are written
atomically and carry a sha256 of their name, the receipt and their content; a damaged file counts
as missing.
"""

import contextlib
import errno
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor

from skyloom.core.errors import DiskFullError, MediaError, RequestError
from skyloom.core.files import TEMPORARY_SUFFIX, write_atomically

_IDENTITY_FILE = "asked.json"  # name and key are those of existing folders
_IDENTITY_KEY = "asked"
_OLD_TEMPORARY_SUFFIX = ".part"  # of version 0.1.0
_STATES = (
    "window-*.state",
    "step-*.state",
    f"*{_OLD_TEMPORARY_SUFFIX}",
    f"*{TEMPORARY_SUFFIX}",
)
_SPANS = "span-*"
_DIGEST_BYTES = hashlib.sha256().digest_size
_STEPS_KEPT = 2  # the latest step, and the one before in case that it is damaged


@dataclass(frozen=True, eq=False)
class FinishedWindow:
    """A finished window: clean latent, number of the accepted take, scores of every take."""

    latent: Float[Tensor, "1 c t h w"]
    take: int = 0
    scores: Sequence[Mapping[str, Any]] = ()


class WindowStore:
    """A folder of checkpoints that belongs to one `identity` (a receipt or span, as JSON values).

    States are written at most every `interval` seconds, together; 0 writes every step at once.
    `flush` writes what is pending. Raises RequestError if the folder belongs to another identity,
    MediaError if it cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], interval: float = 0.0) -> None:
        self.folder = folder
        self._interval = interval
        self._last_write = time.monotonic()
        self._pending: dict[Path, dict[str, Tensor]] = {}
        self._spans: list[WindowStore] = []
        self._identity = json.dumps(identity, sort_keys=True).encode()
        stored = read_identity(folder)
        expected = json.loads(self._identity)
        if stored is not None and stored != expected:
            raise RequestError(
                f"{folder} belongs to another video: {_difference(stored, expected)}.",
                hint="Repeat that request, or choose another folder.",
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if stored is None:
                content = {_IDENTITY_KEY: expected, "sha256": _digest(expected)}
                write_atomically(folder / _IDENTITY_FILE, json.dumps(content).encode())
        except OSError as error:
            raise MediaError(
                f"{folder} cannot be written.", hint="Choose another folder."
            ) from error

    def span(self, number: int, identity: Mapping[str, Any]) -> "WindowStore":
        """The store of an edit's span, in a folder inside this one."""
        store = WindowStore(self.folder / f"span-{number:03}", identity, self._interval)
        self._spans.append(store)
        return store

    def load(self, index: int) -> FinishedWindow | None:
        """A window, if it was finished."""
        tensors = self._read(self._window_path(index))
        if tensors is None:
            return None
        note = json.loads(bytes(tensors["note"].tolist()))
        return FinishedWindow(tensors["latent"], note["take"], note["said"])

    def save(self, index: int, window: FinishedWindow) -> None:
        """Save a finished window and drop its steps. Raises like `flush`."""
        note = {"take": window.take, "said": [dict(scores) for scores in window.scores]}
        encoded = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
        self._drop_pending(f"step-{index:06}-")
        self._add(self._window_path(index), {"latent": window.latent, "note": encoded})

    def load_step(self, index: int, take: int) -> tuple[int, Float[Tensor, "1 c t h w"]] | None:
        """The number of finished steps of a take, and the latent after them."""
        for path in sorted(self.folder.glob(f"step-{index:06}-{take:03}-*.state"), reverse=True):
            tensors = self._read(path)
            if tensors is not None:
                return int(path.stem.rsplit("-", 1)[1]), tensors["latent"]
        return None

    def save_step(
        self, index: int, take: int, done: int, latent: Float[Tensor, "1 c t h w"]
    ) -> None:
        """Save the latent after `done` steps. Raises like `flush`."""
        self._drop_pending(f"step-{index:06}-{take:03}-")
        self._add(self._step_path(index, take, done), {"latent": latent})

    def flush(self) -> None:
        """Write pending states, of spans too. Raises MediaError or DiskFullError."""
        for span in self._spans:
            span.flush()
        for path, tensors in self._pending.items():
            self._save(path, tensors)
            self._remove_old_steps(path)
        self._pending.clear()
        self._last_write = time.monotonic()

    def _remove_old_steps(self, path: Path) -> None:
        """Remove steps that a state replaces: all of a window, or older ones of a take."""
        kind, *numbers = path.stem.split("-")
        if kind == "window":
            replaced = sorted(self.folder.glob(f"step-{numbers[0]}-*.state"))
        else:
            steps = sorted(self.folder.glob(f"step-{numbers[0]}-{numbers[1]}-*.state"))
            replaced = steps[:-_STEPS_KEPT]
        for old in replaced:
            old.unlink(missing_ok=True)

    def _add(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self._pending[path] = tensors
        if time.monotonic() - self._last_write >= self._interval:
            self.flush()

    def _drop_pending(self, prefix: str) -> None:
        """Drop pending states whose file names begin with `prefix`."""
        self._pending = {
            path: state for path, state in self._pending.items() if not path.name.startswith(prefix)
        }

    def _window_path(self, index: int) -> Path:
        return self.folder / f"window-{index:06}.state"

    def _step_path(self, index: int, take: int, done: int) -> Path:
        return self.folder / f"step-{index:06}-{take:03}-{done:04}.state"

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        body = safetensors.torch.save(
            {name: tensor.contiguous() for name, tensor in tensors.items()}
        )
        try:
            write_atomically(path, self._seal(path, body) + body)
        except OSError as error:
            hint = "Free some space and run the same command again."
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError("The disk is full.", hint=hint) from error
            raise MediaError(f"{path} cannot be written ({error}).", hint=hint) from error

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        """The tensors of a state; None if it is missing or damaged."""
        try:
            content = path.read_bytes()
            seal = content[:_DIGEST_BYTES]
            body = content[_DIGEST_BYTES:]
            return safetensors.torch.load(body) if seal == self._seal(path, body) else None
        except (OSError, SafetensorError):
            return None

    def _seal(self, path: Path, body: bytes) -> bytes:
        parts = (self._identity, path.name.encode(), body)
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def clear(folder: Path) -> None:
    """Remove the checkpoints of a finished video, and their folder if it is then empty."""
    for span in folder.glob(_SPANS):
        clear(span)
    states = [path for pattern in _STATES for path in folder.glob(pattern)]
    for path in [*states, folder / _IDENTITY_FILE]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def read_identity(folder: Path) -> dict[str, Any] | None:
    """The identity that a folder's checkpoints belong to; None for a new or empty folder.

    Raises RequestError if the folder holds other files.
    """
    hint = "Choose an empty folder, or a new one."
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} must be a folder.", hint=hint)
    temporary = {_OLD_TEMPORARY_SUFFIX, TEMPORARY_SUFFIX}
    if not folder.is_dir() or all(path.suffix in temporary for path in folder.iterdir()):
        return None  # the folder is new, or was stopped before the first file was in place
    try:
        content = json.loads((folder / _IDENTITY_FILE).read_bytes())
        if content["sha256"] == _digest(content[_IDENTITY_KEY]):
            return dict(content[_IDENTITY_KEY])
    except FileNotFoundError as error:
        raise RequestError(f"{folder} holds other files.", hint=hint) from error
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RequestError(
        f"{folder / _IDENTITY_FILE} is damaged.", hint="Remove that folder, or choose another one."
    )


def _difference(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The first key in which two requests differ, else two receipts."""
    pairs = ((stored.get("request", {}), expected.get("request", {})), (stored, expected))
    for old, new in pairs:
        for name in [*old, *new]:
            if old.get(name) != new.get(name):
                return f"its `{name}` is {old.get(name)!r:.60}, not {new.get(name)!r:.60}"
    return "its receipt differs"


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
