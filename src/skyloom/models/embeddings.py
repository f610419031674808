"""Embeddings of noise level, step size and position; text projection; mean-latent predictor."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

_PLACE_WAVES = 4
_PLACE_FRAMES = 16  # latent frames in half a turn of the slowest wave
PLACE_WIDTH = 3 * 2 * _PLACE_WAVES


class TimeEmbedding(nn.Module):
    """Embed noise levels: sinusoids of the timestep (1000 sigma), two layers, six modulations."""

    def __init__(self, frequency_width: int, width: int) -> None:
        super().__init__()
        self.frequency_width = frequency_width
        self.inner = nn.Linear(frequency_width, width)
        self.outer = nn.Linear(width, width)
        self.to_modulation = nn.Linear(width, 6 * width)

    def forward(self, sigma: Float[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Return the embedding of each latent frame's noise level."""
        waves = sinusoids(sigma, self.frequency_width).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(waves)))

    def modulation(self, embedded: Float[Tensor, "b t d"]) -> Float[Tensor, "b t 6 d"]:
        """Return shift, scale and gate for attention and feed-forward of every block."""
        return rearrange(self.to_modulation(F.silu(embedded)), "b t (six d) -> b t six d", six=6)


class SpanEmbedding(nn.Module):
    """Embed the step size of a few-step student; added to the time embedding, zero-initialised."""

    def __init__(self, frequency_width: int, width: int) -> None:
        super().__init__()
        self.frequency_width = frequency_width
        self.inner = nn.Linear(frequency_width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, span: Float[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Return the embedding of each latent frame's step size."""
        waves = sinusoids(span, self.frequency_width).to(self.inner.weight.dtype)
        return self.outer(F.silu(self.inner(waves)))


class PlaceEmbedding(nn.Module):
    """Embed the absolute position of a token; added to the token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(PLACE_WIDTH, width)
        self.outer = nn.Linear(width, width)

    def forward(self, where: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        """Return the embedding of each token's position waves."""
        return self.outer(F.gelu(self.inner(where), approximate="tanh"))


class Sketch(nn.Module):
    """Predict the mean clean latent of a prompt's videos from prompt attributes and positions.

    The transformer learns this mean very slowly from noise; trained on it directly
    (train/objectives.py), this small network learns it in minutes.
    """

    def __init__(self, meaning: int, width: int, patch: int) -> None:
        super().__init__()
        self.meaning = nn.Linear(meaning, width)
        self.gates = nn.Linear(width, 2 * width)
        self.place = nn.Linear(PLACE_WIDTH, width)
        self.basis = nn.Linear(width, width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, patch)
        self.into = nn.Linear(patch, width)

    def forward(
        self, meaning: Float[Tensor, "b s"], where: Float[Tensor, "n f"]
    ) -> Float[Tensor, "b n k"]:
        """Return the expected patch at each position."""
        scale, shift = self.gates(F.gelu(self.meaning(meaning), approximate="tanh")).chunk(
            2, dim=-1
        )
        basis = self.basis(F.gelu(self.place(where), approximate="tanh"))
        mixed = basis * (1 + scale[:, None]) + shift[:, None]
        return self.outer(F.gelu(self.inner(mixed), approximate="tanh"))


class TextProjection(nn.Module):
    """Project text-encoder features to the transformer's width through one hidden layer."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(text_width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, context: Float[Tensor, "b m k"]) -> Float[Tensor, "b m d"]:
        """Project every text token."""
        return self.outer(F.gelu(self.inner(context), approximate="tanh"))


def place_waves(frames: Int[Tensor, " t"], rows: int, columns: int) -> Float[Tensor, "n f"]:
    """Sinusoids over time, height and width of every token; `frames` are latent frame indices."""
    device = frames.device
    time = frames / _PLACE_FRAMES
    height = (torch.arange(rows, device=device) + 0.5) / rows
    width = (torch.arange(columns, device=device) + 0.5) / columns
    grid = torch.stack(torch.meshgrid(time, height, width, indexing="ij"), dim=-1)
    waves = math.pi * torch.arange(1, _PLACE_WAVES + 1, device=device)
    angles = rearrange(grid[..., None] * waves, "t h w k wave -> (t h w) (k wave)")
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sinusoids(level: Float[Tensor, "b t"], width: int) -> Float[Tensor, "b t f"]:
    """Sinusoidal embedding of a level in [0, 1], scaled to timesteps up to 1000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=level.device))
    angles = 1000 * level.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
