"""Encode frames to mp4 (H.264), webm (VP9), mkv (FFV1, without loss), gif or png.

A file appears under its name whole or not at all.
"""

import errno
import itertools
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import av
import torch
from av.error import FFmpegError
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from skyloom.core.errors import DiskFullError, MediaError, RequestError, SkyloomError
from skyloom.media.sandbox_client import AudioFormat, AudioPacket
from skyloom.media.sound import AudioTrack

_CODECS = {
    ".mp4": (
        "libx264",
        "yuv420p",
        {"crf": "16", "preset": "medium"},
        {"movflags": "+faststart+use_metadata_tags"},
    ),
    ".webm": ("libvpx-vp9", "yuv420p", {"crf": "24", "b": "0", "row-mt": "1"}, {}),
    ".mkv": ("ffv1", "bgr0", {"level": "3", "slicecrc": "1"}, {}),
}
_FORMATS = {".mp4": "mp4", ".webm": "webm", ".mkv": "matroska"}
_FRAGMENTED = {"movflags": "+frag_keyframe+empty_moov+default_base_moof"}
SUFFIXES = (*_CODECS, ".gif")
PICTURE_SUFFIXES = (".png",)
SIDECAR = ".receipt.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)


def check_target(path: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Raise, before any work, if a file cannot be written there.

    RequestError for a wrong suffix or name, MediaError for a folder that is missing or read-only, DiskFullError
    for a full disk.
    """
    if path.suffix.lower() not in suffixes:
        raise RequestError(
            f"{path.name!r} ends in no known format.", hint=f"Use {', '.join(suffixes)}."
        )
    try:
        folder, named = path.parent.is_dir(), path.is_dir()
        path.exists()
        if not folder:
            raise MediaError(
                f"The folder {path.parent} does not exist.", hint="Create it, or choose another."
            )
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
    with open_video(path, fps) as writer:
        writer.append(frames)
        writer.receipt = receipt
    return path


@contextmanager
def open_video(path: Path, fps: Fraction | float) -> Iterator["VideoWriter"]:
    """A video file to append frames to; it appears under its name, whole, when the block ends well.

    Raises what `write_video` raises.
    """
    check_target(path)
    rate = Fraction(fps).limit_denominator(1001)
    with (
        placed(path) as partial,
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".skyloom-") as folder,
    ):
        writer = VideoWriter(Path(folder) / partial.name, rate)
        yield writer
        writer.finish(partial)


@contextmanager
def open_pipe(stream: BinaryIO, fps: Fraction | float) -> Iterator["PipeWriter"]:
    """A player's end of a pipe to append frames to; it can show them while more are to come.

    When the player goes away, frames are no longer written and nothing is raised.
    """
    writer = PipeWriter(stream, Fraction(fps).limit_denominator(1001))
    yield writer
    writer.finish()


class PipeWriter:
    """Writes fragmented mp4: every second or so is a piece that can be played alone."""

    def __init__(self, stream: BinaryIO, fps: Fraction) -> None:
        self.fps = fps
        self._pipe = _Pipe(stream)
        self._encoder: _Encoder | None = None

    def append(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Take the next frames. Raises MediaError for what mp4 cannot hold."""
        _check_frames(frames, self.fps, ".mp4")
        if self._encoder is None:
            gop = str(max(1, round(self.fps)))
            options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency", "g": gop}
            size = frames.shape[2], frames.shape[1]
            self._encoder = _Encoder(self._pipe, ".mp4", self.fps, size, options, _FRAGMENTED)
        self._encoder.append(frames)
        self._pipe.flush()

    def finish(self) -> None:
        """Write what is still held back."""
        if self._encoder is not None:
            self._encoder.close()
        self._pipe.flush()


class _Pipe:
    """Standard output that may close early: what comes after is dropped."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream: BinaryIO | None = stream

    def write(self, data: bytes) -> int:
        """Write, or drop."""
        return self._try(lambda stream: stream.write(data)) or len(data)

    def flush(self) -> None:
        """Bring everything to the reader."""
        self._try(lambda stream: stream.flush())

    def _try(self, call: Callable[[BinaryIO], int | None]) -> int | None:
        if self._stream is None:
            return None
        try:
            return call(self._stream)
        except BrokenPipeError:
            self._stream = None
            return None


class VideoWriter:
    """Takes a video's frames in order; what is in `receipt` at the end becomes the file's comment, as JSON.

    Memory does not grow with the length, except for a .gif. A .mkv gives back the very same frames.
    """

    def __init__(self, path: Path, fps: Fraction) -> None:
        self.path, self.fps, self.suffix = path, fps, path.suffix.lower()
        self.receipt: Mapping[str, object] | None = None
        self.frames = 0
        self._pictures: list[UInt8[Tensor, "t h w c"]] = []
        self._encoder: _Encoder | None = None
        self._track = AudioTrack()

    def add_sound(self, sound: AudioFormat, packets: Iterable[AudioPacket], at: int) -> bool:
        """Let packets of sound play from frame `at` on; false where this file cannot hold them, and they are left out.

        They are read when the file is finished. Only .mp4 holds sound, and of one kind.
        """
        return self.suffix == ".mp4" and self._track.add(sound, packets, at / self.fps)

    def append(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Take the next frames. Raises MediaError for what the format cannot hold."""
        _check_frames(frames, self.fps, self.suffix)
        self.frames += len(frames)
        if self.suffix == ".gif":
            self._pictures.append(frames.cpu())
            return
        if self._encoder is None:
            size = frames.shape[2], frames.shape[1]
            self._encoder = _Encoder(
                str(self.path), self.suffix, self.fps, size, _CODECS[self.suffix][2], {}
            )
        self._encoder.append(frames)

    def finish(self, target: Path) -> None:
        """Write everything to `target`. Raises MediaError when there is nothing."""
        comment = json.dumps(self.receipt) if self.receipt else ""
        if not self.frames:
            raise MediaError("No frames are no video.", hint="Append one or more.")
        if self._encoder is None:
            _write_gif(torch.cat(self._pictures), self.fps, target, comment)
        else:
            self._encoder.close()
            _remux(self.path, target, self.suffix, comment, self._track)


def write_picture(frame: UInt8[Tensor, "h w c"], path: Path) -> Path:
    """Write one frame as a PNG file. Raises what `check_target` raises."""
    check_target(path, PICTURE_SUFFIXES)
    with placed(path) as partial:
        Image.fromarray(frame.cpu().numpy()).save(partial, "PNG")
    return path


def sidecar_of(path: Path) -> Path:
    """Where the sidecar of a video lies: beside it, as `video.mp4.receipt.json`."""
    return path.with_name(path.name + SIDECAR)


def write_sidecar(path: Path, receipt: Mapping[str, object]) -> Path:
    """Write a video's receipt beside it, whole or not at all, for places that strip what a file says of itself."""
    sidecar = sidecar_of(path)
    with placed(sidecar) as partial:
        partial.write_text(
            json.dumps(receipt, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    return sidecar


@contextmanager
def placed(path: Path) -> Iterator[Path]:
    """A partial file beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    partial: Path | None = None
    try:
        made = path.parent / f".skyloom-{secrets.token_hex(6)}{path.suffix}"
        os.close(
            os.open(made, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        )  # the process's umask decides who may read
        partial = made
        yield partial
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
        return DiskFullError(
            f"The disk of {path.parent} is full.", hint="Free some space and try again."
        )
    if number == errno.ENAMETOOLONG:
        return RequestError(
            "The name of the file is too long.", hint="Choose a shorter one with -o."
        )
    return MediaError(
        f"{path} cannot be written ({cause}).", hint="Choose another folder or name with -o."
    )


def _check_frames(frames: UInt8[Tensor, "t h w c"], fps: Fraction, suffix: str) -> None:
    shape = tuple(frames.shape)
    if len(shape) != len("thwc") or shape[-1] != len("rgb") or frames.dtype != torch.uint8:
        raise MediaError(
            f"Frames of {frames.dtype}, {shape} are no video.", hint="Use uint8 [t h w 3]."
        )
    count, height, width, _ = shape
    if not count or fps <= 0:
        raise MediaError(
            f"{count} frames at {float(fps):g} fps are no video.",
            hint="Use one or more, above 0 fps.",
        )
    if suffix in _CODECS and _CODECS[suffix][1] == "yuv420p" and (height % 2 or width % 2):
        raise MediaError(
            f"{suffix[1:]} holds no odd sizes like {width}x{height}.",
            hint="Use even width and height, or a .mkv or .gif.",
        )


class _Encoder:
    """Encodes frames one after another into a file, without a receipt, or into a pipe."""

    def __init__(
        self,
        file: "str | _Pipe",
        suffix: str,
        fps: Fraction,
        size: tuple[int, int],
        options: dict[str, str],
        container_options: dict[str, str],
    ) -> None:
        codec, pixel_format, _, _ = _CODECS[suffix]
        self._container = av.open(file, "w", format=_FORMATS[suffix], options=container_options)
        self._stream = self._container.add_stream(codec, rate=fps, options=options)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = pixel_format

    def append(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Encode the next frames."""
        for picture in frames.cpu().numpy():
            self._container.mux(
                self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
            )

    def close(self) -> None:
        """Encode what is still held back and end the file."""
        self._container.mux(self._stream.encode(None))
        self._container.close()


def _remux(source: Path, target: Path, suffix: str, comment: str, track: AudioTrack) -> None:
    """Copy the packets of a finished file, and of a sound track, behind a header with the comment.

    The file is ready to be played from its start: sound lies beside the pictures that it belongs to.
    """
    with (
        av.open(str(source), "r", format=_FORMATS[suffix]) as encoded,
        av.open(str(target), "w", format=_FORMATS[suffix], options=_CODECS[suffix][3]) as container,
    ):
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream_from_template(encoded.streams.video[0])
        sounds = track.open(container)
        sound = next(sounds, None)
        for packet in encoded.demux(encoded.streams.video[0]):
            if packet.dts is not None:
                time = packet.dts * packet.time_base
                while sound is not None and sound[0] <= time:
                    container.mux(sound[1])
                    sound = next(sounds, None)
                packet.stream = stream
                container.mux(packet)
        for _, packet in itertools.chain([] if sound is None else [sound], sounds):
            container.mux(packet)


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
