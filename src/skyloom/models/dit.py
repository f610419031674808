"""The spacetime transformer of the Wan family (Wan team 2025, arXiv 2503.20314), one block for every size.

Tokens are patches of the latent in the order time, height, width. Each latent frame has its own noise level, so
modulation is per latent frame, never per token. The same weights read a canvas in two ways, told apart by the
attention mask alone: bidirectional, and causal in windows of `config.window` latent frames.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from skyloom.models.attention import (
    KvCache,
    attend,
    block_causal_mask,
    join_heads,
    mask_bias,
    split_heads,
)
from skyloom.models.embeddings import (
    PlaceEmbedding,
    Sketch,
    SpanEmbedding,
    TextProjection,
    TimeEmbedding,
    place_waves,
)
from skyloom.models.refiner import Detail
from skyloom.models.rope import Angles, rope_angles, rotate

Reading = Literal["bidirectional", "causal"]


@dataclass(frozen=True)
class DitConfig:
    """Sizes, and what Wan's own models do not have: `pooled_text` adds the pooled prompt to the time embedding;
    `span` makes room for a few-step student in the same weights; `places` tells every token where in the frame and
    in the window it stands, which rotary positions only tell of pairs; `sketch` is the width of the prompt's meaning
    (models/prompt_attributes.py), the last of its pooled channels, from which a first sketch of the video is drawn (0: none).
    `detail` is the width of the convolutions that go over the result (models/refiner.py; 0: none), in `detail_blocks`.
    The sketch ends after `horizon` latent frames of a video; from there on places are numbered after it (0: never).
    """

    in_channels: int
    out_channels: int
    width: int
    heads: int
    layers: int
    ffn: int
    text_width: int
    patch: tuple[int, int, int] = (1, 2, 2)
    frequency_width: int = 256
    pooled_text: bool = False
    pooled_width: int | None = None
    span: bool = False
    places: bool = False
    sketch: int = 0
    horizon: int = 0
    detail: int = 0
    detail_blocks: int = 2
    prediction: Literal["velocity", "denoised", "angular"] = "velocity"
    window: int = 3
    rope_theta: float = 10000.0
    eps: float = 1e-6

    @property
    def head_width(self) -> int:
        """Channels of one head."""
        return self.width // self.heads


@dataclass(frozen=True)
class TextCondition:
    """A prompt, ready for every layer: keys and values `[b heads m c]`, mask bias, pooled vector, meaning."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Float[Tensor, "b 1 1 m"] | None
    pooled: Float[Tensor, "b d"] | None
    meaning: Float[Tensor, "b s"] | None = None


class Dit(nn.Module):
    """Latent, noise levels and text in; velocity, clean estimate or angular prediction out (`config.prediction`)."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        patch = math.prod(config.patch)
        self.patch = nn.Linear(config.in_channels * patch, config.width)
        self.time = TimeEmbedding(config.frequency_width, config.width)
        self.text = TextProjection(config.text_width, config.width)
        self.pooled = (
            nn.Linear(config.pooled_width or config.text_width, config.width)
            if config.pooled_text
            else None
        )
        self.span = SpanEmbedding(config.frequency_width, config.width) if config.span else None
        self.places = PlaceEmbedding(config.width) if config.places else None
        self.sketch = (
            Sketch(config.sketch, config.width, config.out_channels * patch)
            if config.sketch
            else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.table = nn.Parameter(torch.randn(2, config.width) / config.width**0.5)
        self.head = nn.Linear(config.width, config.out_channels * patch)
        _initialise(self)
        self.detail = _detail(config) if config.detail else None

    @property
    def layers(self) -> list["Block"]:
        """The blocks, by their own type."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def prepare_text(
        self,
        context: Float[Tensor, "b m k"],
        context_mask: Bool[Tensor, "b m"] | None = None,
        pooled: Float[Tensor, "b p"] | None = None,
    ) -> TextCondition:
        """Project a prompt once for all layers and steps; masked tokens are never looked at."""
        projected = self.text(context)
        pairs = [block.cross.keys_and_values(projected) for block in self.layers]
        bias = (
            None if context_mask is None else rearrange(mask_bias(context_mask), "b m -> b 1 1 m")
        )
        vector = None if self.pooled is None or pooled is None else self.pooled(pooled)
        meaning = (
            None if self.sketch is None or pooled is None else pooled[:, -self.config.sketch :]
        )
        return TextCondition(
            tuple(key for key, _ in pairs),
            tuple(value for _, value in pairs),
            bias,
            vector,
            meaning,
        )

    def draw_sketch(
        self, meaning: Float[Tensor, "b s"], frames: int, height: int, width: int
    ) -> Float[Tensor, "b o t h w"]:
        """The video that a prompt's meaning lets expect, as a clean latent: a blur, but in the right places."""
        assert self.sketch is not None
        rows, columns = height // self.config.patch[1], width // self.config.patch[2]
        drawn = self.sketch(
            meaning, place_waves(torch.arange(frames, device=meaning.device), rows, columns)
        )
        return _unpatchify(drawn, self.config, (frames, rows, columns))

    def forward(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        *,
        reading: Reading = "bidirectional",
        cache: KvCache | None = None,
        span: Float[Tensor, "b t"] | None = None,
        numbers: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b o t h w"]:
        """Predict for every latent frame; with a cache, the latent is one window and sees the cached frames too.

        Without a `span` the velocity at `sigma` is predicted. With one, the student answers: the mean velocity
        from `sigma` down to `sigma - span`, with guidance folded in. `numbers` are the latent frames' numbers in
        their video, if they do not simply follow the cached ones.
        """
        return self._run(latent, sigma, text, reading, cache, span, numbers)[0]

    def extend_cache(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        cache: KvCache,
        span: Float[Tensor, "b t"] | None = None,
        numbers: Int[Tensor, " t"] | None = None,
    ) -> KvCache:
        """The cache after a finished window; `sigma` is the (small) noise that it is remembered with."""
        return self._run(latent, sigma, text, "causal", cache, span, numbers)[1]

    def _run(
        self,
        latent: Tensor,
        sigma: Tensor,
        text: TextCondition,
        reading: Reading,
        cache: KvCache | None,
        span: Tensor | None,
        numbers: Tensor | None,
    ) -> tuple[Tensor, KvCache]:
        """Rotary time positions are local: cached frames first, the window after them."""
        config, (_, _, frames, height, width) = self.config, latent.shape
        rows, columns = height // config.patch[1], width // config.patch[2]
        tokens = rows * columns
        x = self.patch(_patchify(latent.to(self.patch.weight.dtype), config.patch)).to(
            self.patch.weight.dtype
        )
        past = cache or KvCache(sink=0, recent=0)
        x = self._placed(x, text, past, (frames, rows, columns), numbers)
        embedded = self.time(sigma)
        if text.pooled is not None:
            embedded = embedded + text.pooled[:, None]
        if span is not None:
            assert self.span is not None, "only a model with a student takes a span"
            embedded = embedded + self.span(span)
        modulation = self.time.modulation(embedded)
        angles = _window_angles(past.frames + frames, rows, columns, config, x.device, x.dtype)
        bias = None
        if reading == "causal" and cache is None:
            bias = mask_bias(block_causal_mask(frames, config.window, tokens, latent.device))
        keys, values = [], []
        for index, block in enumerate(self.layers):
            before = (past.keys[index], past.values[index]) if past.frames else None
            x, key, value = block(x, modulation, text, index, angles, bias, before)
            keys.append(key)
            values.append(value)
        shift, scale = (self.table + embedded[:, :, None]).unbind(2)
        features = _modulate(_normalise(x, config.eps), shift, scale)
        out = _unpatchify(self.head(features), config, (frames, rows, columns))
        if self.detail is not None:
            out = self.detail(out, latent, features, embedded)
        after = past.extended(tuple(keys), tuple(values), frames) if cache is not None else past
        return out, after

    def _placed(
        self,
        x: Tensor,
        text: TextCondition,
        past: KvCache,
        grid: tuple[int, int, int],
        numbers: Tensor | None,
    ) -> Tensor:
        """The tokens with where they stand and, up to the horizon, what the sketch shows there."""
        frames, rows, columns = grid
        horizon, local = self.config.horizon, torch.arange(frames, device=x.device) + past.frames
        early = torch.ones_like(local, dtype=torch.bool)
        if horizon:
            numbers = (
                torch.arange(frames, device=x.device) + past.seen if numbers is None else numbers
            )
            early = numbers < horizon
            local = torch.where(early, numbers, local + horizon)
        where = place_waves(local, rows, columns).to(x.dtype)
        if self.places is not None:
            x = x + self.places(where)
        if self.sketch is not None and text.meaning is not None and bool(early.any()):
            drawn = self.sketch.into(self.sketch(text.meaning.to(x.dtype), where))
            x = x + drawn * early.to(x.dtype).repeat_interleave(rows * columns)[:, None]
        return x


class Block(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; modulated by each latent frame's noise level."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width = config.width
        self.eps = config.eps
        self.heads = config.heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = RmsNorm(width, config.eps)
        self.key_norm = RmsNorm(width, config.eps)
        self.out = nn.Linear(width, width)
        self.cross_norm = nn.LayerNorm(width, eps=config.eps)
        self.cross = CrossAttention(config)
        self.up = nn.Linear(width, config.ffn)
        self.down = nn.Linear(config.ffn, width)
        self.table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        modulation: Float[Tensor, "b t 6 d"],
        text: TextCondition,
        index: int,
        angles: Angles,
        bias: Float[Tensor, "n n"] | None,
        before: tuple[Tensor, Tensor] | None,
    ) -> tuple[Float[Tensor, "b n d"], Tensor, Tensor]:
        """The new tokens, and this window's un-rotated keys and values for the cache."""
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (
            (modulation + self.table).to(x.dtype).unbind(2)
        )
        y = _modulate(_normalise(x, self.eps), shift, scale)
        query, key, value = self.qkv(y).chunk(3, dim=-1)
        query = split_heads(self.query_norm(query).to(value.dtype), self.heads)
        key = split_heads(self.key_norm(key).to(value.dtype), self.heads)
        value = split_heads(value, self.heads)
        all_keys, all_values = key, value
        if before is not None:
            all_keys, all_values = torch.cat([before[0], key], 2), torch.cat([before[1], value], 2)
        own = (angles[0][-x.shape[1] :], angles[1][-x.shape[1] :])
        mixed = attend(rotate(query, own), rotate(all_keys, angles), all_values, bias)
        x = x + _gated(self.out(join_heads(mixed)), gate)
        x = x + self.cross(self.cross_norm(x), text.keys[index], text.values[index], text.bias)
        y = _modulate(_normalise(x, self.eps), shift_ffn, scale_ffn)
        y = self.down(F.gelu(self.up(y), approximate="tanh"))
        return x + _gated(y, gate_ffn), key, value


class CrossAttention(nn.Module):
    """Video tokens look at the prompt."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm = RmsNorm(width, config.eps)
        self.key_norm = RmsNorm(width, config.eps)
        self.out = nn.Linear(width, width)

    def keys_and_values(self, context: Float[Tensor, "b m d"]) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values, by head."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        return split_heads(self.key_norm(key).to(value.dtype), self.heads), split_heads(
            value, self.heads
        )

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> Float[Tensor, "b n d"]:
        """What the prompt says to each video token."""
        query = split_heads(self.query_norm(self.query(x)).to(value.dtype), self.heads)
        return self.out(join_heads(attend(query, key, value, bias)))


class RmsNorm(nn.Module):
    """Root-mean-square norm over all heads together (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Normalise in the weights' own precision."""
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps)


def _detail(config: DitConfig) -> Detail:
    return Detail(
        config.out_channels, config.width, config.detail, config.patch, config.detail_blocks
    )


@lru_cache(maxsize=32)
def _window_angles(
    frames: int,
    rows: int,
    columns: int,
    config: DitConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> Angles:
    """Rotary angles of a window and what it remembers: a handful of shapes, asked for again and again."""
    positions = torch.arange(frames, device=device, dtype=torch.float32)
    cosine, sine = rope_angles(positions, rows, columns, config.head_width, config.rope_theta)
    return cosine.to(dtype), sine.to(dtype)


def _normalise(x: Float[Tensor, "b n d"], eps: float) -> Float[Tensor, "b n d"]:
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _modulate(
    x: Tensor, shift: Float[Tensor, "b t d"], scale: Float[Tensor, "b t d"]
) -> Float[Tensor, "b n d"]:
    y = rearrange(x, "b (t p) d -> b t p d", t=shift.shape[1])
    return rearrange(
        y * (1 + scale[:, :, None].to(x.dtype)) + shift[:, :, None].to(x.dtype),
        "b t p d -> b (t p) d",
    )


def _gated(x: Tensor, gate: Float[Tensor, "b t d"]) -> Float[Tensor, "b n d"]:
    y = rearrange(x, "b (t p) d -> b t p d", t=gate.shape[1])
    return rearrange(y * gate[:, :, None], "b t p d -> b (t p) d")


def _patchify(
    latent: Float[Tensor, "b c t h w"], patch: tuple[int, int, int]
) -> Float[Tensor, "b n k"]:
    p, q, r = patch
    return rearrange(latent, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=p, q=q, r=r)


def _unpatchify(
    x: Float[Tensor, "b n k"], config: DitConfig, grid: tuple[int, int, int]
) -> Float[Tensor, "b o t h w"]:
    (t, h, w), (p, q, r) = grid, config.patch
    return rearrange(
        x, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", t=t, h=h, w=w, p=p, q=q, r=r
    )


@torch.no_grad()
def _initialise(dit: Dit) -> None:
    """Xavier matrices; quiet residual branches; a silent head, so that training starts from the mean."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for linear in (
        dit.time.inner,
        dit.time.outer,
        dit.text.inner,
        dit.text.outer,
        dit.time.to_modulation,
    ):
        nn.init.normal_(linear.weight, std=0.02)
    for block in dit.layers:
        for linear in (block.out, block.cross.out, block.down):
            linear.weight.mul_((2 * len(dit.layers)) ** -0.5)
    if dit.pooled is not None:
        nn.init.zeros_(dit.pooled.weight)
    if dit.span is not None:
        nn.init.zeros_(dit.span.outer.weight)
    if dit.places is not None:
        nn.init.zeros_(dit.places.outer.weight)
    if dit.sketch is not None:
        nn.init.zeros_(dit.sketch.into.weight)
    nn.init.zeros_(dit.head.weight)
