"""A rollout's state on disk, so that a crash costs no step that was finished.

A folder holds what was asked, the clean latent of every finished window and, of the window in the making, the latent
after the last steps of each take; an edit's folder holds such a folder for every span that is made. Everything else
follows from these, bit for bit: noise is drawn again from its path (seed, window, take), which is all the state that
the random numbers have; memory and decoder are fed with the finished latents again, which is quick. Every file is
written whole or not at all and carries a sha256 of its name, of what was asked and of its content: one that was torn
or changed counts as not there, and the state before it is taken.
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

_ASKED = "asked.json"
_OLD_TEMPORARY_SUFFIX = ".part"  # of version 0.1.0
_STATES = (
    "window-*.state",
    "step-*.state",
    f"*{_OLD_TEMPORARY_SUFFIX}",
    f"*{TEMPORARY_SUFFIX}",
)
_PARTS = "span-*"
_DIGEST_BYTES = hashlib.sha256().digest_size
_STEPS_KEPT = 2  # the latest one, and the one before in case that it is damaged


@dataclass(frozen=True, eq=False)
class Kept:
    """A finished window: its clean latent, which take of it that is, and what was said of every take."""

    latent: Float[Tensor, "1 c t h w"]
    take: int = 0
    said: Sequence[Mapping[str, Any]] = ()


class WindowStore:
    """A folder for one request and the weights that answer it. Raises RequestError if it holds another's windows,
    MediaError if it cannot be written.

    What is done within `every` seconds goes to the disk together, so that keeping it costs a quick model little; 0
    writes every step at once. `flush` writes what is not on disk yet.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], every: float = 0.0) -> None:
        self.folder = folder
        self._every, self._written = every, time.monotonic()
        self._waiting: dict[Path, dict[str, Tensor]] = {}
        self._spans: list[WindowStore] = []
        self._asked = json.dumps(asked, sort_keys=True).encode()
        found, wanted = read_asked(folder), json.loads(self._asked)
        if found is not None and found != wanted:
            raise RequestError(
                f"{folder} holds another video: {_difference(found, wanted)}.",
                hint="Ask for that one, or name another folder.",
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if found is None:
                write_atomically(
                    folder / _ASKED,
                    json.dumps({"asked": wanted, "sha256": _digest(wanted)}).encode(),
                )
        except OSError as error:
            raise MediaError(
                f"{folder} cannot be written.", hint="Choose another folder."
            ) from error

    def span(self, number: int, asked: Mapping[str, Any]) -> "WindowStore":
        """The folder of a span of an edit, inside of this one. Raises what a new one raises."""
        self._spans.append(WindowStore(self.folder / f"span-{number:03}", asked, self._every))
        return self._spans[-1]

    def load(self, index: int) -> Kept | None:
        """A window, if it was finished."""
        tensors = self._read(self._window(index))
        if tensors is None:
            return None
        note = json.loads(bytes(tensors["note"].tolist()))
        return Kept(tensors["latent"], note["take"], note["said"])

    def save(self, index: int, kept: Kept) -> None:
        """Keep a finished window; its steps are not needed any more. Raises like `flush`."""
        note = json.dumps({"take": kept.take, "said": [dict(one) for one in kept.said]}).encode()
        self._forget(f"step-{index:06}-")
        self._keep(
            self._window(index),
            {"latent": kept.latent, "note": torch.tensor(list(note), dtype=torch.uint8)},
        )

    def load_step(self, index: int, take: int) -> tuple[int, Float[Tensor, "1 c t h w"]] | None:
        """How many steps of a take of a window were done, and the latent after them."""
        for path in sorted(self.folder.glob(f"step-{index:06}-{take:03}-*.state"), reverse=True):
            tensors = self._read(path)
            if tensors is not None:
                return int(path.stem.rsplit("-", 1)[1]), tensors["latent"]
        return None

    def save_step(
        self, index: int, take: int, done: int, latent: Float[Tensor, "1 c t h w"]
    ) -> None:
        """Keep the latent after `done` steps. Raises like `flush`."""
        self._forget(f"step-{index:06}-{take:03}-")
        self._keep(self._step(index, take, done), {"latent": latent})

    def flush(self) -> None:
        """Write what waits, of spans too. Raises MediaError, or DiskFullError when the disk is full."""
        for span in self._spans:
            span.flush()
        for path, tensors in self._waiting.items():
            self._save(path, tensors)
            kind, *numbers = path.stem.split("-")
            of_take, last = ("", None) if kind == "window" else (f"{numbers[1]}-", -_STEPS_KEPT)
            for old in sorted(self.folder.glob(f"step-{numbers[0]}-{of_take}*.state"))[:last]:
                old.unlink(missing_ok=True)
        self._waiting.clear()
        self._written = time.monotonic()

    def _keep(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self._waiting[path] = tensors
        if time.monotonic() - self._written >= self._every:
            self.flush()

    def _forget(self, begins: str) -> None:
        """What waits and was overtaken."""
        self._waiting = {
            path: state for path, state in self._waiting.items() if not path.name.startswith(begins)
        }

    def _window(self, index: int) -> Path:
        return self.folder / f"window-{index:06}.state"

    def _step(self, index: int, take: int, done: int) -> Path:
        return self.folder / f"step-{index:06}-{take:03}-{done:04}.state"

    def _save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        body = safetensors.torch.save(
            {name: tensor.contiguous() for name, tensor in tensors.items()}
        )
        try:
            write_atomically(path, self._seal(path, body) + body)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskFullError(
                    "The disk is full.", hint="Free some space and go on."
                ) from error
            raise MediaError(
                f"{path} cannot be written ({error}).", hint="Free some space and go on."
            ) from error

    def _read(self, path: Path) -> dict[str, Tensor] | None:
        """What a state holds; None if there is none, or none that is whole."""
        try:
            content = path.read_bytes()
            seal, body = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            return safetensors.torch.load(body) if seal == self._seal(path, body) else None
        except (OSError, SafetensorError):
            return None

    def _seal(self, path: Path, body: bytes) -> bytes:
        parts = (self._asked, path.name.encode(), body)
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).digest()


def clear(folder: Path) -> None:
    """Remove the windows of a video that is done, and their folder if nothing else lies in it."""
    for part in folder.glob(_PARTS):
        clear(part)
    for path in [*(path for pattern in _STATES for path in folder.glob(pattern)), folder / _ASKED]:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def read_asked(folder: Path) -> dict[str, Any] | None:
    """What the windows in a folder belong to; None for a folder without any. Raises RequestError for other files."""
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is no folder.", hint="Name an empty folder, or a new one.")
    if not folder.is_dir() or all(
        path.suffix in {_OLD_TEMPORARY_SUFFIX, TEMPORARY_SUFFIX} for path in folder.iterdir()
    ):
        return None  # it is new, or was stopped before the first word
    try:
        written = json.loads((folder / _ASKED).read_bytes())
        if written["sha256"] == _digest(written["asked"]):
            return dict(written["asked"])
    except FileNotFoundError as error:
        raise RequestError(
            f"{folder} holds other files.", hint="Name an empty folder, or a new one."
        ) from error
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RequestError(
        f"{folder / _ASKED} is damaged.", hint="Remove that folder, or name another one."
    )


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first thing in which two requests differ, else two receipts."""
    for there, here in ((found.get("request", {}), wanted.get("request", {})), (found, wanted)):
        for name in [*there, *here]:
            if there.get(name) != here.get(name):
                return f"its `{name}` is {there.get(name)!r:.60}, not {here.get(name)!r:.60}"
    return "its receipt is another"


def _digest(asked: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
