"""Transformer of the Wan family (Wan team 2025, arXiv 2503.20314).

The same weights attend bidirectionally or, by mask or cache, causally in windows of latent frames.
"""

import math

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from skyloom.models.attention import KvCache, block_causal_mask, mask_bias
from skyloom.models.base import (
    AttentionMode,
    DenoisingNetwork,
    TextCondition,
    TextContext,
    as_condition,
)
from skyloom.models.embeddings import TextProjection, TimeEmbedding
from skyloom.models.rope import window_angles
from skyloom.models.transformer_block import (
    Block,
    modulate,
    modulation_table,
    normalise,
    patchify,
    run_blocks,
    text_condition,
    unpatchify,
)
from skyloom.models.wan.config import WanConfig


class Wan(DenoisingNetwork):
    """Predict the velocity of every latent frame."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        patch = math.prod(config.patch)
        self.patch = nn.Linear(config.in_channels * patch, config.width)
        self.time = TimeEmbedding(config.frequency_width, config.width)
        self.text = TextProjection(config.text_width, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.ffn, config.eps) for _ in range(config.layers)
        )
        self.table = nn.Parameter(modulation_table(2, config.width))
        self.head = nn.Linear(config.width, config.out_channels * patch)

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def prepare_text(
        self,
        context: Float[Tensor, "b m k"],
        context_mask: Bool[Tensor, "b m"] | None = None,
        pooled: Float[Tensor, "b p"] | None = None,
    ) -> TextCondition:
        """Project a prompt once for all layers and steps; a pooled vector has no effect."""
        return text_condition(self.layers, self.text(context), context_mask)

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
    ) -> Float[Tensor, "b o t h w"]:
        """Predict every latent frame; with a cache, `latent` is the window after the cached frames.

        span must be None: the network is no few-step student. frame_indices have no effect:
        positions are relative to the first visible frame.
        """
        assert span is None, "a Wan transformer has no embedding of the step size"
        return self._run(latent, sigma, as_condition(text, self), attention_mode, cache)[0]

    def extend_cache(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        cache: KvCache,
        span: Float[Tensor, "b t"] | None = None,
    ) -> KvCache:
        """Append a finished window to the cache, stored at the noise level `sigma`."""
        return self._run(latent, sigma, text, "causal", cache)[1]

    def _run(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        attention_mode: AttentionMode,
        cache: KvCache | None,
    ) -> tuple[Float[Tensor, "b o t h w"], KvCache]:
        """Forward pass; rotary time positions start at the first cached frame."""
        config = self.config
        _, _, frames, height, width = latent.shape
        grid = (frames // config.patch[0], height // config.patch[1], width // config.patch[2])
        x = self.patch(patchify(latent.to(self.dtype), config.patch))
        past = cache or KvCache(sink=0, recent=0)
        embedded = self.time(sigma)
        angles = window_angles(
            past.frames + grid[0],
            grid[1],
            grid[2],
            head_width=config.head_width,
            theta=config.rope_theta,
            device=x.device,
            dtype=x.dtype,
        )
        bias = None
        if attention_mode == "causal" and cache is None:
            mask = block_causal_mask(grid[0], config.window, grid[1] * grid[2], x.device)
            bias = mask_bias(mask)
        x, keys, values = run_blocks(
            self.layers,
            x,
            self.time.modulation(embedded),
            text,
            past=past,
            angles=angles,
            bias=bias,
        )
        shift, scale = (self.table + embedded[:, :, None]).unbind(2)
        features = modulate(normalise(x, config.eps), shift, scale)
        out = unpatchify(self.head(features), config.patch, grid)
        return out, past if cache is None else past.extended(keys, values, grid[0])
