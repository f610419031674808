"""Shapes of videos and latents, and the arithmetic between them; the range of seeds. Needs no torch.

A causal autoencoder keeps the first frame alone and merges every `time` frames after it into one
latent frame, so `latent frames = (frames - 1) // time + 1`. No other file does this arithmetic.
"""

from dataclasses import dataclass

from skyloom.core.errors import RequestError

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class VideoShape:
    """Pixels: frame count, height and width."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise RequestError(
                f"A video of {self.frames} frames at {self.width}x{self.height} is empty."
            )

    @property
    def size(self) -> str:
        """Width x height, as users write it."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class LatentShape:
    """Latents: latent frame count, height and width."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class ScaleFactors:
    """How many frames and pixels one latent cell covers."""

    time: int
    space: int

    def latent_frames(self, frames: int) -> int:
        """Latent frames that hold `frames` frames; `frames - 1` must be a multiple of `time`."""
        if frames < 1 or (frames - 1) % self.time:
            raise RequestError(
                f"{frames} frames do not fit whole latent frames.",
                hint=f"Use {self.round_frames(max(frames, 1))} frames: 1 plus a multiple of {self.time}.",
            )
        return (frames - 1) // self.time + 1

    def video_frames(self, latent_frames: int) -> int:
        """Frames that `latent_frames` latent frames decode to."""
        return (latent_frames - 1) * self.time + 1

    def round_frames(self, frames: float) -> int:
        """The nearest frame count that fits whole latent frames."""
        return self.time * max(0, round((frames - 1) / self.time)) + 1

    def frames_for(self, seconds: float, fps: float) -> int:
        """Frames that play for at least about `seconds`: the last frame counts as the end point."""
        return self.time * max(0, round(seconds * fps / self.time)) + 1

    def latent_shape(self, shape: VideoShape) -> LatentShape:
        """The latent shape of a video shape; height and width must be multiples of `space`."""
        if shape.height % self.space or shape.width % self.space:
            raise RequestError(
                f"{shape.size} is not a multiple of {self.space} pixels.",
                hint=f"Use {round(shape.width / self.space) * self.space}x"
                f"{round(shape.height / self.space) * self.space}.",
            )
        return LatentShape(
            self.latent_frames(shape.frames), shape.height // self.space, shape.width // self.space
        )

    def video_shape(self, latent: LatentShape) -> VideoShape:
        """The video shape that a latent decodes to."""
        return VideoShape(
            self.video_frames(latent.frames), latent.height * self.space, latent.width * self.space
        )
