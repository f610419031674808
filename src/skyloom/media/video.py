"""A video in memory: frames, rate, receipt and sound; saves to a file, displays in notebooks."""

import base64
import tempfile
import warnings
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from skyloom.core.audio import Audio
from skyloom.media.write import write_video

_MAX_EMBED_BYTES = 5 * 2**20
_MIN_PLAYER_WIDTH = 256


@dataclass(frozen=True, eq=False)
class Video:
    """Frames at a constant rate, with sound from the first frame on, if there is any.

    `receipt` (how they were generated) is embedded when saving.
    """

    frames: UInt8[Tensor, "t h w c"]
    fps: Fraction
    receipt: dict[str, object] = field(default_factory=dict)
    audio: Audio | None = None

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return len(self.frames) / float(self.fps)

    def save(self, path: str | Path) -> Path:
        """Write an .mp4, .webm, .mkv or .gif file by suffix; atomic.

        Sound is cut, or padded with silence, to the length of the frames; a .gif drops it with a
        warning.
        """
        path = Path(path)
        if self.audio is not None and path.suffix.lower() == ".gif":
            warnings.warn("The sound was dropped: a .gif holds none.", stacklevel=2)
        return write_video(self.frames, self.fps, path, self.receipt, audio=self.audio)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        sound = ", with sound" if self.audio is not None else ""
        return f"Video({count} frames of {width}x{height}, {float(self.fps):g} fps{sound})"

    def _repr_html_(self) -> str:
        """Return an HTML player; a description for videos of more than 5 MB or of odd size."""
        _, height, width, _ = self.frames.shape
        title = f"{width}x{height}, {self.seconds:.2f} s at {float(self.fps):g} fps"
        if height % 2 or width % 2:
            return f"<p>Video, {title}.</p>"
        with tempfile.TemporaryDirectory() as folder:
            content = self.save(Path(folder) / "video.mp4").read_bytes()
        if len(content) > _MAX_EMBED_BYTES:
            return f"<p>Video, {title}: too large to embed, use <code>.save(path)</code>.</p>"
        shown = max(width, _MIN_PLAYER_WIDTH)
        url = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
        muted = "muted " if self.audio is None else ""
        return f'<video controls loop {muted}width="{shown}" title="{title}" src="{url}"></video>'
