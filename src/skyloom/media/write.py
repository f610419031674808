"""Encode frames to mp4 (H.264), webm (VP9), gif or png. A file appears under its name whole or not at all."""

import errno
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import torch
from av.error import FFmpegError
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from skyloom.core.errors import CapacityError, MediaError, RequestError, SkyloomError

_CODECS = {
    ".mp4": (
        "libx264",
        "yuv420p",
        {"crf": "16", "preset": "medium"},
        {"movflags": "+faststart+use_metadata_tags"},
    ),
    ".webm": ("libvpx-vp9", "yuv420p", {"crf": "24", "b": "0", "row-mt": "1"}, {}),
}
SUFFIXES = (*_CODECS, ".gif")
PICTURE_SUFFIXES = (".png",)
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_target(path: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raise, before any work, if a file cannot be written there.

    RequestError for a wrong suffix or name, MediaError for a folder that is missing or read-only, CapacityError
    for a full disk.
    """
    if path.suffix.lower() not in suffixes:
        raise RequestError(f"{path.name!r} ends in no known format.", hint=f"Use {', '.join(suffixes)}.")
    try:
        folder, named = path.parent.is_dir(), path.is_dir()
        path.exists()
        if not folder:
            raise MediaError(f"The folder {path.parent} does not exist.", hint="Create it, or choose another.")
        if named:
            raise MediaError(f"{path} is a folder.", hint="Name a file in it.")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _explain(error, path) from error


def write_video(
    frames: UInt8[Tensor, "t h w c"],
    fps: Fraction | float,
    path: Path,
    receipt: Mapping[str, object] | None = None,
) -> Path:
    """Encode and move into place; the receipt becomes the file's comment, as JSON.

    Raises MediaError for frames that the format cannot hold, and what `check_target` raises.
    """
    check_target(path)
    suffix, rate = path.suffix.lower(), Fraction(fps).limit_denominator(1001)
    _check_frames(frames, rate, suffix)
    comment = json.dumps(receipt) if receipt else ""
    with placed(path) as partial:
        if suffix == ".gif":
            _write_gif(frames, rate, partial, comment)
        else:
            _encode(frames, rate, partial, suffix, comment)
    return path


def write_picture(frame: UInt8[Tensor, "h w c"], path: Path) -> Path:
    """Write one frame as a PNG file. Raises what `check_target` raises."""
    check_target(path, PICTURE_SUFFIXES)
    with placed(path) as partial:
        Image.fromarray(frame.cpu().numpy()).save(partial, "PNG")
    return path


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A partial file beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    partial: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".skyloom-", suffix=path.suffix, delete=False) as file:
            partial = Path(file.name)
        yield partial
        partial.chmod(0o644)
        partial.replace(path)
    except (OSError, FFmpegError) as error:
        raise _explain(error, path) from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _explain(error: Exception, path: Path) -> SkyloomError:
    """What stopped a file from being written, and what to do."""
    number, cause = getattr(error, "errno", None), getattr(error, "strerror", None) or error
    if number in _FULL:
        return CapacityError(f"The disk of {path.parent} is full.", hint="Free some space and try again.")
    if number == errno.ENAMETOOLONG:
        return RequestError("The name of the file is too long.", hint="Choose a shorter one with -o.")
    return MediaError(f"{path} cannot be written ({cause}).", hint="Choose another folder or name with -o.")


def _check_frames(frames: UInt8[Tensor, "t h w c"], fps: Fraction, suffix: str) -> None:
    shape = tuple(frames.shape)
    if len(shape) != len("thwc") or shape[-1] != len("rgb") or frames.dtype != torch.uint8:
        raise MediaError(f"Frames of {frames.dtype}, {shape} are no video.", hint="Use uint8 [t h w 3].")
    count, height, width, _ = shape
    if not count or fps <= 0:
        raise MediaError(f"{count} frames at {float(fps):g} fps are no video.", hint="Use one or more, above 0 fps.")
    if suffix in _CODECS and (height % 2 or width % 2):
        raise MediaError(
            f"{suffix[1:]} holds no odd sizes like {width}x{height}.", hint="Use even width and height, or a .gif."
        )


def _encode(frames: UInt8[Tensor, "t h w c"], fps: Fraction, path: Path, suffix: str, comment: str) -> None:
    codec, pixel_format, options, container_options = _CODECS[suffix]
    _, height, width, _ = frames.shape
    with av.open(str(path), "w", format=suffix[1:], options=container_options) as container:
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for picture in frames.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _write_gif(frames: UInt8[Tensor, "t h w c"], fps: Fraction, path: Path, comment: str) -> None:
    """Frames are timed in hundredths of a second, so each takes the share that keeps the whole in time."""
    ticks = [round(100 * index / fps) * 10 for index in range(len(frames) + 1)]
    durations = [after - before for before, after in pairwise(ticks)]
    pictures = [Image.fromarray(frame) for frame in frames.cpu().numpy()]
    pictures[0].save(
        path,
        save_all=True,
        append_images=pictures[1:],
        duration=durations,
        loop=0,
        disposal=1,
        comment=comment.encode(),
    )
