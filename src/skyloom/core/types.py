"""Shapes of videos and latents, conversion between them, ranges of seeds and sound. Without torch.

A causal autoencoder encodes the first frame alone and every `time` frames after it as one latent
frame: `latent frames = (frames - 1) // time + 1`.
"""

from dataclasses import dataclass

from skyloom.core.errors import RequestError

MAX_SEED = 2**63 - 1
MIN_AUDIO_RATE = 8_000  # Hz
MAX_AUDIO_RATE = 192_000
AUDIO_LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}  # by number of channels


@dataclass(frozen=True)
class VideoShape:
    """Shape of a video: frame count, height and width in pixels."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise RequestError(
                "The video must not be empty: frames, width and height must be >= 1, "
                f"got {self.frames} frames of {self.width}x{self.height}."
            )

    @property
    def size(self) -> str:
        """Return "WIDTHxHEIGHT"."""
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class LatentShape:
    """Shape of a latent: latent frame count, height and width."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class ScaleFactors:
    """Frames (`time`) and pixels per side (`space`) of one latent cell."""

    time: int
    space: int

    def latent_frames(self, frames: int) -> int:
        """Return the latent frame count; `frames - 1` must be a multiple of `time`."""
        if frames < 1 or (frames - 1) % self.time:
            raise RequestError(
                f"frames must be 1 plus a multiple of {self.time} (whole latent frames), "
                f"got {frames}.",
                hint=f"Use {self.round_frames(max(frames, 1))} frames.",
            )
        return (frames - 1) // self.time + 1

    def video_frames(self, latent_frames: int) -> int:
        """Return the frame count that `latent_frames` decode to."""
        return (latent_frames - 1) * self.time + 1

    def round_frames(self, frames: float) -> int:
        """Return the nearest frame count of whole latent frames."""
        return self.time * max(0, round((frames - 1) / self.time)) + 1

    def frames_for(self, seconds: float, fps: float) -> int:
        """Return the nearest frame count for a duration; the last frame is its end point."""
        return self.time * max(0, round(seconds * fps / self.time)) + 1

    def latent_shape(self, shape: VideoShape) -> LatentShape:
        """Return the latent shape; height and width must be multiples of `space`."""
        if shape.height % self.space or shape.width % self.space:
            raise RequestError(
                f"width and height must be multiples of {self.space}, got {shape.size}.",
                hint=f"Use {round(shape.width / self.space) * self.space}x"
                f"{round(shape.height / self.space) * self.space}.",
            )
        return LatentShape(
            self.latent_frames(shape.frames), shape.height // self.space, shape.width // self.space
        )

    def video_shape(self, latent: LatentShape) -> VideoShape:
        """Return the video shape that a latent decodes to."""
        return VideoShape(
            self.video_frames(latent.frames), latent.height * self.space, latent.width * self.space
        )
