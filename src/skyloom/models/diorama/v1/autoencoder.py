# pyright: basic
"""Causal video autoencoder: 4 frames x 16 x 16 pixels per latent cell; the first frame stays alone.

The first frame is repeated three times in front, so that every latent frame covers four frames and
the first one depends on frame 0 only. The encoder is linear: the principal components of 4x16x16
patches. The decoder is their inverse plus a convolutional correction, mostly of patch borders.
Compared with the Wan autoencoder in docs/decisions/0003-autoencoder.md.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from skyloom.core.types import ScaleFactors
from skyloom.models.conv import DecoderCache, ShiftBlock, split_frames
from skyloom.models.diorama.autoencoder import place, principal_components

TIME = 4
SPACE = 16


@dataclass(frozen=True)
class VaeConfig:
    """Channels of the latent, and of the decoder at 1/2, 1/4, 1/8 and 1/16 of the resolution."""

    latent_channels: int = 48
    decoder_widths: tuple[int, int, int, int] = (32, 64, 128, 192)

    @property
    def scale(self) -> ScaleFactors:
        """Number of frames and pixels per latent cell."""
        return ScaleFactors(time=TIME, space=SPACE)


class Vae(nn.Module):
    """Encode videos to normalised latents and decode them."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = VaeEncoder(config)
        self.decoder = VaeDecoder(config)
        self.register_buffer("mean", torch.zeros(config.latent_channels))
        self.register_buffer("std", torch.ones(config.latent_channels))

    @property
    def scale(self) -> ScaleFactors:
        """Number of frames and pixels per latent cell."""
        return self.config.scale

    @property
    def latent_channels(self) -> int:
        """Number of channels of a latent."""
        return self.config.latent_channels

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.linear.weight.device

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device: the decoder's convolutions in `dtype`, everything else in fp32."""
        place(self, device, dtype)

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c u y x"]:
        """Encode pixels in [-1, 1]; t = 4k + 1, h and w multiples of 16; about unit scale."""
        latent = self.encoder(video).float()
        return (latent - self._per_channel(self.mean)) / self._per_channel(self.std)

    def decode(self, latent: Float[Tensor, "b c u y x"]) -> Float[Tensor, "b 3 t h w"]:
        """Decode to pixels in about [-1, 1] (not clamped); t = 4 (u - 1) + 1."""
        return self.decode_step(latent, None)[0]

    def decode_step(
        self, latent: Float[Tensor, "b c u y x"], cache: DecoderCache | None
    ) -> tuple[Float[Tensor, "b 3 t h w"], DecoderCache]:
        """Decode the next window; the first one (cache None) yields three frames fewer.

        Windows decoded in order equal the video decoded whole.
        """
        raw = latent * self._per_channel(self.std) + self._per_channel(self.mean)
        video, after = self.decoder(raw, cache)
        return (video[:, :, TIME - 1 :] if cache is None else video), after

    def _per_channel(self, values: Float[Tensor, " c"]) -> Float[Tensor, "1 c 1 1 1"]:
        return rearrange(values, "c -> 1 c 1 1 1")


class VaeEncoder(nn.Module):
    """Pixels to raw latents (not normalised): principal components of 4x16x16 patches."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.linear = nn.Conv2d(3 * TIME, config.latent_channels, SPACE, stride=SPACE)

    def forward(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c u y x"]:
        """Encode whole videos; the first frame is repeated in front."""
        padded = torch.cat(
            [repeat(video[:, :, :1], "b c 1 h w -> b c n h w", n=TIME - 1), video], dim=2
        )
        groups = rearrange(padded, "b c (u n) h w -> (b u) (n c) h w", n=TIME)
        return rearrange(self.linear(groups), "(b u) c y x -> b c u y x", b=len(video))


class VaeDecoder(nn.Module):
    """Raw latents to pixels, by window: a linear path plus a convolutional correction.

    The convolutions may have a narrower dtype than the linear path.
    """

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        half, quarter, eighth, sixteenth = config.decoder_widths
        self.linear = nn.Conv2d(config.latent_channels, 3 * TIME * SPACE * SPACE, 1)
        self.stem = nn.Conv2d(config.latent_channels, sixteenth, 3, padding=1)
        self.blocks = nn.ModuleList(
            ShiftBlock(width)
            for width in (sixteenth, sixteenth, eighth, eighth, quarter, quarter, half)
        )
        self.to_eighth = nn.Conv2d(sixteenth, 4 * eighth, 1)
        self.split_first = nn.Conv2d(eighth, 2 * eighth, 1)
        self.to_quarter = nn.Conv2d(eighth, 4 * quarter, 1)
        self.split_second = nn.Conv2d(quarter, 2 * quarter, 1)
        self.to_half = nn.Conv2d(quarter, 4 * half, 1)
        self.head = nn.Conv2d(half, 12, 3, padding=1)
        _start_small(self, self.head)

    def forward(
        self, latent: Float[Tensor, "b c u y x"], cache: DecoderCache | None
    ) -> tuple[Float[Tensor, "b 3 t h w"], DecoderCache]:
        """Return four frames per latent frame, and the cache for the next window."""
        batch = latent.shape[0]
        before = cache.features if cache else (None,) * len(self.blocks)
        after: list[Tensor] = []

        def run(x: Tensor, first: int, last: int) -> Tensor:
            for index in range(first, last):
                x, kept = self.blocks[index](x, batch, before[index])
                after.append(kept)
            return x

        flat = rearrange(latent, "b c u y x -> (b u) c y x").contiguous(
            memory_format=torch.channels_last
        )
        weight = rearrange(self.linear.weight, "k c 1 1 -> k c")
        linear = rearrange(
            F.linear(
                rearrange(latent, "b c u y x -> (b u) y x c").to(weight.dtype),
                weight,
                self.linear.bias,
            ),
            "(b u) y x (n c p q) -> b c (u n) (y p) (x q)",
            b=batch,
            n=TIME,
            p=SPACE,
            q=SPACE,
        )
        x = run(self.stem(flat.to(self.stem.weight.dtype)), 0, 2)
        x = run(split_frames(self.split_first(_enlarge(self.to_eighth(x)))), 2, 4)
        x = run(split_frames(self.split_second(_enlarge(self.to_quarter(x)))), 4, 6)
        x = run(_enlarge(self.to_half(x)), 6, 7)
        detail = rearrange(
            self.head(F.silu(x)), "(b t) (c p q) h w -> b c t (h p) (w q)", b=batch, p=2, q=2
        )
        return linear + detail.to(linear.dtype), DecoderCache(tuple(after))


def _enlarge(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c4 h2 w2"]:
    return F.pixel_shuffle(x, 2).contiguous(memory_format=torch.channels_last)


def _start_small(module: nn.Module, head: nn.Conv2d) -> None:
    """Initialise convolutions to keep the scale, and the head to zero."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and name != "linear" and not name.endswith("conv_out"):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
            _zero(layer.bias)
    _zero(head.weight)
    _zero(head.bias)


@torch.no_grad()
def _zero(parameter: Tensor | None) -> None:
    if parameter is not None:
        parameter.zero_()


@torch.no_grad()
def initialise_linear_path(vae: Vae, patches: Float[Tensor, "n d"]) -> float:
    """Set both linear paths to the principal components of `patches`; return explained variance.

    A patch is 4 frames x 3 channels x 16 x 16 pixels in [-1, 1], flattened in that order. A
    component of variance v is scaled to standard deviation v**0.25 (relative to the last one, at
    most 4), so that coarse components keep larger values than fine ones.
    """
    channels = vae.config.latent_channels
    center = patches.mean(0)
    variances, directions = principal_components(patches - center)
    kept = variances[:channels].clamp(min=1e-8)
    axes = directions[:, :channels]
    scale = (kept / kept[-1]).pow(0.25).clamp(max=4.0) / kept.sqrt()
    forward = (axes * scale).T
    vae.encoder.linear.weight.copy_(
        rearrange(forward, "c (k p q) -> c k p q", k=3 * TIME, p=SPACE, q=SPACE)
    )
    assert vae.encoder.linear.bias is not None
    assert vae.decoder.linear.bias is not None
    vae.encoder.linear.bias.copy_(-forward @ center)
    vae.decoder.linear.weight.copy_(rearrange(axes / scale, "d c -> d c 1 1"))
    vae.decoder.linear.bias.copy_(center)
    return float(kept.sum() / variances.clamp(min=0).sum())
