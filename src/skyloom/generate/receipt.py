"""The receipt: what made a video, enough to make it again and to prove that it came out the same.

It travels in the video file's own comment and, where asked for, in a sidecar beside it (media/write.py). The digest
is taken of the frames as they were made, before any codec, so that a lossy file can still be proven.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import MediaError, RequestError
from skyloom.core.files import sha256_file
from skyloom.core.version import __version__
from skyloom.generate.plan import Plan
from skyloom.generate.request import Request
from skyloom.generate.timeline import Keep
from skyloom.media.read import is_sidecar, read_sidecar
from skyloom.media.source import open_source
from skyloom.media.write import sidecar_of
from skyloom.models.registry import ModelInfo

_AXES = "thwc"


@dataclass(frozen=True)
class FramesDigest:
    """The sha256 of raw uint8 frames in their order, their shape (t, h, w, c) and their rate."""

    sha256: str
    shape: tuple[int, ...]
    fps: Fraction


class FramesHash:
    """Takes a video's frames in order, some at a time; `digest` is the same however they were cut."""

    def __init__(self, fps: Fraction) -> None:
        self._hash, self._fps, self._shape = hashlib.sha256(), fps, (0, 0, 0, 0)

    def add(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Take the next frames."""
        if len(frames):
            self._shape = (self._shape[0] + len(frames), *frames.shape[1:])
            self._hash.update(frames.cpu().contiguous().numpy().data)

    def digest(self) -> FramesDigest:
        """Of what was taken so far."""
        return FramesDigest(self._hash.hexdigest(), self._shape, self._fps)


@dataclass(frozen=True)
class Parent:
    """A file that a video was made from: its sha256, what it was used as, and the verb that used it."""

    sha256: str
    role: str
    verb: str


@dataclass(frozen=True)
class Receipt:
    """How a video was made. `request` has every default filled in, the seed too; `weights` is one digest of the
    model's files; `image` is the sha256 of the picture it started from; `notes` hold whatever else there is to say.
    What a receipt does not say is "" or None, and `extra` keeps the keys that only a newer skyloom knows.
    """

    skyloom: str
    request: Request
    model: str
    weights: str
    torch: str = ""
    device: str = ""
    dtype: str = ""
    image: str | None = None
    frames: FramesDigest | None = None
    parents: tuple[Parent, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them; what the receipt does not say is left out."""
        values: dict[str, Any] = {
            "skyloom": self.skyloom,
            "request": self.request.to_dict(),
            "model": self.model,
        }
        values |= {
            "weights": self.weights,
            "torch": self.torch,
            "device": self.device,
            "dtype": self.dtype,
        }
        values |= {"image": self.image, "parents": [vars(parent) for parent in self.parents]}
        values["notes"] = dict(self.notes)
        if self.frames is not None:
            shape, fps = list(self.frames.shape), str(self.frames.fps)
            values["frames"] = {"sha256": self.frames.sha256, "shape": shape, "fps": fps}
        return {
            **self.extra,
            **{key: value for key, value in values.items() if value not in ("", None)},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Receipt":
        """The inverse of `to_dict`; receipts of version 0.1, with a table of weights, are read too.

        Raises MediaError for a receipt that lacks something, or holds a value of the wrong kind.
        """
        try:
            return cls._parsed(dict(values))
        except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            cause = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise MediaError(
                f"The receipt is damaged ({cause:.120}).", hint="Ask for the original file."
            ) from error
        except RequestError as error:
            made = (
                f"It was made by skyloom {str(values.get('skyloom'))[:20]}, this is {__version__}."
            )
            raise MediaError(
                f"The receipt's request cannot be read: {error.message}", hint=made
            ) from error

    @classmethod
    def _parsed(cls, values: dict[str, Any]) -> "Receipt":
        request = Request.from_dict(_table(values.pop("request")))
        weights = values.pop("weights")
        digest = weights if isinstance(weights, str) else weights_digest(_table(weights))
        frames = values.pop("frames", None)
        told: dict[str, Any] = {
            "model": _text(values.pop("model", request.model or "")),
            "frames": None if frames is None else _frames(_table(frames)),
            "parents": tuple(
                Parent(**_texts(_table(parent))) for parent in values.pop("parents", [])
            ),
            "notes": _table(values.pop("notes", {})),
        }
        told |= {
            name: _text(values.pop(name))
            for name in ("torch", "device", "dtype", "image")
            if name in values
        }
        return cls(_text(values.pop("skyloom")), request, weights=digest, **told, extra=values)


def make_receipt(
    plan: Plan,
    info: ModelInfo,
    device: torch.device,
    dtype: torch.dtype,
    frames: FramesDigest | None = None,
    *,
    parents: tuple[Parent, ...] = (),
    notes: Mapping[str, Any] | None = None,
) -> Receipt:
    """What a pipeline says about a video that it made. Raises MediaError when the picture to start from is gone."""
    asked = (
        plan.request
        if plan.timeline
        else replace(plan.request, seconds=plan.seconds, fps=float(plan.fps))
    )
    filled = replace(
        asked, model=info.name, size=plan.request.size if plan.timeline else plan.shape.size
    )
    if asked.samples:
        quality = "fast" if plan.student else "best"
        sampled = {
            "num_steps": plan.num_steps,
            "guidance_scale": plan.guidance_scale,
            "quality": quality,
        }
        filled = replace(filled, seed=plan.seed, **sampled)
    pinned = tuple(
        Parent(hash_picture(Path(one.pinned)), "video" if one.card.video else "image", "storyboard")
        for one in plan.cards
        if one.pinned
    )
    return Receipt(
        __version__,
        filled,
        info.name,
        weights_digest(info.manifest.get("files", {})),
        torch=str(torch.__version__),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        image=None if plan.request.image is None else hash_picture(Path(plan.request.image)),
        frames=frames,
        parents=(*parents, *pinned, *_sources(plan)),
        notes={**(notes or {}), **_edited(plan)},
    )


def _sources(plan: Plan) -> Iterator[Parent]:
    """The videos of an edit in their order, then its mask."""
    edit = plan.request.edit
    if edit is None or plan.footage is None:
        return
    for source in plan.footage.sources:
        yield Parent(source.sha256, "video", edit.verb)
    if edit.mask is not None:
        yield Parent(hash_picture(Path(edit.mask)), "mask", edit.verb)


def _edited(plan: Plan) -> dict[str, Any]:
    """What an edit kept and made, in frames, and what was done to its sources."""
    if plan.timeline is None or plan.footage is None:
        return {}
    spans, at = [], 0
    for span in plan.timeline.spans:
        spans.append([at, at + span.frames, "kept" if isinstance(span, Keep) else "made"])
        at += span.frames
    notices = list(plan.footage.notices)
    return {"spans": spans, **({"notices": notices} if notices else {})}


def read_receipt(path: Path) -> Receipt:
    """The receipt in a video, else in the sidecar beside it, or in a sidecar given itself.

    Raises MediaError for what is no video, holds no receipt, or holds a damaged one.
    """
    if is_sidecar(path):
        return Receipt.from_dict(read_sidecar(path))
    values = open_source(path).receipt
    if not values and sidecar_of(path).exists():
        values = read_sidecar(sidecar_of(path))
    if not values:
        hint = "Only videos that skyloom made, and that were not made with --no-receipt, have one."
        raise MediaError(f"{path} holds no receipt.", hint=hint)
    return Receipt.from_dict(values)


def weights_digest(files: Mapping[str, str]) -> str:
    """One sha256 over the names and hashes of a model's files."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def hash_picture(path: Path) -> str:
    """The sha256 of a file that a video is made from. Raises MediaError when it cannot be read."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error


def _frames(values: Mapping[str, Any]) -> FramesDigest:
    shape = tuple(values["shape"])
    if len(shape) != len(_AXES) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"frames of shape {shape}")
    return FramesDigest(_text(values["sha256"]), shape, Fraction(_text(values["fps"])))


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.40} is no table")
    return dict(value)


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items()}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value
