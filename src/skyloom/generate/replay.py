"""Making a video again from its receipt, and proving that it came out the same.

Two things are compared. The frames: their digest against the receipt's, which only the same bits pass. The file:
its decoded frames against those made again. A codec loses something, so the made frames are encoded and decoded
once more, and the file may differ by what that loses and little more.
"""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import CheckpointError, MediaError, RequestError
from skyloom.generate.receipt import FramesHash, Receipt, hash_picture, weights_digest
from skyloom.generate.request import Request
from skyloom.media.read import is_sidecar
from skyloom.media.source import open_source
from skyloom.media.video import Video
from skyloom.media.write import SIDECAR, SUFFIXES
from skyloom.models.registry import ModelInfo

_SHORT = 12
_MEAN_SLACK, _LARGEST_SLACK = 0.5, 8  # pixel values that another build of a codec may differ by


@dataclass(frozen=True)
class Difference:
    """How far decoded frames are from made ones: the largest and the mean difference of a pixel value (0..255)."""

    largest: int
    mean: float

    def within(self, codec: "Difference") -> bool:
        """Whether a codec that loses that much explains it: twice as much, and a little for other builds of it."""
        return (
            self.largest <= 2 * codec.largest + _LARGEST_SLACK
            and self.mean <= 2 * codec.mean + _MEAN_SLACK
        )


@dataclass(frozen=True)
class Verdict:
    """What a comparison found. `exact`: the made frames have the receipt's digest (None: it has none); `file`: how far
    the file is from them; `codec`: how far the codec alone takes them."""

    exact: bool | None
    file: Difference
    codec: Difference

    @property
    def same(self) -> bool:
        """Whether the file shows the made frames, as far as its codec can. A digest is not asked for: another
        machine may make other bits of the same video."""
        return self.file.within(self.codec)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {
            "exact": self.exact,
            "same": self.same,
            "difference": vars(self.file),
            "codec": vars(self.codec),
        }


def request_again(receipt: Receipt, image: Path | None = None) -> Request:
    """The request of a receipt, for a pipeline that holds its model.

    `image` is where the picture lies that it started from, if no longer where it was. Raises RequestError when that
    picture is another one, or a video or mask that was edited, MediaError when there is none.
    """
    _check_sources(receipt)
    asked = receipt.request
    where = image or (None if asked.image is None else Path(asked.image))
    if image is not None and asked.image is None:
        raise RequestError("This video did not start from a picture.", hint="Leave --image out.")
    if where is not None and receipt.image is not None and hash_picture(where) != receipt.image:
        raise RequestError(
            f"{where} is not the picture that the video started from.", hint="Name it with --image."
        )
    if not asked.samples:  # receipts of 0.1.0 named what had no effect
        asked = replace(
            asked, seed=None, num_steps=None, guidance_scale=None, quality=None, negative_prompt=""
        )
    return replace(asked, model=None, image=None if where is None else str(where))


def _check_sources(receipt: Receipt) -> None:
    """Raise RequestError unless every file of an edit is the one that was edited."""
    edit = receipt.request.edit
    if edit is None:
        return
    told = [parent.sha256 for parent in receipt.parents if parent.verb == edit.verb]
    files = [*edit.videos, *([] if edit.mask is None else [edit.mask])]
    if len(told) != len(files):
        raise MediaError(
            "The receipt does not name what was edited.", hint="Ask for the original file."
        )
    for file, sha256 in zip(files, told, strict=True):
        if hash_picture(Path(file)) != sha256:
            raise RequestError(
                f"{file} is not the file that was edited; it has changed.",
                hint="Bring that one back.",
            )


def check_weights(receipt: Receipt, info: ModelInfo) -> None:
    """Raise CheckpointError, naming both, when a model's weights are not those that made the video."""
    here = weights_digest(info.manifest.get("files", {}))
    if here != receipt.weights:
        raise CheckpointError(
            f"The video was made with weights {receipt.weights[:_SHORT]} of {receipt.model}; {info.name} in "
            f"{info.folder} has {here[:_SHORT]}.",
            hint="Name the right model with --model, or see with --force what these make of it.",
        )


def is_exact(receipt: Receipt, video: Video) -> bool | None:
    """Whether a video has the very frames that a receipt tells of; None when it does not tell."""
    if receipt.frames is None:
        return None
    taken = FramesHash(video.fps)
    taken.add(video.frames)
    return taken.digest() == receipt.frames


def compare_file(file: Path, receipt: Receipt, video: Video) -> Verdict:
    """A file (or the one beside a sidecar) against its video made again, and that against itself after the codec.

    Raises MediaError when the file cannot be decoded, or has other frames in number or size.
    """
    file = file.with_name(file.name.removesuffix(SIDECAR)) if is_sidecar(file) else file
    there = compare(video.frames, _frames(file), str(file))
    suffix = file.suffix.lower() if file.suffix.lower() in SUFFIXES else SUFFIXES[0]
    with tempfile.TemporaryDirectory() as folder:
        coded = video.save(Path(folder) / f"again{suffix}")
        codec = compare(video.frames, _frames(coded), str(coded))
    return Verdict(is_exact(receipt, video), there, codec)


def _frames(path: Path) -> Iterator[UInt8[Tensor, "h w c"]]:
    """Yield the frames of a video one by one, decoded in the sandbox."""
    for batch in open_source(path).stream():
        yield from batch


def compare(
    made: UInt8[Tensor, "t h w c"], decoded: Iterable[UInt8[Tensor, "h w c"]], name: str
) -> Difference:
    """How far decoded frames are from made ones. Raises MediaError when there are more or fewer, or of another size."""
    largest, total, count = 0, 0, 0
    for mine, other in zip_longest(made.unbind(0), decoded):
        if mine is None:
            raise MediaError(
                f"{name} has more than the {len(made)} frames that were made.",
                hint="It was edited.",
            )
        if other is None:
            raise MediaError(f"{name} has {count} of {len(made)} frames.", hint="It was cut.")
        if mine.shape != other.shape:
            sizes = f"{other.shape[1]}x{other.shape[0]}, not {mine.shape[1]}x{mine.shape[0]}"
            raise MediaError(f"{name} is {sizes}.", hint="It was converted.")
        apart = (mine.to(torch.int16) - other).abs()
        largest, total, count = max(largest, int(apart.max())), total + int(apart.sum()), count + 1
    return Difference(largest, total / made.numel())
