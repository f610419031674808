"""Video autoencoder of the diorama family: linear encoder, convolutional decoder.

The encoder averages `enlarge` x `enlarge` pixels and keeps the principal components of 4-frame, 8x8
patches. The first frame is repeated three times in front, so that every latent frame covers four
frames and the first one depends on frame 0 only. The decoder inverts the components and adds a
correction, computed for the four frames of a latent frame together. It reads one latent frame into
the past, so a video may be decoded in windows.
"""

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from skyloom.core.types import ScaleFactors
from skyloom.models.conv import DecoderCache, shift_channels
from skyloom.models.diorama.config import PATCH, TIME, AutoencoderConfig

A = TypeVar("A", bound=Any)
_GROUPS = 8
_SHUFFLE = 4  # encoder pixels per side of a cell in the decoder's coarse feature maps


class DioramaAutoencoder(nn.Module):
    """Encode videos to latents of unit root mean square and decode them."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.components = nn.Conv2d(3 * TIME, config.channels, PATCH, stride=PATCH)
        self.decoder = Decoder(config)

    @property
    def scale(self) -> ScaleFactors:
        """Number of frames and pixels per latent cell."""
        return self.config.scale

    @property
    def latent_channels(self) -> int:
        """Number of channels of a latent."""
        return self.config.channels

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.components.weight.device

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device: the decoder's convolutions in `dtype`, everything else in fp32."""
        place(self, device, dtype)

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c u y x"]:
        """Encode pixels in [-1, 1]; t = 4k + 1, h and w multiples of `8 enlarge`."""
        return self.encode_small(shrink(video, self.config.enlarge))

    def encode_small(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c u y x"]:
        """Encode a video at the encoder's resolution; h and w multiples of 8."""
        padded = torch.cat(
            [repeat(video[:, :, :1], "b c 1 h w -> b c n h w", n=TIME - 1), video], dim=2
        )
        groups = rearrange(padded, "b c (u n) h w -> (b u) (n c) h w", n=TIME)
        return rearrange(self.components(groups), "(b u) c y x -> b c u y x", b=len(video))

    def decode(self, latent: Float[Tensor, "b c u y x"]) -> Float[Tensor, "b 3 t h w"]:
        """Decode to pixels in about [-1, 1] (not clamped); t = 4 (u - 1) + 1."""
        return self.decode_step(latent, None)[0]

    def decode_step(
        self, latent: Float[Tensor, "b c u y x"], cache: DecoderCache | None
    ) -> tuple[Float[Tensor, "b 3 t h w"], DecoderCache]:
        """Decode the next window; the first one (cache None) yields three frames fewer."""
        video, after = self.decoder(latent, cache)
        return (video[:, :, TIME - 1 :] if cache is None else video), after


class DecoderBlock(nn.Module):
    """Two 3x3 convolutions; a quarter of the input channels come from the latent frame before.

    Without the norm training diverges: the four frames and 16 pixels of a cell are nearly equal, so
    their weights move together.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(_GROUPS, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(
        self, x: Float[Tensor, "bt c h w"], batch: int, previous: Float[Tensor, "b s h w"] | None
    ) -> tuple[Float[Tensor, "bt c h w"], Float[Tensor, "b s h w"]]:
        """Return the block's output and the cache for the next window."""
        shifted, last = shift_channels(F.silu(self.norm(x)), batch, previous)
        return x + self.second(F.silu(self.first(shifted))), last


class Decoder(nn.Module):
    """Latents to pixels: the inverse of the components, enlarged, plus a learned correction."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        coarse, fine = config.widths
        self.linear = nn.Conv2d(config.channels, 3 * TIME * PATCH**2, 1)
        self.stem = nn.Conv2d(3 * TIME * _SHUFFLE**2, coarse, 3, padding=1)
        self.coarse = nn.ModuleList(DecoderBlock(coarse) for _ in range(config.blocks[0]))
        self.up = nn.Conv2d(coarse, 4 * fine, 1)
        self.fine = nn.ModuleList(DecoderBlock(fine) for _ in range(config.blocks[1]))
        # pixels of the video per side of a cell in the fine feature maps
        self.side = _SHUFFLE // 2 * config.enlarge
        self.head = nn.Conv2d(fine, 3 * TIME * self.side**2, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(
        self, latent: Float[Tensor, "b c u y x"], cache: DecoderCache | None
    ) -> tuple[Float[Tensor, "b 3 t h w"], DecoderCache]:
        """Return four frames per latent frame, and the cache for the next window."""
        batch = len(latent)
        before = iter(cache.features if cache else ())
        after: list[Tensor] = []
        small = self.inverse(latent)
        shuffled = F.pixel_unshuffle(small.to(self.stem.weight.dtype), _SHUFFLE)
        x = self.stem(shuffled.contiguous(memory_format=torch.channels_last))
        for block in self.coarse:
            x, last = block(x, batch, next(before, None))
            after.append(last)
        x = F.pixel_shuffle(self.up(F.silu(x)), 2).contiguous(memory_format=torch.channels_last)
        for block in self.fine:
            x, last = block(x, batch, next(before, None))
            after.append(last)
        correction = F.pixel_shuffle(self.head(F.silu(x)), self.side).to(small.dtype)
        frames = enlarge(small, self.config.enlarge) + correction
        video = rearrange(frames, "(b u) (n c) h w -> b c (u n) h w", b=batch, n=TIME)
        return video, DecoderCache(tuple(after))

    def inverse(self, latent: Float[Tensor, "b c u y x"]) -> Float[Tensor, "bu k h w"]:
        """Decode by the components alone, at the encoder's resolution; k: 4 frames x 3 colours."""
        flat = rearrange(latent, "b c u y x -> (b u) c y x").to(self.linear.weight.dtype)
        with torch.autocast(latent.device.type, enabled=False):
            return F.pixel_shuffle(self.linear(flat), PATCH)


def shrink(video: Float[Tensor, "b 3 t h w"], factor: int) -> Float[Tensor, "b 3 t y x"]:
    """Average `factor` x `factor` pixels."""
    if factor == 1:
        return video
    return rearrange(video, "b c t (h p) (w q) -> b c t h w p q", p=factor, q=factor).mean((-1, -2))


def enlarge(frames: Float[Tensor, "n k h w"], factor: int) -> Float[Tensor, "n k y x"]:
    """Enlarge pictures bilinearly."""
    if factor == 1:
        return frames
    return F.interpolate(frames, scale_factor=factor, mode="bilinear", align_corners=False)


@torch.no_grad()
def initialise_components(autoencoder: DioramaAutoencoder, patches: Float[Tensor, "n d"]) -> float:
    """Set encoder and inverse to the principal components of `patches`; return explained variance.

    A patch is 4 frames x 3 channels x 8 x 8 pixels in [-1, 1], flattened in that order. A component
    of variance v gets standard deviation v**0.25, at most 4 times that of the last one, so that
    coarse components dominate; all together have a root mean square of 1.
    """
    channels = autoencoder.config.channels
    center = patches.mean(0)
    variances, directions = principal_components(patches - center)
    kept = variances[:channels].clamp(min=1e-8)
    axes = directions[:, :channels]
    amplitude = (kept / kept[-1]).pow(0.25).clamp(max=4.0)
    scale = amplitude / amplitude.square().mean().sqrt() / kept.sqrt()
    forward = (axes * scale).T
    assert autoencoder.components.bias is not None
    assert autoencoder.decoder.linear.bias is not None
    autoencoder.components.weight.copy_(
        rearrange(forward, "c (k p q) -> c k p q", k=3 * TIME, p=PATCH, q=PATCH)
    )
    autoencoder.components.bias.copy_(-forward @ center)
    autoencoder.decoder.linear.weight.copy_(rearrange(axes / scale, "d c -> d c 1 1"))
    autoencoder.decoder.linear.bias.copy_(center)
    return float(kept.sum() / variances.clamp(min=0).sum())


def principal_components(
    centred: Float[Tensor, "n d"],
) -> tuple[Float[Tensor, " k"], Float[Tensor, "d k"]]:
    """Return falling variances and their directions; uses inner products if n < d."""
    count, width = centred.shape
    if count >= width:
        variances, directions = _eigh(centred.T @ centred / (count - 1))
        return variances.flip(0), directions.flip(1)
    variances, weights = _eigh(centred @ centred.T / (count - 1))
    variances = variances.flip(0)
    weights = weights.flip(1)
    return variances, centred.T @ (weights / ((count - 1) * variances.clamp(min=1e-8)).sqrt())


def _eigh(matrix: Float[Tensor, "n n"]) -> tuple[Tensor, Tensor]:
    return torch.linalg.eigh(matrix)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def place(autoencoder: A, device: torch.device, dtype: torch.dtype) -> A:
    """Move to a device: the decoder's convolutions in `dtype`, everything else in fp32."""
    autoencoder = autoencoder.eval().to(device, torch.float32)
    for name, layer in autoencoder.decoder.named_children():
        if name != "linear":  # rounding it would change every pixel
            layer.to(dtype)
    return autoencoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
