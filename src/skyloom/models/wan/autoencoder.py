"""Autoencoders of Wan 2.1 and 2.2 (Wan team 2025, arXiv 2503.20314), causal in time.

The first frame is encoded alone, then four frames at a time; latent frames are decoded one by one.
Every convolution remembers the last two frames of its input, so that windows equal the whole video
and the memory does not grow with its length. Features are computed for at most two frames at once.
The decoder may work in tiles, each with its own memory (`Tiling`).
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from skyloom.core.types import ScaleFactors
from skyloom.models.preview import PreviewMap
from skyloom.models.wan.autoencoder_layers import (
    CausalConv,
    DownBlock,
    HeadConv,
    Memory,
    PixelNorm,
    UpBlock,
    channels_last,
    middle,
    number_slots,
    split,
)

TIME = 4
MULTIPLIERS = (1, 2, 4, 4)
DOWN_IN_TIME = (False, True, True)
_AT_ONCE = 2  # frames

# mean and standard deviation of the latents of real videos, by the original code
MEAN_2_1 = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD_2_1 = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
MEAN_2_2 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
    *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
    *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
    *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
    *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
STD_2_2 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
    *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
    *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
    *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
    *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


@dataclass(frozen=True)
class WanAutoencoderConfig:
    """Sizes of the autoencoder, by default those of Wan 2.1; `WAN_2_2` has those of Wan 2.2.

    channels: of the latent. width, decoder_width: channels at full resolution. patch: pixels per
    side that the network sees as channels. residual: blocks have shortcuts around their change of
    resolution (2.2). mean, std: of the latent, per channel.
    """

    channels: int = 16
    width: int = 96
    decoder_width: int = 96
    patch: int = 1
    residual: bool = False
    mean: tuple[float, ...] = MEAN_2_1
    std: tuple[float, ...] = STD_2_1

    @property
    def scale(self) -> ScaleFactors:
        """Number of frames and pixels per latent cell."""
        return ScaleFactors(time=TIME, space=self.patch * 2 ** len(DOWN_IN_TIME))


WAN_2_1 = WanAutoencoderConfig()
WAN_2_2 = WanAutoencoderConfig(48, 160, 256, patch=2, residual=True, mean=MEAN_2_2, std=STD_2_2)


@dataclass(frozen=True)
class Tiling:
    """Squares of `size` pixels, one every `stride` pixels, blended where they overlap."""

    size: int = 256
    stride: int = 192


@dataclass(frozen=True, eq=False)
class WanDecoderCache:
    """Last frames before every convolution, for each video of the batch and each tile of it."""

    features: tuple[tuple[tuple[Tensor, ...], ...], ...]


class WanAutoencoder(nn.Module):
    """Encode videos to normalised latents in fp32, and decode them.

    tiling: decode in tiles, the last resort against too little memory; None: whole frames. It may
    be set in the middle of a video. Seams may be visible: a tile does not see beyond its edges.
    """

    def __init__(self, config: WanAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tiling: Tiling | None = None
        self.encoder = WanEncoder(config)
        self.quant = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant = nn.Conv2d(config.channels, config.channels, 1)
        self.decoder = WanDecoder(config)

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
        return self.quant.weight.device

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device: the decoder in bf16 if that is `dtype`, everything else in fp32.

        The decoder overflows in fp16; an encoder in bf16 loses the details of given frames.
        """
        self.eval().to(device, torch.float32)
        if dtype == torch.bfloat16:
            self.post_quant.to(dtype)
            self.decoder.to(dtype)

    def tile(self, on: bool) -> None:
        """Decode in tiles from now on, or whole frames again."""
        self.tiling = Tiling() if on else None

    @torch.no_grad()
    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c u y x"]:
        """Encode pixels in [-1, 1]; t = 4k + 1, h and w multiples of `scale.space`."""
        latents = torch.stack([self._encode_one(one) for one in video])
        mean, std = self._statistics(latents.device)
        return (latents - mean) / std

    @torch.no_grad()
    def decode(self, latent: Float[Tensor, "b c u y x"]) -> Float[Tensor, "b 3 t h w"]:
        """Decode to pixels in [-1, 1], clamped; t = 4 (u - 1) + 1."""
        return self.decode_step(latent, None)[0]

    @torch.no_grad()
    def decode_step(
        self, latent: Float[Tensor, "b c u y x"], cache: WanDecoderCache | None
    ) -> tuple[Float[Tensor, "b 3 t h w"], WanDecoderCache]:
        """Decode the next latent frames; the first one of a video yields one frame, others four.

        The cache is not changed. Raises ValueError for a cache of other tiles.
        """
        mean, std = self._statistics(latent.device)
        raw = (latent.float() * std + mean).to(self.post_quant.weight.dtype)
        videos: list[Tensor] = []
        features: list[tuple[tuple[Tensor, ...], ...]] = []
        for index, one in enumerate(raw):
            clip = self.post_quant(channels_last(one.transpose(0, 1)))
            before = None if cache is None else cache.features[index]
            decoded, after = self._decode_tiles(clip, before)
            videos.append(unpatchify(decoded, self.config.patch).clamp_(-1, 1))
            features.append(after)
            self._preview_map.observe(latent[index], videos[-1], start=cache is None)
        return torch.stack(videos), WanDecoderCache(tuple(features))

    @torch.no_grad()
    def preview(self, latent: Float[Tensor, "c y x"]) -> Float[Tensor, "3 h w"] | None:
        """Return coarse pixels of a latent frame; None before anything was decoded."""
        return self._preview_map.picture(latent)

    @cached_property
    def _preview_map(self) -> PreviewMap:
        """The map of these weights: its name has their hash."""
        weights = self.post_quant.weight.detach().float().cpu().numpy().tobytes()
        name = f"wan-{hashlib.sha256(weights).hexdigest()[:16]}"
        return PreviewMap(name, self.config.channels, self.scale)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latent, `[c 1 1 1]`."""
        mean = torch.tensor(self.config.mean, device=device)
        std = torch.tensor(self.config.std, device=device)
        return mean[:, None, None, None], std[:, None, None, None]

    def _encode_one(self, video: Float[Tensor, "3 t h w"]) -> Float[Tensor, "c u y x"]:
        """Encode to the means of the latent's distribution, not normalised."""
        memory: Memory = [None] * self.encoder.slots
        starts = (0, *range(1, video.shape[1], TIME))
        ends = (*starts[1:], video.shape[1])
        latents = [
            self.encoder(patchify(video[:, start:end].float(), self.config.patch), memory)
            for start, end in zip(starts, ends, strict=True)
        ]
        means = self.quant(torch.cat(latents))[:, : self.config.channels]
        return means.transpose(0, 1)

    def _decode_tiles(
        self, clip: Float[Tensor, "u c y x"], before: tuple[tuple[Tensor, ...], ...] | None
    ) -> tuple[Float[Tensor, "t p h w"], tuple[tuple[Tensor, ...], ...]]:
        """Decode latent frames of a video in tiles, one after the other in time, and blend them.

        The memories of tiles that wait are kept in host memory.
        """
        rows = self._tile_ranges(clip.shape[2])
        columns = self._tile_ranges(clip.shape[3])
        tiles = [(row, column) for row in rows for column in columns]
        if before is None:
            before = ((),) * len(tiles)
        elif len(before) == 1 < len(tiles):
            before = tuple(_cut(before[0], clip, row, column) for row, column in tiles)
        if len(before) != len(tiles):
            raise ValueError(f"cache must be of {len(tiles)} tiles, got {len(before)}.")
        if len(tiles) == 1:
            decoded, features = self.decoder.run(clip, before[0])
            return decoded, (features,)
        made: list[Tensor] = []
        after: list[tuple[Tensor, ...]] = []
        for (row, column), features in zip(tiles, before, strict=True):
            moved = tuple(one.to(clip.device) for one in features)
            decoded, last = self.decoder.run(channels_last(clip[:, :, row, column]), moved)
            made.append(decoded)
            after.append(tuple(one.cpu() for one in last))
        return self._blend(made, len(columns)), tuple(after)

    def _tile_ranges(self, length: int) -> list[slice]:
        """Ranges of latent cells of the tiles along one side."""
        if self.tiling is None:
            return [slice(0, length)]
        space = self.scale.space
        size = self.tiling.size // space
        starts = range(0, length, self.tiling.stride // space)
        return [slice(start, min(start + size, length)) for start in starts]

    def _blend(self, tiles: list[Tensor], columns: int) -> Float[Tensor, "t p h w"]:
        """Fade every tile in over the one above and the one to its left, and join them."""
        assert self.tiling is not None
        stride = self.tiling.stride // self.config.patch
        overlap = self.tiling.size // self.config.patch - stride
        rows: list[Tensor] = []
        for index, tile in enumerate(tiles):
            if index >= columns:
                _fade_in(tile, tiles[index - columns], overlap, 2)
            if index % columns:
                _fade_in(tile, tiles[index - 1], overlap, 3)
            if index % columns == columns - 1:
                row = tiles[index + 1 - columns : index + 1]
                rows.append(torch.cat([one[:, :, :stride, :stride] for one in row], dim=3))
        return torch.cat(rows, dim=2)


class WanEncoder(nn.Module):
    """Pixels to the means and logarithms of the variances of latents, before `quant`."""

    def __init__(self, config: WanAutoencoderConfig) -> None:
        super().__init__()
        widths = [config.width * multiplier for multiplier in (1, *MULTIPLIERS)]
        self.conv_in = CausalConv(3 * config.patch**2, widths[0])
        self.blocks = nn.ModuleList(
            DownBlock(before, after, time, residual=config.residual)
            for before, after, time in zip(widths, widths[1:], (*DOWN_IN_TIME, None), strict=False)
        )
        self.middle = middle(widths[-1])
        self.norm_out = PixelNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.channels)
        self.slots = number_slots(self)

    def forward(self, x: Float[Tensor, "t p h w"], memory: Memory) -> Float[Tensor, "1 z y x"]:
        """Encode the first frame, or the next four, into one latent frame."""
        halved = DOWN_IN_TIME.index(True) + 1
        parts: list[Tensor] = []
        for part in split(channels_last(x), _AT_ONCE):
            features = self.conv_in(part, memory)
            for block in self.blocks[:halved]:
                features = block(features, memory)
            parts.append(features)
        features = torch.cat(parts)
        for layer in (*self.blocks[halved:], *self.middle):
            features = layer(features, memory)
        return self.conv_out(self.norm_out(features), memory)


class WanDecoder(nn.Module):
    """Latents after `post_quant` to pixels."""

    def __init__(self, config: WanAutoencoderConfig) -> None:
        super().__init__()
        widths = [
            config.decoder_width * multiplier
            for multiplier in (MULTIPLIERS[-1], *reversed(MULTIPLIERS))
        ]
        self.conv_in = CausalConv(config.channels, widths[0])
        self.middle = middle(widths[0])
        self.blocks = nn.ModuleList(
            UpBlock(before, after, time, residual=config.residual, first=index == 0)
            for index, (before, after, time) in enumerate(
                zip(widths, widths[1:], (*reversed(DOWN_IN_TIME), None), strict=False)
            )
        )
        self.norm_out = PixelNorm(widths[-1])
        self.conv_out = HeadConv(widths[-1], 3 * config.patch**2)
        self.slots = number_slots(self)

    def run(
        self, clip: Float[Tensor, "u c y x"], features: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "t p h w"], tuple[Tensor, ...]]:
        """Decode latent frames in fp32 after those of `features`, and return the next features.

        features: empty at the start of a video.
        """
        memory: Memory = [*features] if features else [None] * self.slots
        del features
        decoded = [part for frame in split(clip, 1) for part in self(frame, memory)]
        return torch.cat(decoded), tuple(one for one in memory if one is not None)

    def forward(
        self, x: Float[Tensor, "1 c y x"], memory: Memory
    ) -> list[Float[Tensor, "t p h w"]]:
        """Decode one latent frame into clips of one or two frames, in fp32."""
        x = self.conv_in(x, memory)
        for layer in self.middle:
            x = layer(x, memory)
        clips: Iterator[Tensor] = iter((x,))
        for block in self.blocks:
            clips = block(clips, memory)
        return [self.conv_out(self.norm_out(clip), memory).float() for clip in clips]


def patchify(video: Float[Tensor, "c t h w"], patch: int) -> Float[Tensor, "t p y x"]:
    """Make the pixels of a patch channels: column before row."""
    return rearrange(video, "c t (h q) (w r) -> t (c r q) h w", q=patch, r=patch)


def unpatchify(clip: Float[Tensor, "t p y x"], patch: int) -> Float[Tensor, "c t h w"]:
    """Make pixels of channels, the inverse of `patchify`."""
    return rearrange(clip, "t (c r q) h w -> c t (h q) (w r)", q=patch, r=patch)


def _cut(
    features: tuple[Tensor, ...], clip: Tensor, row: slice, column: slice
) -> tuple[Tensor, ...]:
    """Cut a tile's memory out of that of whole frames."""
    tiles: list[Tensor] = []
    for one in features:
        scale = one.shape[2] // clip.shape[2]
        rows = slice(scale * row.start, scale * row.stop)
        tiles.append(one[:, :, rows, scale * column.start : scale * column.stop])
    return tuple(channels_last(one) for one in tiles)


def _fade_in(
    tile: Float[Tensor, "t p h w"], other: Float[Tensor, "t p y x"], overlap: int, dim: int
) -> None:
    """Blend the first `overlap` rows (dim 2) or columns (3) linearly with the other's last."""
    length = min(overlap, tile.shape[dim], other.shape[dim])
    share = torch.arange(length, device=tile.device) / length
    begin = tile.narrow(dim, 0, length).movedim(dim, -1)
    end = other.narrow(dim, other.shape[dim] - length, length).movedim(dim, -1)
    begin.lerp_(end, 1 - share)
