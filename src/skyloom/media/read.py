"""Read pictures and videos, within limits that a file cannot talk its way around."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import MediaError
from skyloom.media.sandbox import Sandbox
from skyloom.media.video import Video
from skyloom.media.write import SIDECAR

MAX_PIXELS = 64_000_000
MAX_FRAMES = 4_000
MAX_VIDEO_PIXELS = 1_000_000_000
MAX_RECEIPT = 2**20
_CHANNELS = 3


@dataclass(frozen=True)
class Probe:
    """What a video file says about itself; `frames` and `seconds` are 0 where it does not say."""

    width: int
    height: int
    fps: Fraction
    frames: int
    seconds: float
    codec: str
    receipt: dict[str, object]


def read_image(path: Path) -> UInt8[Tensor, "1 h w c"]:
    """A picture as one upright RGB frame; transparent parts become white. A limited child decodes it.

    Raises MediaError for what is no picture, is damaged, or has more than 64 million pixels.
    """
    with Sandbox(path, "picture") as child:
        header, pixels = child.take(MAX_PIXELS * _CHANNELS) or ({}, bytearray())
        height, width = header.get("height"), header.get("width")
        if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
            raise child.fail("crash")
        if height * width * _CHANNELS != len(pixels):
            raise child.fail("crash")
    return torch.from_numpy(np.frombuffer(pixels, np.uint8).reshape(1, height, width, _CHANNELS))


def probe(path: Path) -> Probe:
    """Size, rate and receipt of a video, without decoding it. Raises MediaError."""
    with _opened(path) as (container, stream):
        seconds = container.duration / av.time_base if container.duration else 0.0
        codec = stream.codec_context.name
        return Probe(
            stream.width,
            stream.height,
            _rate(stream),
            stream.frames,
            seconds,
            codec,
            _receipt(container.metadata),
        )


def read_video(path: Path, max_frames: int = MAX_FRAMES) -> Video:
    """All frames of a video's first picture stream, upright, at its mean rate. Raises MediaError."""
    pictures: list[np.ndarray] = []
    budget = MAX_VIDEO_PIXELS
    with _opened(path) as (container, stream):
        fps, receipt = _rate(stream), _receipt(container.metadata)
        for frame in container.decode(stream):
            budget -= frame.width * frame.height
            if len(pictures) == max_frames or budget < 0:
                raise MediaError(
                    f"{path} is too long: more than {max_frames} frames or a billion pixels.",
                    hint="Cut it.",
                )
            pictures.append(_upright(frame))
    if not pictures:
        raise MediaError(f"{path} holds no frames.", hint="Choose another file.")
    if len({picture.shape for picture in pictures}) > 1:
        raise MediaError(f"{path} changes its size midway.", hint="Convert it to one size.")
    return Video(torch.from_numpy(np.stack(pictures)), fps, receipt)


def read_frames(path: Path) -> Iterator[UInt8[Tensor, "h w c"]]:
    """The frames of a video one by one, upright, at constant memory. Raises MediaError, also midway."""
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            yield torch.from_numpy(_upright(frame).copy())


def is_sidecar(path: Path) -> bool:
    """Whether a path is named like the sidecar of a video."""
    return path.name.endswith(SIDECAR)


def read_sidecar(path: Path) -> dict[str, object]:
    """The receipt in a sidecar. Raises MediaError for a file that is missing, larger than 1 MiB, or no receipt."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_RECEIPT + 1)
    except OSError as error:
        raise MediaError(
            f"{path} cannot be read ({error.strerror}).", hint="Check the path."
        ) from error
    receipt = parse_receipt(content) if len(content) <= MAX_RECEIPT else {}
    if not receipt:
        raise MediaError(f"{path} is no receipt of skyloom's.", hint="Choose another file.")
    return receipt


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, av.VideoStream]]:
    """A container and its picture stream; whatever goes wrong while it is read becomes a MediaError."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediaError(
                    f"{path} cannot be read as a video: it holds no pictures.",
                    hint="Choose another.",
                )
            stream = container.streams.video[0]
            _check_size(path, stream.width, stream.height)
            yield container, stream
    except FileNotFoundError as error:
        raise MediaError(f"The video {path} does not exist.", hint="Check the path.") from error
    except (FFmpegError, OSError, ValueError) as error:
        raise MediaError(
            f"{path} cannot be read as a video.", hint="Use an mp4, webm or gif that plays."
        ) from error


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{path} is {width}x{height}, more than 64 million pixels.", hint="Make it smaller."
        )


def _rate(stream: av.VideoStream) -> Fraction:
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise MediaError("The video does not say its frame rate.", hint="Convert it to mp4.")
    return Fraction(rate)


def _upright(frame: av.VideoFrame) -> np.ndarray:
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _receipt(metadata: Mapping[str, str]) -> dict[str, object]:
    """How the video was made, if skyloom wrote it."""
    return parse_receipt({key.lower(): value for key, value in metadata.items()}.get("comment", ""))


def parse_receipt(text: str | bytes) -> dict[str, object]:
    """A receipt's values; none where the text is no receipt or longer than 1 MiB."""
    try:
        receipt = json.loads(text) if len(text) <= MAX_RECEIPT else {}
    except (ValueError, RecursionError):
        return {}
    return receipt if isinstance(receipt, dict) and "skyloom" in receipt else {}
