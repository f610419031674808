"""Generate a video again from its receipt and compare the result with the file.

Two comparisons: the digest of the new frames against the receipt's (bit for bit), and the file's
decoded frames against the new ones. Codecs are lossy, so the new frames are encoded and decoded
once as well; the file may differ by that loss plus a small tolerance.
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
from skyloom.generate.loras import find_loras
from skyloom.generate.receipt import FramesHash, Receipt, hash_source_file, weights_digest
from skyloom.generate.request import Request
from skyloom.media.read import is_sidecar
from skyloom.media.source import open_source
from skyloom.media.video import Video
from skyloom.media.write import SIDECAR, SUFFIXES
from skyloom.models.registry import ModelInfo

_DIGEST_CHARACTERS = 12
# pixel values (0..255) by which other builds of a codec may differ
_MEAN_TOLERANCE = 0.5
_LARGEST_TOLERANCE = 8


@dataclass(frozen=True)
class Difference:
    """The largest and mean difference of pixel values (0..255) between two videos."""

    largest: int
    mean: float

    def within(self, codec: "Difference") -> bool:
        """Whether a codec's loss explains it: at most twice the loss plus a tolerance."""
        return (
            self.largest <= 2 * codec.largest + _LARGEST_TOLERANCE
            and self.mean <= 2 * codec.mean + _MEAN_TOLERANCE
        )


@dataclass(frozen=True)
class ReplayComparison:
    """A replayed video compared with its file.

    `exact`: the new frames have the receipt's digest (None: it has none). `file`: difference
    between the file and the new frames. `codec`: difference caused by encoding alone.
    """

    exact: bool | None
    file: Difference
    codec: Difference

    @property
    def same(self) -> bool:
        """Whether the file shows the new frames, up to its codec's loss."""
        return self.file.within(self.codec)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "exact": self.exact,
            "same": self.same,
            "difference": vars(self.file),
            "codec": vars(self.codec),
        }


def request_from_receipt(receipt: Receipt, image: Path | None = None) -> Request:
    """The request of a receipt, for a pipeline with its model.

    `image` is the first picture's new path, if it was moved. Raises RequestError if a source file
    has changed or the start noise was given, MediaError if a source file is missing.
    """
    _check_sources(receipt)
    if "noise" in receipt.notes:
        raise RequestError(
            "The video started from a noise tensor, which its receipt does not hold.",
            hint="Generate it again from Python with the same noise.",
        )
    request = receipt.request
    if image is not None and request.image is None:
        raise RequestError(
            "image must be left out: this video did not start from a picture.", field="image"
        )
    if image is None and request.image is not None:
        image = Path(request.image)
    if image is not None and receipt.image is not None and hash_source_file(image) != receipt.image:
        raise RequestError(
            f"{image} is not the picture that the video started from.", hint="Use --image."
        )
    if not request.needs_model:  # receipts of 0.1.0 list settings that had no effect
        request = replace(
            request,
            seed=None,
            num_steps=None,
            guidance_scale=None,
            quality=None,
            negative_prompt="",
        )
    return replace(request, model=None, image=None if image is None else str(image))


def _check_sources(receipt: Receipt) -> None:
    """Raise RequestError if a source file of an edit has changed."""
    edit = receipt.request.edit
    if edit is None:
        return
    digests = [parent.sha256 for parent in receipt.parents if parent.verb == edit.verb]
    files = [*edit.videos, *([] if edit.mask is None else [edit.mask])]
    if len(digests) != len(files):
        raise MediaError(
            "The receipt does not list the edited files.", hint="Get the original file."
        )
    for file, sha256 in zip(files, digests, strict=True):
        if hash_source_file(Path(file)) != sha256:
            raise RequestError(
                f"{file} is not the file that was edited; it has changed.",
                hint="Restore the original.",
            )


def check_weights(receipt: Receipt, info: ModelInfo) -> None:
    """Raise CheckpointError if a model's weights are not those of the receipt."""
    here = weights_digest(info.file_hashes)
    if here != receipt.weights:
        raise CheckpointError(
            f"The video was made with weights {receipt.weights[:_DIGEST_CHARACTERS]} of "
            f"{receipt.model}; {info.name} in {info.folder} has {here[:_DIGEST_CHARACTERS]}.",
            hint="Choose the right model with --model, or use these weights with --force.",
        )


def check_loras(receipt: Receipt) -> None:
    """Raise CheckpointError if the file of a LoRA is not that of the receipt.

    Raises RequestError for one that is missing.
    """
    recorded = {lora["name"]: lora["sha256"] for lora in receipt.loras}
    for file in find_loras(receipt.request.loras, None):
        expected = recorded.get(file.lora.name, "")
        if file.sha256 != expected:
            raise CheckpointError(
                f"The video was made with LoRA {file.lora.name} of sha256 "
                f"{expected[:_DIGEST_CHARACTERS]}; {file.path} has "
                f"{file.sha256[:_DIGEST_CHARACTERS]}.",
                hint="Put the right file in its place, or use this one with --force.",
            )


def is_exact(receipt: Receipt, video: Video) -> bool | None:
    """Whether a video has the frames of the receipt's digest; None if it has no digest."""
    if receipt.frames is None:
        return None
    frames_hash = FramesHash(video.fps)
    frames_hash.add(video.frames)
    return frames_hash.digest() == receipt.frames


def compare_file(file: Path, receipt: Receipt, video: Video) -> ReplayComparison:
    """Compare a file (or the file of a sidecar) with its video generated again.

    Raises MediaError if the file cannot be decoded or has another number or size of frames.
    """
    file = file.with_name(file.name.removesuffix(SIDECAR)) if is_sidecar(file) else file
    difference = compare(video.frames, _frames(file), str(file))
    suffix = file.suffix.lower() if file.suffix.lower() in SUFFIXES else SUFFIXES[0]
    with tempfile.TemporaryDirectory() as folder:
        encoded = video.save(Path(folder) / f"again{suffix}")
        codec = compare(video.frames, _frames(encoded), str(encoded))
    return ReplayComparison(is_exact(receipt, video), difference, codec)


def _frames(path: Path) -> Iterator[UInt8[Tensor, "h w c"]]:
    """Yield the frames of a video one by one, decoded in the sandbox."""
    for batch in open_source(path).stream():
        yield from batch


def compare(
    frames: UInt8[Tensor, "t h w c"], decoded: Iterable[UInt8[Tensor, "h w c"]], name: str
) -> Difference:
    """Compare decoded frames with generated ones. Raises MediaError for another number or size."""
    largest = 0
    total = 0
    for count, (frame, other) in enumerate(zip_longest(frames.unbind(0), decoded)):
        if frame is None:
            raise MediaError(
                f"{name} has more than the {len(frames)} generated frames.",
                hint="The file was edited.",
            )
        if other is None:
            raise MediaError(f"{name} has {count} of {len(frames)} frames.", hint="It was cut.")
        if frame.shape != other.shape:
            sizes = f"{other.shape[1]}x{other.shape[0]}, not {frame.shape[1]}x{frame.shape[0]}"
            raise MediaError(f"{name} is {sizes}.", hint="The file was converted.")
        difference = (frame.to(torch.int16) - other).abs()
        largest = max(largest, int(difference.max()))
        total += int(difference.sum())
    return Difference(largest, total / frames.numel())
