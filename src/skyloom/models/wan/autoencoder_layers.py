"""Layers of the Wan autoencoders, for clips `[t c h w]` whose channels are last in memory.

A convolution over three frames has the two frames before the clip in a `Memory`. On a CPU in fp32,
two frames are convolved by Winograd's F(2, 3) in time (Lavin and Gray 2015, arXiv 1509.09308): four
convolutions in two dimensions instead of six, in bands of rows that stay in the processor's cache.
"""

from collections.abc import Iterator
from itertools import product

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

Memory = list[Tensor | None]  # by CausalConv.slot: the last frames before the clip; None: no frame
PAST = 2  # remembered frames
BLOCKS = 2  # residual blocks per resolution; the decoder has one more
_BAND_VALUES = 2**19  # values of one frame in a band of rows: 2 MiB
_NORM_VALUES = 2**18  # values normalised at once on a CPU: 1 MiB
_EPS = 1e-24  # the original bounds the norm by 1e-12


def channels_last(x: Tensor) -> Tensor:
    """Return a clip whose channels are last in memory, copied if needed."""
    return x.contiguous(memory_format=torch.channels_last)


def split(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split along the first dimension into parts of `count`; the last one may be shorter."""
    return tuple(x[start : start + count] for start in range(0, len(x), count))


class PixelNorm(nn.Module):
    """Divide every pixel's channels by their root mean square and scale them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels))

    def forward(
        self, x: Float[Tensor, "t c h w"], *, activate: bool = True, in_place: bool = False
    ) -> Float[Tensor, "t c h w"]:
        """Normalise; with `activate`, apply SiLU. A CPU works on parts that fit its cache."""
        out = x if in_place else torch.empty_like(x)
        channels = x.shape[1]
        count = max(1, _NORM_VALUES // channels) if x.device.type == "cpu" else x[:, 0].numel()
        pixels, written = (clip.permute(0, 2, 3, 1).view(-1, channels) for clip in (x, out))
        for source, target in zip(split(pixels, count), split(written, count), strict=True):
            value = F.rms_norm(source, (channels,), self.gamma, _EPS)
            target.copy_(F.silu(value, inplace=True) if activate else value)
        return out


class CausalConv(nn.Module):
    """Convolution over three frames, the last of which is the one that it yields.

    spatial: the kernel has three rows and columns; else one. slot: index into the memory.
    """

    def __init__(self, channels: int, out_channels: int, *, spatial: bool = True) -> None:
        super().__init__()
        self.spatial = spatial
        side = 3 if spatial else 1
        conv = nn.Conv3d(channels, out_channels, (PAST + 1, side, side))
        assert conv.bias is not None
        self.weight = nn.Parameter(conv.weight.data.to(memory_format=torch.channels_last_3d))
        self.bias = nn.Parameter(conv.bias.data)
        self.slot = 0

    def forward(self, x: Float[Tensor, "t c h w"], memory: Memory) -> Float[Tensor, "t o h w"]:
        """Convolve a clip and remember its end; the first clip of a video is one frame."""
        past = memory[self.slot]
        if past is None:
            memory[self.slot] = torch.cat([torch.zeros_like(x), x])
            return F.conv2d(x, self.weight[:, :, PAST], self.bias, padding="same")
        memory[self.slot] = x if len(x) == PAST else torch.cat([past[1:], x])
        in_fp32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
        if in_fp32_on_cpu and len(x) == PAST and self.spatial:
            return _convolve_two_frames(past, x, self.weight, self.bias)
        return self.convolve(torch.cat([past, x]))

    def convolve(self, x: Float[Tensor, "t c h w"], stride: int = 1) -> Float[Tensor, "u o h w"]:
        """Convolve a clip that begins with the frames before it."""
        side = int(self.spatial)
        out = F.conv3d(
            x.transpose(0, 1)[None],
            self.weight,
            self.bias,
            stride=(stride, 1, 1),
            padding=(0, side, side),
        )
        return channels_last(out[0].transpose(0, 1))


class HeadConv(CausalConv):
    """Causal convolution to few channels; it remembers products, not frames, which are larger."""

    def forward(self, x: Float[Tensor, "t c h w"], memory: Memory) -> Float[Tensor, "t o h w"]:
        """Convolve a clip and remember its products with the kernels of the next two frames."""
        kernels = torch.cat(self.weight.unbind(2))
        products = F.conv2d(x, channels_last(kernels), padding=1)
        past = memory[self.slot]
        if past is None:
            past = torch.zeros_like(products[:1]).repeat(PAST, 1, 1, 1)
        products = torch.cat([past, products])
        memory[self.slot] = products[-PAST:].clone()
        early, middle, late = products.chunk(PAST + 1, dim=1)
        return early[:-PAST] + middle[1:-1] + late[PAST:] + self.bias[:, None, None]


def number_slots(network: nn.Module) -> int:
    """Number the causal convolutions of a network, and return how many there are."""
    convolutions = [layer for layer in network.modules() if isinstance(layer, CausalConv)]
    for slot, layer in enumerate(convolutions):
        layer.slot = slot
    return len(convolutions)


class CausalResidualBlock(nn.Module):
    """Two causal convolutions, each after a norm and SiLU."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = PixelNorm(channels)
        self.conv1 = CausalConv(channels, out_channels)
        self.norm2 = PixelNorm(out_channels)
        self.conv2 = CausalConv(out_channels, out_channels)
        self.shortcut = (
            nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        )

    def forward(self, x: Float[Tensor, "t c h w"], memory: Memory) -> Float[Tensor, "t o h w"]:
        """Return the block's output."""
        y = self.conv1(self.norm1(x), memory)
        y = self.conv2(self.norm2(y, in_place=True), memory)
        return y.add_(self.shortcut(x))


class FrameAttention(nn.Module):
    """Attention with one head among the pixels of a frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = PixelNorm(channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Float[Tensor, "t c h w"], memory: Memory) -> Float[Tensor, "t c h w"]:
        """Return the block's output; the memory is not used."""
        pixels = rearrange(self.norm(x, activate=False), "t c h w -> t 1 (h w) c")
        query, key, value = self.to_qkv(pixels).chunk(3, dim=-1)
        mixed = self.proj(F.scaled_dot_product_attention(query, key, value))
        return x + rearrange(mixed, "t 1 (h w) c -> t c h w", h=x.shape[2])


class Downsample(nn.Module):
    """Halve height and width, then, with `time`, the frames after the first one."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(channels, channels, 3, stride=2)
        self.temporal = CausalConv(channels, channels, spatial=False) if time else None

    def forward(self, x: Float[Tensor, "t c h w"], memory: Memory) -> Float[Tensor, "u c y x"]:
        """Return the smaller clip."""
        small = self.spatial(F.pad(x, (0, 1, 0, 1)))
        if self.temporal is None:
            return small
        past = memory[self.temporal.slot]
        memory[self.temporal.slot] = small[-1:].clone()
        return small if past is None else self.temporal.convolve(torch.cat([past, small]), 2)


class Upsample(nn.Module):
    """With `time`, double the frames after the first one; then double height and width."""

    def __init__(self, channels: int, out_channels: int, *, time: bool) -> None:
        super().__init__()
        self.temporal = CausalConv(channels, 2 * channels, spatial=False) if time else None
        self.spatial = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "t c h w"], memory: Memory
    ) -> Iterator[Float[Tensor, "u o y x"]]:
        """Yield the larger clip in parts of at most two frames."""
        if self.temporal is None:
            yield enlarge_and_convolve(x, self.spatial)
        elif memory[self.temporal.slot] is None:  # the first frame is not doubled, nor read again
            memory[self.temporal.slot] = torch.zeros_like(x).repeat(PAST, 1, 1, 1)
            yield enlarge_and_convolve(x, self.spatial)
        else:
            for pair in split(self.temporal(x, memory), 1):
                yield enlarge_and_convolve(torch.cat(pair.chunk(2, dim=1)), self.spatial)


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
        self.resnets = nn.ModuleList(map(CausalResidualBlock, widths, widths[1:]))
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
        self.resnets = nn.ModuleList(map(CausalResidualBlock, widths, widths[1:]))
        self.resample = None if time is None else Upsample(out_channels, leaving, time=time)

    def forward(
        self, clips: Iterator[Float[Tensor, "t c h w"]], memory: Memory
    ) -> Iterator[Float[Tensor, "u o y x"]]:
        """Yield the block's output for every clip, in parts of at most two frames.

        A clip is taken when the ones before it are done, so that few are in memory at once.
        """
        for clip in clips:
            x = clip
            start = x if self.residual else None
            for resnet in self.resnets:
                x = resnet(x, memory)
            if self.resample is None:
                yield x
            elif start is None:
                yield from self.resample(x, memory)
            else:
                sources = split(start, 1 if self.time > 1 else len(start))
                for part, source in zip(self.resample(x, memory), sources, strict=True):
                    yield _add_repeated(part, source, self.time)


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
            CausalResidualBlock(channels, channels),
            FrameAttention(channels),
            CausalResidualBlock(channels, channels),
        ]
    )


def _convolve_two_frames(
    past: Float[Tensor, "2 c h w"],
    x: Float[Tensor, "2 c h w"],
    weight: Float[Tensor, "o c 3 3 3"],
    bias: Float[Tensor, " o"],
) -> Float[Tensor, "2 o h w"]:
    """Convolve two frames with the two before them: F(2, 3) in time."""
    early, middle, late = weight.unbind(2)
    even = (early + late) / 2
    odd = middle / 2
    kernels = (channels_last(early), even + odd, even - odd, channels_last(late))
    biases = (None, bias, None, None)
    _, channels, height, width = x.shape
    out = _empty(x, 2, len(weight), height, width)
    rows = max(1, _BAND_VALUES // (channels * width))
    for top in range(0, height, rows):
        end = min(top + rows, height)
        before, now = (split(clip[:, :, max(top - 1, 0) : end + 1], 1) for clip in (past, x))
        inputs = (before[0] - now[0], before[1] + now[0], now[0] - before[1], before[1] - now[1])
        edge = (0, 0, int(top == 0), int(end == height))
        first, total, difference, last = (
            F.conv2d(F.pad(value, edge) if any(edge) else value, kernel, added, padding=(0, 1))
            for value, kernel, added in zip(inputs, kernels, biases, strict=True)
        )
        torch.add(first.add_(total), difference, out=out[:1, :, top:end])
        torch.sub(total.sub_(difference), last, out=out[1:, :, top:end])
    return out


def enlarge_and_convolve(x: Float[Tensor, "t c h w"], conv: nn.Conv2d) -> Float[Tensor, "t o y x"]:
    """Double height and width by repeating pixels, and convolve, without the enlarged frames.

    A 3x3 kernel on repeated pixels is four 2x2 kernels on the pixels: one for each row and column
    parity of the result, made by adding the weights that meet the same pixel.
    """
    by_row = _add_shared(conv.weight.float(), 2)
    kernels = torch.cat([part for row in by_row for part in _add_shared(row, 3)])
    kernels = channels_last(kernels.to(conv.weight.dtype))
    assert conv.bias is not None
    bias = conv.bias.repeat(4)
    _, _, height, width = x.shape
    out = _empty(x, len(x), len(conv.weight), 2 * height, 2 * width)
    for frame, written in zip(split(channels_last(x), 1), split(out, 1), strict=True):
        parts = F.conv2d(frame, kernels, bias, padding=1).chunk(4, dim=1)
        for index, part in enumerate(parts):
            row, column = divmod(index, 2)
            cut = part[:, :, row : row + height, column : column + width]
            written[:, :, row::2, column::2] = cut
    return out


def _add_shared(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Kernels of size 2 for even and for odd outputs of a kernel of size 3 on repeated pixels."""
    first, middle, last = torch.chunk(kernel, 3, dim)
    return torch.cat([first, middle + last], dim), torch.cat([first + middle, last], dim)


def _empty(like: Tensor, frames: int, channels: int, height: int, width: int) -> Tensor:
    return torch.empty(
        (frames, channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )
