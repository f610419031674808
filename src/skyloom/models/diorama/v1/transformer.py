"""Spacetime transformer of the Wan family (Wan team 2025, arXiv 2503.20314).

Tokens are patches of the latent in the order time, height, width. Each latent frame has its own
noise level, so modulation is per latent frame. The same weights attend bidirectionally or causally
in windows of `config.window` latent frames; only the attention mask differs.
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
from skyloom.models.base import AttentionMode, Prediction, TextCondition
from skyloom.models.diorama.v1.refiner import Detail
from skyloom.models.embeddings import (
    PlaceEmbedding,
    Sketch,
    SpanEmbedding,
    TextProjection,
    TimeEmbedding,
    place_waves,
)
from skyloom.models.rope import Angles, rope_angles, rotate


@dataclass(frozen=True)
class DitConfig:
    """Sizes, and options that Wan's models do not have.

    pooled_text: add the pooled prompt to the time embedding.
    span: embed the step size, for a few-step student in the same weights.
    places: add an absolute position embedding to every token.
    sketch: width of the prompt attributes (the last pooled channels) from which the mean latent is
        predicted; 0 turns it off.
    horizon: latent frames that the mean latent covers; later positions are numbered after it.
    detail, detail_blocks: width and number of blocks of the latent refiner; width 0 turns it off.
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
        """Number of channels of one head."""
        return self.width // self.heads


class Dit(nn.Module):
    """Predict velocity, clean estimate or angular target, as `config.prediction` names."""

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
    def prediction(self) -> Prediction:
        """What the output is."""
        return self.config.prediction

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.head.weight.dtype

    @property
    def uncached_frame_offset(self) -> int:
        """Index of the first latent frame of a window inside a video without a cache."""
        return self.config.horizon

    @property
    def layers(self) -> list["Block"]:
        """The blocks, typed."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def prepare_text(
        self,
        context: Float[Tensor, "b m k"],
        context_mask: Bool[Tensor, "b m"] | None = None,
        pooled: Float[Tensor, "b p"] | None = None,
    ) -> TextCondition:
        """Project a prompt once for all layers and steps; masked tokens are not attended to."""
        projected = self.text(context)
        pairs = [block.cross.keys_and_values(projected) for block in self.layers]
        bias = (
            None if context_mask is None else rearrange(mask_bias(context_mask), "b m -> b 1 1 m")
        )
        vector = None if self.pooled is None or pooled is None else self.pooled(pooled)
        attributes = None
        if self.sketch is not None and pooled is not None:
            attributes = pooled[:, -self.config.sketch :]
        return TextCondition(
            tuple(key for key, _ in pairs),
            tuple(value for _, value in pairs),
            bias,
            vector,
            attributes,
        )

    def draw_sketch(
        self, attributes: Float[Tensor, "b s"], frames: int, height: int, width: int
    ) -> Float[Tensor, "b o t h w"]:
        """Predict the mean clean latent of a prompt's videos."""
        assert self.sketch is not None
        rows = height // self.config.patch[1]
        columns = width // self.config.patch[2]
        positions = place_waves(torch.arange(frames, device=attributes.device), rows, columns)
        drawn = self.sketch(attributes, positions)
        return _unpatchify(drawn, self.config, (frames, rows, columns))

    def forward(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        *,
        attention_mode: AttentionMode = "bidirectional",
        cache: KvCache | None = None,
        span: Float[Tensor, "b t"] | None = None,
        frame_indices: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b o t h w"]:
        """Predict every latent frame; with a cache, `latent` is the window after the cached frames.

        span: None predicts the velocity at `sigma`; else the student's mean velocity from `sigma`
        to `sigma - span`, guidance included. frame_indices: indices of the latent frames in their
        video; by default they follow the cached ones.
        """
        return self._run(
            latent,
            sigma,
            text,
            attention_mode=attention_mode,
            cache=cache,
            span=span,
            frame_indices=frame_indices,
        )[0]

    def extend_cache(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        cache: KvCache,
        span: Float[Tensor, "b t"] | None = None,
        frame_indices: Int[Tensor, " t"] | None = None,
    ) -> KvCache:
        """Append a finished window to the cache, stored at the noise level `sigma`."""
        return self._run(
            latent,
            sigma,
            text,
            attention_mode="causal",
            cache=cache,
            span=span,
            frame_indices=frame_indices,
        )[1]

    def _run(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        *,
        attention_mode: AttentionMode,
        cache: KvCache | None,
        span: Float[Tensor, "b t"] | None,
        frame_indices: Int[Tensor, " t"] | None,
    ) -> tuple[Float[Tensor, "b o t h w"], KvCache]:
        """Forward pass; rotary time positions start at the first cached frame."""
        config = self.config
        _, _, frames, height, width = latent.shape
        rows = height // config.patch[1]
        columns = width // config.patch[2]
        tokens = rows * columns
        x = self.patch(_patchify(latent.to(self.patch.weight.dtype), config.patch)).to(
            self.patch.weight.dtype
        )
        past = cache or KvCache(sink=0, recent=0)
        x = self._placed(x, text, past, (frames, rows, columns), frame_indices)
        embedded = self.time(sigma)
        if text.pooled is not None:
            embedded = embedded + text.pooled[:, None]
        if span is not None:
            assert self.span is not None, "only a model with a student accepts a span"
            embedded = embedded + self.span(span)
        modulation = self.time.modulation(embedded)
        angles = _window_angles(
            past.frames + frames, rows, columns, config, device=x.device, dtype=x.dtype
        )
        bias = None
        if attention_mode == "causal" and cache is None:
            bias = mask_bias(block_causal_mask(frames, config.window, tokens, latent.device))
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for index, block in enumerate(self.layers):
            before = (past.keys[index], past.values[index]) if past.frames else None
            x, key, value = block(
                x, modulation, text, index, angles=angles, bias=bias, before=before
            )
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
        frame_indices: Tensor | None,
    ) -> Tensor:
        """Add position embeddings to the tokens and, up to the horizon, the mean latent."""
        frames, rows, columns = grid
        horizon = self.config.horizon
        local = torch.arange(frames, device=x.device) + past.frames
        early = torch.ones_like(local, dtype=torch.bool)
        if horizon:
            if frame_indices is None:
                frame_indices = torch.arange(frames, device=x.device) + past.seen
            early = frame_indices < horizon
            local = torch.where(early, frame_indices, local + horizon)
        where = place_waves(local, rows, columns).to(x.dtype)
        if self.places is not None:
            x = x + self.places(where)
        if self.sketch is not None and text.attributes is not None and bool(early.any()):
            drawn = self.sketch.into(self.sketch(text.attributes.to(x.dtype), where))
            x = x + drawn * early.to(x.dtype).repeat_interleave(rows * columns)[:, None]
        return x


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated per latent frame."""

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
        angles: tuple[Float[Tensor, "seen f"], Float[Tensor, "seen f"]],
        bias: Float[Tensor, "n seen"] | None,
        before: tuple[Tensor, Tensor] | None,
    ) -> tuple[Float[Tensor, "b n d"], Tensor, Tensor]:
        """Return the new tokens, and the window's keys (before rotation) and values."""
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (
            (modulation + self.table).to(x.dtype).unbind(2)
        )
        y = _modulate(_normalise(x, self.eps), shift, scale)
        query, key, value = self.qkv(y).chunk(3, dim=-1)
        query = split_heads(self.query_norm(query).to(value.dtype), self.heads)
        key = split_heads(self.key_norm(key).to(value.dtype), self.heads)
        value = split_heads(value, self.heads)
        all_keys = key
        all_values = value
        if before is not None:
            all_keys = torch.cat([before[0], key], 2)
            all_values = torch.cat([before[1], value], 2)
        own = (angles[0][-x.shape[1] :], angles[1][-x.shape[1] :])
        mixed = attend(rotate(query, own), rotate(all_keys, angles), all_values, bias)
        x = x + _gated(self.out(join_heads(mixed)), gate)
        x = x + self.cross(self.cross_norm(x), text.keys[index], text.values[index], text.bias)
        y = _modulate(_normalise(x, self.eps), shift_ffn, scale_ffn)
        y = self.down(F.gelu(self.up(y), approximate="tanh"))
        return x + _gated(y, gate_ffn), key, value


class CrossAttention(nn.Module):
    """Attention from video tokens to the prompt."""

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
        """Return the prompt's keys and values by head."""
        key, value = self.key_value(context).chunk(2, dim=-1)
        key = split_heads(self.key_norm(key).to(value.dtype), self.heads)
        return key, split_heads(value, self.heads)

    def forward(
        self, x: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> Float[Tensor, "b n d"]:
        """Attend from every video token to the prompt."""
        query = split_heads(self.query_norm(self.query(x)).to(value.dtype), self.heads)
        return self.out(join_heads(attend(query, key, value, bias)))


class RmsNorm(nn.Module):
    """RMS norm over all heads together (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Normalise in the precision of the weights."""
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
    """Rotary angles of the cached frames and a window; cached because few shapes occur."""
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
    t, h, w = grid
    p, q, r = config.patch
    return rearrange(
        x, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", t=t, h=h, w=w, p=p, q=q, r=r
    )


@torch.no_grad()
def _initialise(dit: Dit) -> None:
    """Xavier matrices, scaled-down residual branches, zero head."""
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
