"""Test videos with any codec, frame times, container options and audio."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

WriteFilm = Callable[..., Path]


def pictures(count: int, height: int, width: int) -> list[np.ndarray]:
    """Return a drifting block pattern; all frames differ, and codecs use inter prediction."""
    blocks = np.random.default_rng(0).integers(
        0, 255, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8
    )
    pattern = np.kron(blocks, np.ones((8, 8, 1), np.uint8))
    return [
        np.ascontiguousarray(np.roll(pattern, (2 * i, 3 * i), (0, 1))[:height, :width])
        for i in range(count)
    ]


def write_film(
    path: Path,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    *,
    pixel_format: str = "yuv420p",
    fps: int = 24,
    count: int = 40,
    size: tuple[int, int] = (64, 96),
    times: Sequence[int] | None = None,
    tick: Fraction | None = None,
    container_options: dict[str, str] | None = None,
    sound: bool = False,
) -> Path:
    """Write a video of `pictures`; `times` are frame times in ticks."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.height, stream.width = size
        stream.pix_fmt = pixel_format
        tones = (
            container.add_stream("aac" if path.suffix == ".mp4" else "libopus", rate=48_000)
            if sound
            else None
        )
        for number, picture in enumerate(pictures(count if times is None else len(times), *size)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format=pixel_format
            )
            if times is not None:
                frame.pts, frame.time_base = times[number], tick or Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if tones is not None:
            for frame in _tones(count / fps):
                container.mux(tones.encode(frame))
            container.mux(tones.encode(None))
    return path


def _tones(seconds: float) -> list[av.AudioFrame]:
    """Return silence with a click in the middle of every second, in frames of 20 ms."""
    rate, step = 48_000, 960
    wave = np.zeros((1, int(seconds * rate)), np.float32)
    wave[0, rate // 2 :: rate] = 1
    frames = []
    for begin in range(0, wave.shape[1] - step + 1, step):
        frame = av.AudioFrame.from_ndarray(
            wave[:, begin : begin + step].repeat(2, 0), "fltp", "stereo"
        )
        frame.sample_rate, frame.pts, frame.time_base = rate, begin, Fraction(1, rate)
        frames.append(frame)
    return frames


@pytest.fixture(scope="session")
def film() -> WriteFilm:
    """Return the function `write_film`."""
    return write_film
