"""Encode frames and sound to mp4 (H.264, AAC), webm (VP9, Opus) or mkv (FFV1, FLAC: lossless).

A gif or png holds no sound. Writes are atomic.
"""

import errno
import itertools
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from fractions import Fraction
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import av
import torch
from av.container import OutputContainer
from av.error import FFmpegError
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from skyloom.core.audio import Audio, samples_at
from skyloom.core.errors import DiskFullError, MediaError, RequestError, SkyloomError
from skyloom.core.files import DISK_FULL, atomic_path
from skyloom.media.sandbox_client import AudioFormat, AudioPacket
from skyloom.media.sound import (
    AudioTrack,
    SoundEncoder,
    add_file_stream,
    check_same_format,
    to_pcm,
)

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
_DELAYED_HEADER = {"movflags": _FRAGMENTED["movflags"] + "+delay_moov"}  # says where sound begins
SUFFIXES = (*_CODECS, ".gif")
PICTURE_SUFFIXES = (".png",)
SIDECAR = ".receipt.json"


def check_target(path: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Check that a file can be written, before any work.

    Raises RequestError for an unsupported suffix or too long a name, MediaError for a missing or
    read-only folder, DiskFullError.
    """
    if path.suffix.lower() not in suffixes:
        raise RequestError(f"The file name must end in {', '.join(suffixes)}, got {path.name!r}.")
    try:
        if not path.parent.is_dir():
            raise MediaError(
                f"The folder {path.parent} does not exist.", hint="Create it, or choose another."
            )
        with suppress(FileNotFoundError):
            path.stat()  # raises OSError for too long a name
        if path.is_dir():
            raise MediaError(f"{path} is a folder.", hint="Add a file name.")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _write_error(error, path) from error


def write_video(
    frames: UInt8[Tensor, "t h w c"],
    fps: Fraction | float,
    path: Path,
    receipt: Mapping[str, object] | None = None,
    *,
    audio: Audio | None = None,
) -> Path:
    """Encode frames to a file; the receipt is embedded as JSON in the comment.

    Sound is cut, or padded with silence, to the length of the video; a .gif drops it. Raises
    MediaError for frames that the format does not support, and what `check_target` raises.
    """
    with open_video(path, fps) as writer:
        writer.append(frames)
        if audio is not None:
            writer.add_audio(audio.samples, audio.rate)
        writer.receipt = receipt
    return path


@contextmanager
def open_video(path: Path, fps: Fraction | float) -> Iterator["VideoWriter"]:
    """Open a video file to append frames to; it is moved to `path` when the block succeeds.

    Raises what `write_video` raises.
    """
    check_target(path)
    rate = Fraction(fps).limit_denominator(1001)
    with (
        atomic_output(path) as temporary,
        tempfile.TemporaryDirectory(dir=path.parent, prefix=".skyloom-") as folder,
        closing(VideoWriter(Path(folder) / f"video{path.suffix}", rate)) as writer,
    ):
        yield writer
        writer.finish(temporary)


@contextmanager
def open_pipe(stream: BinaryIO, fps: Fraction | float) -> Iterator["PipeWriter"]:
    """Open a pipe to a player to append frames to; it plays while more are generated.

    If the player exits, further frames are dropped without an error.
    """
    writer = PipeWriter(stream, Fraction(fps).limit_denominator(1001))
    yield writer
    writer.finish()


class PipeWriter:
    """Writes fragmented mp4 with a key frame about every second.

    A video with sound gets its first samples before its first frames.
    """

    def __init__(self, stream: BinaryIO, fps: Fraction) -> None:
        self.fps = fps
        self.frames = 0
        self._pipe = _Pipe(stream)
        self._encoder: _Encoder | None = None
        self._audio: Audio | None = None  # samples that wait for their frames

    def add_audio(self, samples: Float[Tensor, "c n"], rate: int) -> bool:
        """Encode the next samples; the first is at time 0. Returns True: mp4 holds sound.

        Samples ahead of the frames wait in memory. Raises MediaError for the first samples after
        the first frames, if rate or channels change, and what `Audio` raises.
        """
        audio = Audio(samples, rate)
        if self._audio is not None:
            check_same_format(audio, self._audio.rate, self._audio.channels)
            audio = Audio.concatenate([self._audio, audio])
        elif self._encoder is not None:
            raise MediaError(
                "The first sound must be added before the first frames, got it after them."
            )
        self._audio = audio
        self._encode_sound()
        return True

    def append(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Encode the next frames. Raises MediaError for frames that mp4 does not support."""
        _check_frames(frames, self.fps, ".mp4")
        self.frames += len(frames)
        if self._encoder is None:
            gop = str(max(1, round(self.fps)))
            options = {"crf": "18", "preset": "veryfast", "tune": "zerolatency", "g": gop}
            self._encoder = _Encoder(
                self._pipe,
                ".mp4",
                self.fps,
                size=(frames.shape[2], frames.shape[1]),
                options=options,
                container_options=_FRAGMENTED if self._audio is None else _DELAYED_HEADER,
                audio=self._audio,
            )
        self._encoder.append(frames)
        self._encode_sound()
        self._pipe.flush()

    def finish(self) -> None:
        """Flush the encoder and the pipe."""
        if self._encoder is not None:
            self._pad_sound()
            self._encoder.close()
        self._pipe.flush()

    def _encode_sound(self) -> None:
        """Encode the samples up to the last frame; later ones stay."""
        if self._encoder is None or self._audio is None:
            return
        count = self._missing_samples(self._audio)
        self._encoder.append_sound(self._audio.samples[:, :count])
        self._audio = Audio(self._audio.samples[:, count:], self._audio.rate)

    def _pad_sound(self) -> None:
        """Encode silence up to the last frame, a second at a time."""
        while self._audio is not None and (count := self._missing_samples(self._audio)):
            samples = torch.zeros(self._audio.channels, min(count, self._audio.rate))
            self._audio = Audio(samples, self._audio.rate)
            self._encode_sound()

    def _missing_samples(self, audio: Audio) -> int:
        assert self._encoder is not None
        assert self._encoder.sound is not None
        return samples_at(self.frames / self.fps, audio.rate) - self._encoder.sound.count


class _Pipe:
    """A stream whose reader may exit early; later writes are dropped."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream: BinaryIO | None = stream

    def write(self, data: bytes) -> int:
        """Write the data; drop it if the reader has exited."""
        return self._try(lambda stream: stream.write(data)) or len(data)

    def flush(self) -> None:
        """Flush the stream."""
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
    """Encodes the frames of a video in order; embeds `receipt` as JSON in the comment at the end.

    Memory is constant, except for .gif. A .mkv is lossless. `notices` describe what was done to
    the sound of sources.
    """

    def __init__(self, path: Path, fps: Fraction) -> None:
        self.path = path
        self.fps = fps
        self.suffix = path.suffix.lower()
        self.receipt: Mapping[str, object] | None = None
        self.frames = 0
        self._pictures: list[UInt8[Tensor, "t h w c"]] = []
        self._encoder: _Encoder | None = None
        self._track = AudioTrack(self.suffix, path.parent)

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences about the sound, e.g. that it was encoded again."""
        return tuple(self._track.notices)

    def add_sound(
        self,
        sound: AudioFormat | None,
        packets: Iterable[AudioPacket],
        at: int,
        *,
        decoded: Iterable[Audio] | None = None,
    ) -> bool:
        """Add sound of a source that starts at frame `at`; return False if it is dropped.

        An .mp4 copies packets of one format; `sound` is None if they cannot be copied. Otherwise
        `decoded`, the same sound as samples, is encoded; without it the sound is dropped. Both are
        read by `finish`. Add segments in order of time; generated sound (`add_audio`) is heard
        between them only.
        """
        return self._track.add(sound, packets, at / self.fps, decoded)

    def add_audio(self, samples: Float[Tensor, "c n"], rate: int) -> bool:
        """Append generated samples; the first is at time 0. Returns False for a .gif: no sound.

        They are cut, or padded with silence, to the length of the video. Raises MediaError if rate
        or channels change, and what `Audio` raises.
        """
        return self._track.add_samples(Audio(samples, rate))

    def append(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Encode the next frames. Raises MediaError for frames the format does not support."""
        _check_frames(frames, self.fps, self.suffix)
        self.frames += len(frames)
        if self.suffix == ".gif":
            self._pictures.append(frames.cpu())
            return
        if self._encoder is None:
            self._encoder = _Encoder(
                str(self.path),
                self.suffix,
                self.fps,
                size=(frames.shape[2], frames.shape[1]),
                options=_CODECS[self.suffix][2],
            )
        self._encoder.append(frames)

    def finish(self, target: Path) -> None:
        """Write the file to `target`. Raises MediaError if no frame was appended."""
        comment = json.dumps(self.receipt) if self.receipt else ""
        if not self.frames:
            raise MediaError("A video must have at least one frame, got none.")
        if self._encoder is None:
            _write_gif(torch.cat(self._pictures), self.fps, target, comment)
        else:
            self._encoder.close()
            sounds = partial(self._track.open, seconds=self.frames / self.fps)
            _remux(self.path, target, self.suffix, comment, sounds)

    def close(self) -> None:
        """Delete the generated samples."""
        self._track.close()


def write_picture(frame: UInt8[Tensor, "h w c"], path: Path) -> Path:
    """Write one frame as a PNG file. Raises what `check_target` raises."""
    check_target(path, PICTURE_SUFFIXES)
    with atomic_output(path) as temporary:
        Image.fromarray(frame.cpu().numpy()).save(temporary, "PNG")
    return path


def sidecar_of(path: Path) -> Path:
    """Return the path of a video's receipt sidecar: `video.mp4.receipt.json`."""
    return path.with_name(path.name + SIDECAR)


def write_sidecar(path: Path, receipt: Mapping[str, object]) -> Path:
    """Write a video's receipt to its sidecar, for services that strip metadata from files."""
    sidecar = sidecar_of(path)
    text = json.dumps(receipt, indent=1, ensure_ascii=False) + "\n"
    with atomic_output(sidecar) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return sidecar


@contextmanager
def atomic_output(path: Path) -> Iterator[Path]:
    """Yield a temporary file that replaces `path` when the block succeeds (see `atomic_path`).

    Raises MediaError, DiskFullError or RequestError instead of OSError and FFmpegError.
    """
    try:
        with atomic_path(path) as temporary:
            yield temporary
    except (OSError, FFmpegError) as error:
        raise _write_error(error, path) from error


def _write_error(error: Exception, path: Path) -> SkyloomError:
    """Convert an error of the operating system or FFmpeg."""
    number = getattr(error, "errno", None)
    cause = getattr(error, "strerror", None) or error
    if number in DISK_FULL:
        return DiskFullError(
            f"The disk of {path.parent} is full.", hint="Free some space and try again."
        )
    if number == errno.ENAMETOOLONG:
        return RequestError("The file name is too long.", hint="Choose a shorter one with -o.")
    return MediaError(
        f"{path} cannot be written ({cause}).", hint="Choose another folder or name with -o."
    )


def _check_frames(frames: UInt8[Tensor, "t h w c"], fps: Fraction, suffix: str) -> None:
    shape = tuple(frames.shape)
    if len(shape) != len("thwc") or shape[-1] != len("rgb") or frames.dtype != torch.uint8:
        raise MediaError(f"frames must be uint8 [t h w 3], got {frames.dtype} {list(shape)}.")
    count, height, width, _ = shape
    if not count or fps <= 0:
        raise MediaError(
            "A video must have at least one frame and fps > 0, "
            f"got {count} frames at {float(fps):g} fps."
        )
    if suffix in _CODECS and _CODECS[suffix][1] == "yuv420p" and (height % 2 or width % 2):
        raise MediaError(
            f"width and height must be even for {suffix[1:]}, got {width}x{height}.",
            hint="Change the size, or use .mkv or .gif.",
        )


class _Encoder:
    """Encodes frames, and sound like `audio`, to a file or pipe, without a receipt."""

    def __init__(
        self,
        file: "str | _Pipe",
        suffix: str,
        fps: Fraction,
        *,
        size: tuple[int, int],
        options: dict[str, str],
        container_options: dict[str, str] | None = None,
        audio: Audio | None = None,
    ) -> None:
        codec, pixel_format, _, _ = _CODECS[suffix]
        container_options = container_options or {}
        self._container = av.open(file, "w", format=_FORMATS[suffix], options=container_options)
        self._stream = self._container.add_stream(codec, rate=fps, options=options)
        self._stream.width, self._stream.height = size
        self._stream.pix_fmt = pixel_format
        self.sound: SoundEncoder | None = None
        if audio is not None:
            self.sound = SoundEncoder(add_file_stream(self._container, suffix, audio), audio.rate)

    def append(self, frames: UInt8[Tensor, "t h w c"]) -> None:
        """Encode the next frames."""
        for picture in frames.cpu().numpy():
            self._container.mux(
                self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
            )

    def append_sound(self, samples: Float[Tensor, "c n"]) -> None:
        """Encode the next samples."""
        if self.sound is not None and samples.shape[1]:
            self._mux_sound(self.sound.encode(to_pcm(samples)))

    def close(self) -> None:
        """Flush the encoders and finish the file."""
        self._container.mux(self._stream.encode(None))
        if self.sound is not None:
            self._mux_sound(self.sound.flush())
        self._container.close()

    def _mux_sound(self, packets: Iterator[tuple[Fraction, av.Packet]]) -> None:
        for _, packet in packets:
            self._container.mux(packet)


def _remux(
    source: Path,
    target: Path,
    suffix: str,
    comment: str,
    open_sound: Callable[[OutputContainer], Iterator[tuple[Fraction, av.Packet]]],
) -> None:
    """Copy the packets of a finished file and of its sound behind a header with the comment.

    Packets are interleaved by time, so the file streams from its start.
    """
    with (
        av.open(str(source), "r", format=_FORMATS[suffix]) as encoded,
        av.open(str(target), "w", format=_FORMATS[suffix], options=_CODECS[suffix][3]) as container,
    ):
        if comment:
            container.metadata["comment"] = comment
        stream = container.add_stream_from_template(encoded.streams.video[0])
        sounds = open_sound(container)
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
    """Write a gif; frame durations are rounded to 1/100 s so that the total stays exact."""
    ticks = [round(100 * index / fps) * 10 for index in range(len(frames) + 1)]
    durations = [after - before for before, after in pairwise(ticks)]
    pictures = [Image.fromarray(frame) for frame in frames.cpu().numpy()]
    pictures[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=durations,
        loop=0,
        disposal=1,
        comment=comment.encode(),
    )
