"""Sizes of a Wan transformer."""

from dataclasses import dataclass

from skyloom.models.family import Prediction


@dataclass(frozen=True)
class WanConfig:
    """Sizes of the network.

    text_width: channels of the text encoder. text_length: text tokens that are attended to; shorter
    prompts are padded with zero rows, without a mask. frequency_width: sinusoids of the timestep.
    window: latent frames per window of causal attention.
    """

    in_channels: int
    out_channels: int
    width: int
    heads: int
    layers: int
    ffn: int
    text_width: int
    text_length: int = 512
    patch: tuple[int, int, int] = (1, 2, 2)
    frequency_width: int = 256
    window: int = 3
    rope_theta: float = 10000.0
    eps: float = 1e-6
    prediction: Prediction = "velocity"

    @property
    def head_width(self) -> int:
        """Number of channels of one head."""
        return self.width // self.heads
