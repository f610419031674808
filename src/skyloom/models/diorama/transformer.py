"""Denoising U-Net of the diorama family: convolutions and coarse spacetime attention.

Two levels. The fine level keeps the latent's resolution; the coarse level halves height and width
and holds the attention blocks, whose keys are the tokens of all visible latent frames and the
prompt's tokens. `FrameMix` layers also pass information between latent frames. Noise level, pooled
prompt, step size (few-step student) and frame index modulate every residual block, separately for
each latent frame.

There is no norm at the fine level and none before the head: per-pixel norms discard the magnitudes
that a prediction at low noise needs. For the same reason a learned gain per channel adds the noisy
input to the output.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from skyloom.models.attention import (
    KvCache,
    block_causal_mask,
    mask_bias,
)
from skyloom.models.base import (
    AttentionMode,
    DenoisingNetwork,
    TextCondition,
    TextContext,
    as_condition,
)
from skyloom.models.diorama.config import UNetConfig
from skyloom.models.diorama.layers import (
    AttentionBlock,
    FrameLinks,
    FrameMix,
    ResidualBlock,
    channels_last,
    zero,
)
from skyloom.models.embeddings import sinusoids
from skyloom.models.rope import window_angles


@dataclass(frozen=True)
class UNetCache(KvCache):
    """KvCache plus the input `[b c h w]` of every FrameMix at the last latent frame."""

    last: tuple[Tensor, ...] = ()


class UNet(DenoisingNetwork):
    """Predict the denoising direction of every latent frame."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        fine, coarse = config.widths
        fine_in, fine_out, coarse_in, coarse_out = config.blocks
        width = config.embedding
        self.noise = nn.Sequential(
            nn.Linear(config.frequencies, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.pooled = nn.Linear(config.pooled_width, width)
        self.span = nn.Linear(config.frequencies, width)
        self.number = nn.Linear(config.frequencies, width)
        self.joint = nn.Linear(width, width)
        self.text = nn.Linear(config.text_width, coarse)
        side = config.grid // 2
        self.position = nn.Parameter(nn.init.normal_(torch.empty(coarse, side, side), std=0.3))
        self.stem = nn.Conv2d(config.channels, fine, 3, padding=1)
        self.fine_in = nn.ModuleList(
            ResidualBlock(fine, width, normalise=False) for _ in range(fine_in)
        )
        self.to_coarse = nn.Conv2d(4 * fine, coarse, 1)
        self.coarse_in = nn.ModuleList(
            ResidualBlock(coarse, width, normalise=True) for _ in range(coarse_in)
        )
        self.attentions = nn.ModuleList(AttentionBlock(config) for _ in range(config.attentions))
        self.coarse_out = nn.ModuleList(
            ResidualBlock(coarse, width, normalise=True) for _ in range(coarse_out)
        )
        self.to_fine = nn.Conv2d(coarse, 4 * fine, 1)
        self.skip = nn.Conv2d(fine, fine, 1)
        self.fine_out = nn.ModuleList(
            ResidualBlock(fine, width, normalise=False) for _ in range(fine_out)
        )
        self.mixes = nn.ModuleList(FrameMix(channels) for channels in (fine, coarse, coarse, fine))
        self.head = nn.Conv2d(fine, config.channels, 3, padding=1)
        self.gain = nn.Linear(width, config.channels)
        nn.init.kaiming_normal_(self.stem.weight, nonlinearity="linear")
        for layer in (self.head, self.gain, self.span, self.number):
            zero(layer)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def prepare_text(
        self,
        context: Float[Tensor, "b m k"],
        context_mask: Bool[Tensor, "b m"] | None = None,
        pooled: Float[Tensor, "b p"] | None = None,
    ) -> TextCondition:
        """Project a prompt once for all layers and steps; masked tokens are not attended to."""
        dtype = self.text.weight.dtype
        projected = self.text(context.to(dtype))
        pairs = [block.text_keys_and_values(projected) for block in self.attention_blocks]
        bias = (
            None
            if context_mask is None
            else rearrange(mask_bias(context_mask).to(dtype), "b m -> b 1 1 m")
        )
        vector = None if pooled is None else self.pooled(pooled.to(dtype))
        return TextCondition(
            tuple(key for key, _ in pairs), tuple(value for _, value in pairs), bias, vector
        )

    @property
    def uncached_frame_offset(self) -> int:
        """Index of the first latent frame of a window inside a video without a cache."""
        return self.config.horizon

    @property
    def attention_blocks(self) -> list["AttentionBlock"]:
        """The attention blocks, typed."""
        return [block for block in self.attentions if isinstance(block, AttentionBlock)]

    def forward(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition | TextContext,
        *,
        attention_mode: AttentionMode = "bidirectional",
        cache: KvCache | None = None,
        span: Float[Tensor, "b t"] | None = None,
        frame_indices: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b c t h w"]:
        """Predict every latent frame; with a cache, `latent` is the window after the cached frames.

        The output is of the kind `config.prediction`. span: None predicts at `sigma`; else the
        few-step student's mean velocity from `sigma` to `sigma - span`. frame_indices: indices of
        the latent frames in their video; by default they follow the cached ones.
        """
        return self._run(
            latent,
            sigma,
            as_condition(text, self),
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
    ) -> UNetCache:
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
    ) -> tuple[Float[Tensor, "b c t h w"], UNetCache]:
        """Forward pass; also return the extended cache (empty without one)."""
        batch, _, frames, height, width = latent.shape
        past = cache or KvCache(sink=0, recent=0)
        if frame_indices is None:
            frame_indices = torch.arange(frames, device=latent.device) + past.seen
        embedded, level = self._embed(sigma, text, span, frame_indices)
        mode = attention_mode if cache is None else "bidirectional"
        links = self._links(mode, frame_indices, latent)
        previous = past.last if isinstance(past, UNetCache) else ()
        mixer = _Mixer(self.mixes, batch, links, previous)
        x = _fold(latent.to(self.stem.weight.dtype))
        fine = mixer(_residuals(self.fine_in, self.stem(x), embedded))
        coarse = self.to_coarse(channels_last(F.pixel_unshuffle(fine, 2))) + self._positions(
            height // 2, width // 2
        )
        coarse = mixer(_residuals(self.coarse_in, coarse, embedded))
        causal = attention_mode == "causal" and cache is None
        coarse, keys, values = self._attend(coarse, batch, text, embedded, past, causal=causal)
        coarse = _residuals(self.coarse_out, mixer(coarse), embedded)
        up = channels_last(F.pixel_shuffle(self.to_fine(coarse), 2)) + self.skip(fine)
        up = _residuals(self.fine_out, mixer(up), embedded)
        out = rearrange(self.head(F.silu(up)), "(b t) c h w -> b c t h w", b=batch)
        gain = rearrange(self.gain(F.silu(level)), "b t c -> b c t 1 1")
        out = torch.addcmul(out, gain, latent.to(out.dtype))
        if cache is None:
            return out, UNetCache(0, 0)
        return out, _extended(past, keys, values, frames, mixer.last)

    def _embed(
        self, sigma: Tensor, text: TextCondition, span: Tensor | None, frame_indices: Tensor
    ) -> tuple[Float[Tensor, "bt e"], Float[Tensor, "b t e"]]:
        """Return the modulation vector of each latent frame, and its noise-level part."""
        width = self.config.frequencies
        dtype = self.joint.weight.dtype
        level = self.noise(sinusoids(sigma, width).to(dtype))
        position = frame_indices.clamp(max=self.config.horizon).float()[None] / 100
        total = level + self.number(sinusoids(position, width).to(dtype))
        if text.pooled is not None:
            total = total + text.pooled[:, None]
        if span is not None:
            total = total + self.span(sinusoids(span, width).to(dtype))
        return F.silu(self.joint(F.silu(total))).flatten(0, 1), level

    def _links(
        self, attention_mode: AttentionMode, frame_indices: Tensor, like: Tensor
    ) -> FrameLinks:
        """Return the neighbours that each latent frame may read."""
        frames = len(frame_indices)
        follows = frame_indices.diff() == 1
        edge = torch.ones(1, dtype=torch.bool, device=like.device)
        before = torch.cat([edge, follows])
        after = torch.cat([follows, ~edge])
        if attention_mode == "causal":
            after = after & (
                (torch.arange(frames, device=like.device) + 1) % self.config.window != 0
            )
        dtype = self.stem.weight.dtype
        return FrameLinks(
            *(rearrange(mask.to(dtype), "t -> 1 t 1 1 1") for mask in (before, after))
        )

    def _positions(self, height: int, width: int) -> Float[Tensor, "1 c h w"]:
        stored = self.position[None]
        if stored.shape[2:] == (height, width):
            return stored
        return F.interpolate(
            stored.float(), (height, width), mode="bilinear", align_corners=False
        ).to(stored.dtype)

    def _attend(
        self,
        x: Tensor,
        batch: int,
        text: TextCondition,
        embedded: Tensor,
        past: KvCache,
        *,
        causal: bool,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Run the attention blocks over all coarse tokens; also return their keys and values."""
        config = self.config
        _, width, rows, columns = x.shape
        frames = x.shape[0] // batch
        tokens = rows * columns
        angles = window_angles(
            past.frames + frames,
            rows,
            columns,
            head_width=width // config.heads,
            theta=config.rope_theta,
            device=x.device,
            dtype=x.dtype,
        )
        bias = _attention_bias(
            text,
            x,
            config,
            keys=(past.frames + frames) * tokens,
            frames=frames,
            causal=causal,
        )
        z = rearrange(x, "(b t) d h w -> b (t h w) d", b=batch)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for index, block in enumerate(self.attention_blocks):
            before = (past.keys[index], past.values[index]) if past.frames else None
            z, key, value = block(z, embedded, text, index, angles=angles, bias=bias, before=before)
            keys.append(key)
            values.append(value)
        folded = rearrange(z, "b (t h w) d -> (b t) d h w", t=frames, h=rows)
        return channels_last(folded), tuple(keys), tuple(values)


class _Mixer:
    """Apply the FrameMix layers in order and collect their last frames for the cache."""

    def __init__(
        self,
        layers: nn.ModuleList,
        batch: int,
        links: FrameLinks,
        previous: Sequence[Tensor],
    ) -> None:
        self._layers = layers
        self._batch = batch
        self._links = links
        self._previous = previous
        self.last: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        index = len(self.last)
        self.last.append(rearrange(x, "(b t) c h w -> b t c h w", b=self._batch)[:, -1])
        before = self._previous[index] if self._previous else None
        return self._layers[index](x, self._batch, self._links, before)


def _residuals(blocks: nn.ModuleList, x: Tensor, embedded: Tensor) -> Tensor:
    for block in blocks:
        x = block(x, embedded)
    return x


def _attention_bias(
    text: TextCondition,
    like: Tensor,
    config: UNetConfig,
    *,
    keys: int,
    frames: int,
    causal: bool,
) -> Tensor | None:
    """Bias of attention scores for frames and prompt tokens; None if nothing is masked.

    like: coarse features `[(b t) d h w]`. keys: number of tokens of all visible latent frames.
    """
    if text.bias is None and not causal:
        return None
    batch = like.shape[0] // frames
    words = text.keys[0].shape[2]
    to_words = like.new_zeros(1, 1, 1, words) if text.bias is None else text.bias.to(like.dtype)
    to_frames = like.new_zeros(1, 1, 1, keys)
    if causal:
        tokens = like.shape[2] * like.shape[3]
        mask = block_causal_mask(frames, config.window, tokens, like.device)
        to_frames = mask_bias(mask).to(like.dtype)[None, None]
    rows = to_frames.shape[2]
    return torch.cat(
        [to_frames.expand(batch, 1, rows, keys), to_words.expand(batch, 1, rows, words)], -1
    )


def _extended(
    past: KvCache,
    keys: tuple[Tensor, ...],
    values: tuple[Tensor, ...],
    frames: int,
    last: Sequence[Tensor],
) -> UNetCache:
    """Append a window to the cache."""
    after = past.extended(keys, values, frames)
    kept = {field.name: getattr(after, field.name) for field in fields(KvCache)}
    return UNetCache(**kept, last=tuple(last))


def _fold(latent: Float[Tensor, "b c t h w"]) -> Float[Tensor, "bt c h w"]:
    return channels_last(rearrange(latent, "b c t h w -> (b t) c h w"))
