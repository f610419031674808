"""Encode frames to mp4 (H.264), webm (VP9) or gif. A file appears under its name whole or not at all."""

import errno
import json
import os
import tempfile
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.errors import CapacityError, MediaError

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


def check_target(path: Path) -> None:
    """Raise MediaError, before any work, if a video cannot be written there."""
    if path.suffix.lower() not in SUFFIXES:
        raise MediaError(f"{path.name} ends in no known format.", hint=f"Use {', '.join(SUFFIXES)}.")
    if path.is_dir():
        raise MediaError(f"{path} is a folder.", hint="Name a file in it.")
    if not path.parent.is_dir():
        raise MediaError(f"The folder {path.parent} does not exist.", hint="Create it, or choose another.")
    try:
        descriptor, probe = tempfile.mkstemp(dir=path.parent, prefix=".skyloom-")
    except OSError as error:
        raise MediaError(
            f"Nothing can be written in {path.parent} ({error.strerror}).",
            hint="Choose another folder with -o.",
        ) from error
    os.close(descriptor)
    Path(probe).unlink()


def write_video(
    frames: UInt8[Tensor, "t h w c"], fps: Fraction, path: Path, receipt: Mapping[str, object] | None = None
) -> Path:
    """Encode and move into place. Raises MediaError, or CapacityError when the disk is full."""
    check_target(path)
    suffix = path.suffix.lower()
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".skyloom-", suffix=suffix)
    os.close(descriptor)
    partial = Path(name)
    try:
        if suffix == ".gif":
            _write_gif(frames, fps, partial)
        else:
            _encode(frames, fps, partial, suffix, receipt or {})
        partial.chmod(0o644)
        partial.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full:
            raise CapacityError(f"The disk of {path.parent} is full.", hint="Free some space and try again.") from error
        raise MediaError(f"{path} could not be written ({error.strerror or error}).") from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _encode(
    frames: UInt8[Tensor, "t h w c"], fps: Fraction, path: Path, suffix: str, receipt: Mapping[str, object]
) -> None:
    codec, pixel_format, options, container_options = _CODECS[suffix]
    _, height, width, _ = frames.shape
    with av.open(str(path), "w", format=suffix[1:], options=container_options) as container:
        if receipt:
            container.metadata["comment"] = json.dumps(receipt, ensure_ascii=False)
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        for picture in frames.cpu().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


def _write_gif(frames: UInt8[Tensor, "t h w c"], fps: Fraction, path: Path) -> None:
    """Frames are timed in hundredths of a second, so each takes the share that keeps the whole in time."""
    from PIL import Image

    ticks = [round(100 * index / fps) * 10 for index in range(len(frames) + 1)]
    durations = [after - before for before, after in pairwise(ticks)]
    pictures = [Image.fromarray(frame) for frame in frames.cpu().numpy()]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0, disposal=1)
