"""Transformer of the Wan family (Wan team 2025, arXiv 2503.20314).

The same weights attend bidirectionally or, by mask or cache, causally in windows of latent frames.
Equal to the original code: timesteps are integers, prompts are padded with zero rows that are
attended to, and with 16-bit weights the timestep embedding, the modulation, the norms and the
rotary angles stay in fp32 (tests/models/wan/test_transformer.py).
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
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
    RmsNorm,
    modulate,
    modulation_table,
    normalise,
    patchify,
    run_blocks,
    text_condition,
    unpatchify,
)
from skyloom.models.wan.config import WanConfig

_LEVEL_MARGIN = 4e-5


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
        """Project a prompt once for all layers and steps; a pooled vector has no effect.

        Masked tokens are zero rows, as is the padding up to `config.text_length`.
        """
        if context_mask is not None:
            context = context * context_mask[..., None].to(context.dtype)
        missing = self.config.text_length - context.shape[1]
        assert missing >= 0, "the text encoder truncates prompts"
        if context.device.type != "cpu":  # without a mask the fused attention kernels can be used
            context = F.pad(context, (0, 0, 0, missing))
            return text_condition(self.running_blocks, self.text(context), None)
        condition = text_condition(
            self.running_blocks, self.text(F.pad(context, (0, 0, 0, 1))), None
        )
        bias = torch.zeros(1, 1, 1, context.shape[1] + 1)
        bias[..., -1] = math.log(missing) if missing else -math.inf  # one zero row for all
        return replace(condition, bias=bias)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device; in 16 bits, small layers that need the range of fp32 keep it."""
        super().place(device, dtype)
        for layer in self.modules():
            if isinstance(layer, RmsNorm | nn.LayerNorm):
                layer.float()
        self.time.inner.float()
        self.time.outer.float()
        for owner in (self, *self.layers):
            owner.table.data = owner.table.data.float()

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
        embedded = self.time(whole_timestep(sigma))
        angles = window_angles(
            past.frames + grid[0],
            grid[1],
            grid[2],
            head_width=config.head_width,
            theta=config.rope_theta,
            device=x.device,
            dtype=torch.float32,
        )
        bias = None
        if attention_mode == "causal" and cache is None:
            mask = block_causal_mask(grid[0], config.window, grid[1] * grid[2], x.device)
            bias = mask_bias(mask)
        x, keys, values = run_blocks(
            self.running_blocks,
            x,
            self.time.modulation(embedded.to(self.dtype)).float(),
            text,
            past=past,
            angles=angles,
            bias=bias,
            keep=cache is not None,
        )
        shift, scale = (self.table + embedded[:, :, None]).unbind(2)
        features = modulate(normalise(x, config.eps), shift, scale)
        out = unpatchify(self.head(features), config.patch, grid)
        return out, past if cache is None else past.extended(keys, values, grid[0])


def whole_timestep(sigma: Float[Tensor, "b t"]) -> Float[Tensor, "b t"]:
    """Round noise levels down to a whole timestep of 1000, as in training.

    The margin covers levels in fp32: k/1000 becomes k.
    """
    return ((1000 * sigma.double() + _LEVEL_MARGIN).floor() / 1000).float()
