"""A video in memory: frames and their rate; it can save itself and show itself in a notebook."""

import base64
import tempfile
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from jaxtyping import UInt8
from torch import Tensor

from skyloom.media.write import write_video

_LARGEST_EMBED = 5 * 2**20
_SMALLEST_PLAYER = 256


@dataclass(frozen=True, eq=False)
class Video:
    """Frames at a constant rate; `receipt` says how they were made and is written into the file."""

    frames: UInt8[Tensor, "t h w c"]
    fps: Fraction
    receipt: dict[str, object] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long it plays."""
        return len(self.frames) / float(self.fps)

    def save(self, path: str | Path) -> Path:
        """Write an .mp4, .webm or .gif, by suffix; the file appears whole or not at all."""
        return write_video(self.frames, self.fps, Path(path), self.receipt)

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"Video({count} frames of {width}x{height}, {float(self.fps):g} fps)"

    def _repr_html_(self) -> str:
        """A player for notebooks; videos of more than 5 MB, or of odd size, are only described."""
        _, height, width, _ = self.frames.shape
        title = f"{width}x{height}, {self.seconds:.2f} s at {float(self.fps):g} fps"
        if height % 2 or width % 2:
            return f"<p>Video, {title}.</p>"
        with tempfile.TemporaryDirectory() as folder:
            content = self.save(Path(folder) / "video.mp4").read_bytes()
        if len(content) > _LARGEST_EMBED:
            return f"<p>Video, {title}: too large to embed, use <code>.save(path)</code>.</p>"
        shown = max(width, _SMALLEST_PLAYER)
        source = f"data:video/mp4;base64,{base64.b64encode(content).decode()}"
        return f'<video controls loop muted width="{shown}" title="{title}" src="{source}"></video>'
