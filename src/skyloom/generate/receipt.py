# pyright: basic
"""The receipt of a video: everything needed to generate it again and verify the result.

It is stored in the video file's comment and, optionally, in a sidecar (media/write.py). Its digest
covers the raw frames before encoding, so a lossy file can be verified too.
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
from skyloom.generate.source_prompts import timeline_prompts
from skyloom.media.read import is_sidecar, read_sidecar
from skyloom.media.source import open_source
from skyloom.media.write import sidecar_of
from skyloom.models.registry import ModelInfo

_AXES = "thwc"


@dataclass(frozen=True)
class FramesDigest:
    """The sha256 of raw uint8 frames, their shape (t, h, w, c) and frame rate."""

    sha256: str
    shape: tuple[int, ...]
    fps: Fraction


class FramesHash:
    """Incremental digest of a video's frames, independent of how they are chunked."""

    def __init__(self, fps: Fraction) -> None:
        self._hash = hashlib.sha256()
        self._fps = fps
        self._shape: tuple[int, ...] = (0, 0, 0, 0)

    def add(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Add the next frames."""
        if len(frames):
            self._shape = (self._shape[0] + len(frames), *frames.shape[1:])
            self._hash.update(frames.cpu().contiguous().numpy().data)

    def digest(self) -> FramesDigest:
        """The digest of the frames so far."""
        return FramesDigest(self._hash.hexdigest(), self._shape, self._fps)


@dataclass(frozen=True)
class Parent:
    """A source file: its sha256, its role ("video", "image", "mask") and the verb that used it."""

    sha256: str
    role: str
    verb: str


@dataclass(frozen=True)
class Receipt:
    """Record of how a video was generated.

    `request` has every default filled in, including the seed. `weights` is one digest of the
    model's files. `image` is the sha256 of the first picture. `loras` have name, weight and sha256.
    `notes` hold measurements and warnings. Missing values are "" or None. `extra` keeps keys of
    newer versions.
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
    loras: tuple[Mapping[str, Any], ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; missing values are left out."""
        values: dict[str, Any] = {
            "skyloom": self.skyloom,
            "request": self.request.to_dict(),
            "model": self.model,
            "weights": self.weights,
            "torch": self.torch,
            "device": self.device,
            "dtype": self.dtype,
            "image": self.image,
            "parents": [vars(parent) for parent in self.parents],
            "loras": [dict(lora) for lora in self.loras] or None,
            "notes": dict(self.notes),
        }
        if self.frames is not None:
            values["frames"] = {
                "sha256": self.frames.sha256,
                "shape": list(self.frames.shape),
                "fps": str(self.frames.fps),
            }
        return {
            **self.extra,
            **{key: value for key, value in values.items() if value not in ("", None)},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Receipt":
        """The inverse of `to_dict`. Also reads receipts of version 0.1, with a table of weights.

        Raises MediaError for missing keys or values of the wrong type.
        """
        try:
            return cls._parse(dict(values))
        except (KeyError, TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            cause = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise MediaError(
                f"The receipt is damaged ({cause:.120}).", hint="Ask for the original file."
            ) from error
        except RequestError as error:
            version = str(values.get("skyloom"))[:20]
            raise MediaError(
                f"The receipt's request cannot be read: {error.message}",
                hint=f"It was made by skyloom {version}; this is {__version__}.",
            ) from error

    @classmethod
    def _parse(cls, values: dict[str, Any]) -> "Receipt":
        request = Request.from_dict(_table(values.pop("request")))
        weights = values.pop("weights")
        digest = weights if isinstance(weights, str) else weights_digest(_table(weights))
        frames = values.pop("frames", None)
        model = _text(values.pop("model", request.model or ""))
        parents = [Parent(**_texts(_table(parent))) for parent in values.pop("parents", [])]
        loras = [_table(lora) for lora in values.pop("loras", [])]
        notes = _table(values.pop("notes", {}))
        names = ("torch", "device", "dtype", "image")
        texts: dict[str, Any] = {name: _text(values.pop(name)) for name in names if name in values}
        return cls(
            _text(values.pop("skyloom")),
            request,
            model,
            digest,
            frames=None if frames is None else _frames(_table(frames)),
            parents=tuple(parents),
            loras=tuple(loras),
            notes=notes,
            **texts,
            extra=values,
        )


def make_receipt(
    plan: Plan,
    info: ModelInfo,
    device: torch.device,
    dtype: torch.dtype,
    frames: FramesDigest | None = None,
    *,
    notes: Mapping[str, Any] | None = None,
) -> Receipt:
    """The receipt of a plan. Raises MediaError if a source file cannot be read."""
    image = plan.request.image
    return Receipt(
        __version__,
        _filled_request(plan, info.name),
        info.name,
        weights_digest(info.file_hashes),
        torch=str(torch.__version__),
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        image=None if image is None else hash_source_file(Path(image)),
        frames=frames,
        parents=(*_card_media(plan), *_edited_files(plan)),
        loras=tuple(lora.to_dict() for lora in plan.loras),
        notes={**(notes or {}), **_plan_notes(plan)},
    )


def _filled_request(plan: Plan, model: str) -> Request:
    """The plan's request with defaults filled in."""
    filled = replace(plan.request, model=model)
    if plan.request.edit is None:
        filled = replace(filled, seconds=plan.seconds, fps=float(plan.fps), size=plan.shape.size)
    if filled.needs_model:
        filled = replace(
            filled,
            seed=plan.seed,
            num_steps=plan.num_steps,
            guidance_scale=plan.guidance_scale,
            quality="fast" if plan.student else "best",
        )
    return filled


def _card_media(plan: Plan) -> Iterator[Parent]:
    """The media of a storyboard's cards."""
    for card in plan.request.cards:
        media = card.image or card.video
        if media:
            role = "video" if card.video else "image"
            yield Parent(hash_source_file(Path(media)), role, "storyboard")


def _edited_files(plan: Plan) -> Iterator[Parent]:
    """The videos of an edit in order, then its mask."""
    edit = plan.request.edit
    if edit is None or plan.sources is None:
        return
    for source in plan.sources.sources:
        yield Parent(source.sha256, "video", edit.verb)
    if edit.mask is not None:
        yield Parent(hash_source_file(Path(edit.mask)), "mask", edit.verb)


def _plan_notes(plan: Plan) -> dict[str, Any]:
    """Notices and, of an edit, its spans, their kinds and the prompts of all its frames."""
    notices: dict[str, Any] = {"notices": list(plan.notices)} if plan.notices else {}
    if plan.sources is None:
        return notices
    spans: list[list[int | str]] = []
    position = 0
    for span in plan.timeline.spans:
        spans.append([position, position + span.frames, span.kind])
        position += span.frames
    prompts = timeline_prompts(plan.timeline, plan.sources.sources)
    return {
        "spans": spans,
        "prompts": [[part.start, part.stop, part.prompt] for part in prompts],
        **notices,
    }


def read_receipt(path: Path) -> Receipt:
    """Read the receipt in a video or its sidecar; `path` may also be the sidecar itself.

    Raises MediaError if there is no receipt, or a damaged one.
    """
    if is_sidecar(path):
        return Receipt.from_dict(read_sidecar(path))
    values = open_source(path).receipt
    if not values and sidecar_of(path).exists():
        values = read_sidecar(sidecar_of(path))
    if not values:
        hint = "Only videos generated by skyloom without --no-receipt have one."
        raise MediaError(f"{path} holds no receipt.", hint=hint)
    return Receipt.from_dict(values)


def weights_digest(files: Mapping[str, str]) -> str:
    """One sha256 of the names and hashes of a model's files."""
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def hash_source_file(path: Path) -> str:
    """The sha256 of a source file. Raises MediaError if it cannot be read."""
    try:
        return sha256_file(path)
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error


def _frames(values: Mapping[str, Any]) -> FramesDigest:
    shape = tuple(values["shape"])
    if len(shape) != len(_AXES) or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"frames.shape must be four positive integers, got {shape}")
    return FramesDigest(_text(values["sha256"]), shape, Fraction(_text(values["fps"])))


def _table(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.40} must be a table")
    return dict(value)


def _texts(values: Mapping[str, object]) -> dict[str, str]:
    return {name: _text(value) for name, value in values.items()}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} must be text")
    return value
