"""Sound in memory: float samples at a constant rate, cut and joined at rational times in seconds.

A time falls on sample `floor(seconds * rate)`, so consecutive pieces add up without drift.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from skyloom.core.errors import MediaError
from skyloom.core.types import AUDIO_LAYOUTS, MAX_AUDIO_RATE, MIN_AUDIO_RATE


def samples_at(seconds: Fraction, rate: int) -> int:
    """Return the index of the sample at a time: floor(seconds * rate)."""
    return int(seconds * rate // 1)


@dataclass(frozen=True, eq=False)
class Audio:
    """Samples in [-1, 1], float32, 1 (mono), 2 (stereo) or 6 (5.1) channels; `rate` in Hz.

    Values outside [-1, 1] are clamped when written. Raises MediaError for another dtype, number of
    channels or rate, and for samples that are not finite.
    """

    samples: Float[Tensor, "c n"]
    rate: int

    def __post_init__(self) -> None:
        shape = list(self.samples.shape)
        if self.samples.dtype != torch.float32 or len(shape) != len("cn"):
            raise MediaError(
                f"samples must be float32 [channels n], got {self.samples.dtype} {shape}."
            )
        if self.channels not in AUDIO_LAYOUTS:
            raise MediaError(
                f"samples must have 1, 2 or 6 channels, got {self.channels}.",
                hint="Samples are [channels n]: transpose them, or mix channels.",
            )
        if not MIN_AUDIO_RATE <= self.rate <= MAX_AUDIO_RATE:
            raise MediaError(
                f"rate must be {MIN_AUDIO_RATE} to {MAX_AUDIO_RATE} Hz, got {self.rate}."
            )
        if not torch.isfinite(self.samples).all():
            raise MediaError("samples must be finite, got NaN or infinity.")

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.samples.shape[0]

    @property
    def seconds(self) -> Fraction:
        """Exact duration in seconds."""
        return Fraction(self.samples.shape[1], self.rate)

    def slice(self, start: Fraction, stop: Fraction) -> "Audio":
        """Return the samples of [start, stop) seconds, as far as there are any; no copy.

        Raises MediaError for a range that is negative or runs backwards.
        """
        if not 0 <= start <= stop:
            raise MediaError(
                f"A range of sound must have 0 <= start <= stop, got {start} to {stop} s."
            )
        begin = samples_at(start, self.rate)
        end = samples_at(stop, self.rate)
        return Audio(self.samples[:, begin:end], self.rate)

    @staticmethod
    def silence(seconds: Fraction, rate: int, channels: int = 2) -> "Audio":
        """Return silence of `floor(seconds * rate)` samples."""
        return Audio(torch.zeros(channels, samples_at(seconds, rate)), rate)

    @staticmethod
    def concatenate(pieces: Sequence["Audio"]) -> "Audio":
        """Join pieces of one rate and number of channels. Raises MediaError for others or none."""
        formats = sorted({(piece.rate, piece.channels) for piece in pieces})
        if len(formats) != 1:
            raise MediaError(
                f"pieces must have one rate and number of channels, got {formats or 'none'}."
            )
        return Audio(torch.cat([piece.samples for piece in pieces], dim=1), formats[0][0])
