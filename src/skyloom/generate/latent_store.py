# pyright: basic
"""Latents on disk: checkpoints of a generation, and a cache of finished windows.

A crash loses no finished step. A folder of checkpoints holds the receipt of the request and one
folder per run of windows, with the clean latent of every finished window and, for the current one,
the sampler's states after the last steps of each take. Everything else is recomputed bit for bit:
noise is drawn from the seed, window and take; key-value and decoder caches are refilled from the
finished latents. Files are written atomically and carry a sha256 of their name, the receipt and
their content; a damaged file counts as missing.

The cache is shared by all videos: a changed edit or storyboard generates only what changed. Its
file names are digests of all that determines a window. When it exceeds its size limit, the least
recently used files are removed; it may be deleted at any time.
"""

import contextlib
import errno
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from skyloom.core.errors import DiskFullError, MediaError, RequestError, SafetyError
from skyloom.core.files import TEMPORARY_SUFFIX, write_atomically
from skyloom.core.tensor_files import read_tensors, remove_least_recently_used, write_tensors

_IDENTITY_FILE = "asked.json"  # name and key are those of existing folders
_IDENTITY_KEY = "asked"
_OLD_TEMPORARY_SUFFIX = ".part"  # of version 0.1.0
_STATES = (
    "window-*.state",
    "step-*.state",
    f"*{_OLD_TEMPORARY_SUFFIX}",
    f"*{TEMPORARY_SUFFIX}",
)
_RUNS = "span-*"
MAX_CACHE_BYTES = 2 * 2**30
_STATE_NAMES = ("latent", "history-1", "history-2", "history-3")  # SampleStep.state in order
_STEPS_KEPT = 2  # the latest step, and the one before in case that it is damaged
_StepT = TypeVar("_StepT")


@dataclass(frozen=True, eq=False)
class FinishedWindow:
    """A finished window: clean latent, number of the accepted take, scores of every take."""

    latent: Float[Tensor, "1 c t h w"]
    take: int = 0
    scores: Sequence[Mapping[str, Any]] = ()


class WindowCache:
    """A folder of finished windows by key, with a size limit in bytes. Write errors are ignored."""

    def __init__(self, folder: Path, max_bytes: int = MAX_CACHE_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._used: list[Path] = []

    def load(self, key: str) -> FinishedWindow | None:
        """A window, if it is cached and the file is intact."""
        path = self._path(key)
        tensors = read_tensors(path, key.encode())
        if tensors is None:
            return None
        with contextlib.suppress(OSError):
            path.touch()
        self._used.append(path)
        return _unpack(tensors)

    def save(self, key: str, window: FinishedWindow) -> None:
        """Cache a window and remove the least recently used ones above the limit."""
        path = self._path(key)
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(path, key.encode(), _pack(window))
            self._used.append(path)
            self._prune()

    def remove_used(self) -> None:
        """Remove every window that was saved or loaded, after moderation blocked the video."""
        for path in self._used:
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.state"

    def _prune(self) -> None:
        patterns = ("*.state", "*.safetensors")  # the latter are of version 0.1.0
        files = [path for pattern in patterns for path in self.folder.glob(pattern)]
        remove_least_recently_used(files, self.max_bytes)


class WindowStore:
    """Windows of a run, or of the runs of a video: checkpoints in `folder`, and a `cache`.

    The folder belongs to one `identity` (a receipt, as JSON values). `keys` are the cache's keys of
    the windows; without a cache, windows are only in the folder, and without a folder only in the
    cache.

    States are written at most every `interval` seconds, together; 0 writes every step at once.
    `flush` writes what is pending. Raises RequestError if the folder belongs to another identity,
    MediaError if it cannot be written.
    """

    def __init__(
        self,
        folder: Path | None,
        identity: Mapping[str, Any],
        interval: float = 0.0,
        *,
        cache: WindowCache | None = None,
        keys: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        self.cache = cache
        self._keys = keys
        self._interval = interval
        self._last_write = time.monotonic()
        self._pending: dict[Path, dict[str, Tensor]] = {}
        self._runs: list[WindowStore] = []
        self._identity = json.dumps(identity, sort_keys=True).encode()
        if folder is None:
            return
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

    def run(self, number: int, keys: Sequence[str]) -> "WindowStore":
        """The store of a run, in a folder inside this one."""
        folder = None if self.folder is None else self.folder / f"span-{number:03}"
        identity = {**json.loads(self._identity), "run": number}
        store = WindowStore(folder, identity, self._interval, cache=self.cache, keys=keys)
        self._runs.append(store)
        return store

    def load(self, index: int) -> FinishedWindow | None:
        """A window, if it was finished."""
        path = self._window_path(index)
        tensors = None if path is None else read_tensors(path, self._identity)
        if tensors is not None:
            return _unpack(tensors)
        return None if self.cache is None else self.cache.load(self._keys[index])

    def save(self, index: int, window: FinishedWindow) -> None:
        """Save a finished window and drop its steps. Raises like `flush`."""
        if self.cache is not None:
            self.cache.save(self._keys[index], window)
        self._drop_pending(f"step-{index:06}-")
        self._add(self._window_path(index), _pack(window))

    def load_step(
        self, index: int, take: int
    ) -> tuple[int, tuple[Float[Tensor, "1 c t h w"], ...]] | None:
        """The number of finished steps of a take, and the sampler's state after them."""
        if self.folder is None:
            return None
        for path in sorted(self.folder.glob(f"step-{index:06}-{take:03}-*.state"), reverse=True):
            tensors = read_tensors(path, self._identity)
            if tensors is not None:
                state = (tensors[name] for name in sorted(tensors, key=_STATE_NAMES.index))
                return int(path.stem.rsplit("-", 1)[1]), tuple(state)
        return None

    def save_step(
        self, index: int, take: int, done: int, state: Sequence[Float[Tensor, "1 c t h w"]]
    ) -> None:
        """Save the sampler's state after `done` steps. Raises like `flush`."""
        self._drop_pending(f"step-{index:06}-{take:03}-")
        tensors: dict[str, Tensor] = dict(zip(_STATE_NAMES, state, strict=False))
        self._add(self._step_path(index, take, done), tensors)

    def flush(self) -> None:
        """Write pending states, of runs too. Raises MediaError or DiskFullError."""
        for run in self._runs:
            run.flush()
        for path, tensors in self._pending.items():
            self._save(path, tensors)
            self._remove_old_steps(path)
        self._pending.clear()
        self._last_write = time.monotonic()

    def discard(self) -> None:
        """Delete all checkpoints and the used part of the cache, after a refusal."""
        if self.folder is not None:
            clear(self.folder)
        if self.cache is not None:
            self.cache.remove_used()

    def guard(self, steps: Iterator[_StepT]) -> Iterator[_StepT]:
        """Yield the steps of a video; write what is pending if the consumer stops early.

        After a SafetyError nothing is kept.
        """
        try:
            yield from steps
        except GeneratorExit:
            self.flush()
            raise
        except SafetyError:
            self.discard()
            raise

    def _remove_old_steps(self, path: Path) -> None:
        """Remove steps that a state replaces: all of a window, or older ones of a take."""
        kind, *numbers = path.stem.split("-")
        if kind == "window":
            replaced = sorted(path.parent.glob(f"step-{numbers[0]}-*.state"))
        else:
            steps = sorted(path.parent.glob(f"step-{numbers[0]}-{numbers[1]}-*.state"))
            replaced = steps[:-_STEPS_KEPT]
        for old in replaced:
            old.unlink(missing_ok=True)

    def _add(self, path: Path | None, tensors: dict[str, Tensor]) -> None:
        if path is None:
            return
        self._pending[path] = tensors
        if time.monotonic() - self._last_write >= self._interval:
            self.flush()

    def _drop_pending(self, prefix: str) -> None:
        """Drop pending states whose file names begin with `prefix`."""
        self._pending = {
            path: state for path, state in self._pending.items() if not path.name.startswith(prefix)
        }

    def _window_path(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"window-{index:06}.state"

    def _step_path(self, index: int, take: int, done: int) -> Path | None:
        name = f"step-{index:06}-{take:03}-{done:04}.state"
        return None if self.folder is None else self.folder / name

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        try:
            write_tensors(path, self._identity, tensors)
        except OSError as error:
            hint = "Free some space and run the same command again."
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError("The disk is full.", hint=hint) from error
            raise MediaError(f"{path} cannot be written ({error}).", hint=hint) from error


def _pack(window: FinishedWindow) -> dict[str, Tensor]:
    note = {"take": window.take, "said": [dict(scores) for scores in window.scores]}
    encoded = torch.tensor(list(json.dumps(note).encode()), dtype=torch.uint8)
    return {"latent": window.latent, "note": encoded}


def _unpack(tensors: Mapping[str, Tensor]) -> FinishedWindow:
    note = json.loads(bytes(tensors["note"].tolist()))
    return FinishedWindow(tensors["latent"], note["take"], note["said"])


def clear(folder: Path) -> None:
    """Remove the checkpoints of a finished video, and their folder if it is then empty."""
    for run in folder.glob(_RUNS):
        clear(run)
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
