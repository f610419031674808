"""Interfaces of a model's parts: text encoder, autoencoder, transformer.

Everything above `models` uses these interfaces only; each family implements them in its folder.
Latents are normalised, `[b c t h w]`; sigma 1 is noise and 0 is data (diffusion/flow.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from skyloom.core.types import ScaleFactors
from skyloom.models.attention import KvCache

AttentionMode = Literal["bidirectional", "causal"]
Prediction = Literal["velocity", "denoised", "angular"]


@dataclass(frozen=True)
class TextContext:
    """Encoded prompts, padded with zeros; truncated: number of dropped tokens per prompt."""

    context: Float[Tensor, "b m d"]
    context_mask: Bool[Tensor, "b m"]
    pooled: Float[Tensor, "b p"]
    truncated: tuple[int, ...]


@dataclass(frozen=True)
class TextCondition:
    """Prompt projected for every layer; keys and values are `[b heads m c]`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Float[Tensor, "b 1 1 m"] | None
    pooled: Float[Tensor, "b d"] | None
    attributes: Float[Tensor, "b s"] | None = None


@runtime_checkable
class TextEncoder(Protocol):
    """Encodes prompts."""

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts one at a time: results do not depend on the batch."""
        ...


@runtime_checkable
class Autoencoder(Protocol):
    """Encodes videos to latents and decodes them."""

    @property
    def scale(self) -> ScaleFactors:
        """Number of frames and pixels per latent cell."""
        ...

    @property
    def latent_channels(self) -> int:
        """Number of channels of a latent."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c u y x"]:
        """Encode pixels in [-1, 1] to a normalised latent."""
        ...

    def decode(self, latent: Float[Tensor, "b c u y x"]) -> Float[Tensor, "b 3 t h w"]:
        """Decode to pixels in about [-1, 1] (not clamped)."""
        ...

    def decode_step(
        self, latent: Float[Tensor, "b c u y x"], cache: Any
    ) -> tuple[Float[Tensor, "b 3 t h w"], Any]:
        """Decode the next window and return the cache for the one after it; None is the start.

        Windows decoded in order equal the video decoded whole.
        """
        ...


@runtime_checkable
class Transformer(Protocol):
    """Predicts the denoising direction of every latent frame."""

    @property
    def prediction(self) -> Prediction:
        """What the output is; `diffusion.flow.to_velocity` converts it."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Precision of latents and text that it takes."""
        ...

    @property
    def uncached_frame_offset(self) -> int:
        """Index given to the first latent frame of a window inside a video without a cache."""
        ...

    def prepare_text(
        self,
        context: Float[Tensor, "b m k"],
        context_mask: Bool[Tensor, "b m"] | None = None,
        pooled: Float[Tensor, "b p"] | None = None,
    ) -> TextCondition:
        """Project a prompt once for all layers and steps; masked tokens are not attended to."""
        ...

    def __call__(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        *,
        cache: KvCache | None = None,
        span: Float[Tensor, "b t"] | None = None,
        frame_indices: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b c t h w"]:
        """Predict a window; with a cache, it follows the cached latent frames.

        span: step size of a few-step student; None for the teacher. frame_indices: indices of the
        latent frames in their video; by default they follow the cached ones.
        """
        ...

    def extend_cache(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        cache: KvCache,
        span: Float[Tensor, "b t"] | None = None,
    ) -> KvCache:
        """Append a finished window to the cache, stored at the noise level `sigma`."""
        ...


@runtime_checkable
class SoundModel(Protocol):
    """Makes the sound of generated latent frames: the optional second modality of a family."""

    @property
    def rate(self) -> int:
        """Samples per second."""
        ...

    @property
    def channels(self) -> int:
        """Number of channels: 1, 2 or 6."""
        ...

    def generate(
        self, latent: Float[Tensor, "1 c t h w"], text: TextCondition, samples: int, seed: int
    ) -> Float[Tensor, "channels samples"]:
        """Make exactly `samples` samples in [-1, 1] for the shown frames of a window."""
        ...


@dataclass(frozen=True)
class Parts:
    """The parts of a loaded model."""

    text_encoder: TextEncoder
    autoencoder: Autoencoder
    transformer: Transformer
