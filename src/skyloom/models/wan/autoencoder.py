"""Autoencoders of Wan 2.1 and 2.2 (Wan team 2025, arXiv 2503.20314), causal in time.

The first frame is encoded alone, then four frames at a time; latent frames are decoded one by one.
Every convolution remembers the last two frames of its input, so that windows equal the whole video
and the memory does not grow with its length. Features are computed for at most two frames at once.
The decoder may work in tiles, each with its own memory (`Tiling`).
"""

from dataclasses import dataclass
from itertools import product

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from skyloom.core.types import ScaleFactors
from skyloom.models.wan.autoencoder_layers import (
    AttentionBlock,
    CausalConv,
    Downsample,
    Memory,
    ResidualBlock,
    RmsNorm,
    Upsample,
    channels_last,
    number_slots,
)

TIME = 4
BLOCKS = 2  # residual blocks per resolution; the decoder has one more
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
        self.encoder = Encoder(config)
        self.quant = nn.Conv2d(2 * config.channels, 2 * config.channels, 1)
        self.post_quant = nn.Conv2d(config.channels, config.channels, 1)
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
        return torch.stack(videos), WanDecoderCache(tuple(features))

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
        return self._blend(made, len(columns), clip), tuple(after)

    def _tile_ranges(self, length: int) -> list[slice]:
        """Ranges of latent cells of the tiles along one side."""
        if self.tiling is None:
            return [slice(0, length)]
        space = self.scale.space
        size = self.tiling.size // space
        starts = range(0, length, self.tiling.stride // space)
        return [slice(start, min(start + size, length)) for start in starts]

    def _blend(
        self, tiles: list[Float[Tensor, "t p h w"]], columns: int, clip: Float[Tensor, "u c y x"]
    ) -> Float[Tensor, "t p h w"]:
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


class Encoder(nn.Module):
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
        self.norm_out = RmsNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 2 * config.channels)
        self.slots = number_slots(self)

    def forward(self, x: Float[Tensor, "t p h w"], memory: Memory) -> Float[Tensor, "1 z y x"]:
        """Encode the first frame, or the next four, into one latent frame."""
        halved = DOWN_IN_TIME.index(True) + 1
        parts: list[Tensor] = []
        for part in channels_last(x).split(_AT_ONCE):
            features = self.conv_in(part, memory)
            for block in self.blocks[:halved]:
                features = block(features, memory)
            parts.append(features)
        features = torch.cat(parts)
        for layer in (*self.blocks[halved:], *self.middle):
            features = layer(features, memory)
        return self.conv_out(self.norm_out(features), memory)


class Decoder(nn.Module):
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
        self.norm_out = RmsNorm(widths[-1])
        self.conv_out = CausalConv(widths[-1], 3 * config.patch**2)
        self.slots = number_slots(self)

    def run(
        self, clip: Float[Tensor, "u c y x"], features: tuple[Tensor, ...]
    ) -> tuple[Float[Tensor, "t p h w"], tuple[Tensor, ...]]:
        """Decode latent frames in fp32 after those of `features`, and return the next features.

        features: empty at the start of a video.
        """
        memory: Memory = [*features] if features else [None] * self.slots
        del features
        decoded = [self(frame, memory).float() for frame in clip.split(1)]
        return torch.cat(decoded), tuple(one for one in memory if one is not None)

    def forward(self, x: Float[Tensor, "1 c y x"], memory: Memory) -> Float[Tensor, "t p h w"]:
        """Decode one latent frame."""
        x = self.conv_in(x, memory)
        for layer in self.middle:
            x = layer(x, memory)
        return self._upsample(x, memory, 0)

    def _upsample(self, x: Tensor, memory: Memory, index: int) -> Tensor:
        """Apply the blocks from `index` on; what they make of two frames goes to the end first."""
        while index < len(self.blocks) and len(x) <= _AT_ONCE:
            x = self.blocks[index](x, memory)
            index += 1
        if len(x) > _AT_ONCE:
            return torch.cat([self._upsample(part, memory, index) for part in x.split(_AT_ONCE)])
        return self.conv_out(self.norm_out(x), memory)


class DownBlock(nn.Module):
    """Residual blocks, then lower resolution.

    time: whether the number of frames is halved; None: the resolution stays.
    residual: the input, averaged, is added to the output.
    """

    def __init__(
        self, channels: int, out_channels: int, time: bool | None, *, residual: bool
    ) -> None:
        super().__init__()
        self.time = 2 if time else 1
        self.space = 1 if time is None else 2
        self.residual = residual
        widths = (channels, *[out_channels] * BLOCKS)
        self.resnets = nn.ModuleList(map(ResidualBlock, widths, widths[1:]))
        self.resample = None if time is None else Downsample(out_channels, time=time)

    def forward(self, x: Float[Tensor, "t c h w"], memory: Memory) -> Float[Tensor, "u o y x"]:
        """Return the block's output."""
        start = x if self.residual else None
        for resnet in self.resnets:
            x = resnet(x, memory)
        if self.resample is not None:
            x = self.resample(x, memory)
        return x if start is None else x.add_(self._average(start, x.shape[1]))

    def _average(self, x: Float[Tensor, "t c h w"], channels: int) -> Float[Tensor, "u o y x"]:
        """Make neighbouring frames and pixels channels and average groups of them."""
        if len(x) < self.time:
            x = torch.cat([torch.zeros_like(x), x])
        cells = rearrange(
            x,
            "(t i) c (h j) (w k) -> t (c i j k) h w",
            i=self.time,
            j=self.space,
            k=self.space,
        )
        return rearrange(cells, "t (o group) h w -> t o group h w", o=channels).mean(2)


class UpBlock(nn.Module):
    """Residual blocks, then higher resolution.

    time: whether the number of frames is doubled; None: the resolution stays.
    residual: the input, repeated, is added to the output. first: of the decoder; without
    `residual`, the block before the others has halved its channels.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        time: bool | None,
        *,
        residual: bool,
        first: bool,
    ) -> None:
        super().__init__()
        entering = channels if residual or first else channels // 2
        leaving = out_channels if residual else out_channels // 2
        widths = (entering, *[out_channels] * (BLOCKS + 1))
        self.residual = residual and time is not None
        self.time = 2 if time else 1
        self.resnets = nn.ModuleList(map(ResidualBlock, widths, widths[1:]))
        self.resample = None if time is None else Upsample(out_channels, leaving, time=time)

    def forward(self, x: Float[Tensor, "t c h w"], memory: Memory) -> Float[Tensor, "u o y x"]:
        """Return the block's output."""
        start = x if self.residual else None
        for resnet in self.resnets:
            x = resnet(x, memory)
        if self.resample is not None:
            x = self.resample(x, memory)
        return x if start is None else _add_repeated(x, start, self.time)


def _add_repeated(
    x: Float[Tensor, "t o h w"], start: Float[Tensor, "u c y x"], time: int
) -> Float[Tensor, "t o h w"]:
    """Add the clip before the upsampling; its channels, repeated, fill the cells of the larger one.

    The first frame of a video is not doubled and gets what the second of two would.
    """
    step = start.shape[1] // x.shape[1]  # channels per output channel
    cells = 4 * time // step  # cells of the larger clip that get the same channel
    frames = len(x) // len(start)
    for index, (frame, row, column) in enumerate(product(range(time), range(2), range(2))):
        late = frame - time + frames
        if late >= 0:
            target = x[late::frames, :, row::2, column::2]
            target += start[:, index // cells :: step]
    return x


def middle(channels: int) -> nn.ModuleList:
    """Make the layers at the lowest resolution."""
    return nn.ModuleList(
        [
            ResidualBlock(channels, channels),
            AttentionBlock(channels),
            ResidualBlock(channels, channels),
        ]
    )


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
    share = share[:, None] if dim == 2 else share
    begin = tile.narrow(dim, 0, length)
    begin.lerp_(other.narrow(dim, other.shape[dim] - length, length), 1 - share)
