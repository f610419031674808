"""Spacetime transformer blocks as in the Wan models (Wan team 2025, arXiv 2503.20314).

Tokens are patches of the latent in the order time, height, width. Each latent frame has its own
noise level, so modulation is per latent frame.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from skyloom.models.attention import KvCache, attend, join_heads, mask_bias, split_heads
from skyloom.models.base import TextCondition
from skyloom.models.rope import rotate


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, modulated per latent frame."""

    def __init__(self, width: int, heads: int, ffn: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.query_norm = RmsNorm(width, eps)
        self.key_norm = RmsNorm(width, eps)
        self.out = nn.Linear(width, width)
        self.cross_norm = nn.LayerNorm(width, eps=eps)
        self.cross = CrossAttention(width, heads, eps)
        self.up = nn.Linear(width, ffn)
        self.down = nn.Linear(ffn, width)
        self.table = nn.Parameter(modulation_table(6, width))

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
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (modulation + self.table).unbind(2)
        y = modulate(normalise(x, self.eps), shift, scale)
        query, key, value = self.qkv(y).chunk(3, dim=-1)
        del y  # memory: only what is needed later is kept
        query = split_heads(self.query_norm(query).to(value.dtype), self.heads)
        key = split_heads(self.key_norm(key).to(value.dtype), self.heads)
        value = split_heads(value, self.heads)
        all_keys = key
        all_values = value
        if before is not None:
            all_keys = torch.cat([before[0], key], 2)
            all_values = torch.cat([before[1], value], 2)
        own = (angles[0][-x.shape[1] :], angles[1][-x.shape[1] :])
        query = rotate(query, own)
        mixed = attend(query, rotate(all_keys, angles), all_values, bias)
        del query, all_keys, all_values
        x = add_gated(x, self.out(join_heads(mixed)), gate)
        del mixed
        normalised = self.cross_norm(x.to(self.cross_norm.weight.dtype)).to(x.dtype)
        x = x + self.cross(normalised, text.keys[index], text.values[index], text.bias)
        del normalised
        y = modulate(normalise(x, self.eps), shift_ffn, scale_ffn)
        y = self.down(F.gelu(self.up(y), approximate="tanh"))
        return add_gated(x, y, gate_ffn), key, value


class CrossAttention(nn.Module):
    """Attention from video tokens to the prompt."""

    def __init__(self, width: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm = RmsNorm(width, eps)
        self.key_norm = RmsNorm(width, eps)
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


def text_condition(
    blocks: Iterable[Block],
    projected: Float[Tensor, "b m d"],
    context_mask: Bool[Tensor, "b m"] | None,
    pooled: Float[Tensor, "b d"] | None = None,
    attributes: Float[Tensor, "b s"] | None = None,
) -> TextCondition:
    """Compute the keys and values of a projected prompt for all blocks."""
    pairs = [block.cross.keys_and_values(projected) for block in blocks]
    bias = None if context_mask is None else rearrange(mask_bias(context_mask), "b m -> b 1 1 m")
    keys = tuple(key for key, _ in pairs)
    values = tuple(value for _, value in pairs)
    return TextCondition(keys, values, bias, pooled, attributes)


def run_blocks(
    blocks: Iterable[Block],
    x: Float[Tensor, "b n d"],
    modulation: Float[Tensor, "b t 6 d"],
    text: TextCondition,
    *,
    past: KvCache,
    angles: tuple[Float[Tensor, "seen f"], Float[Tensor, "seen f"]],
    bias: Float[Tensor, "n seen"] | None,
    keep: bool,
) -> tuple[Float[Tensor, "b n d"], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Run the blocks on a window after the cached frames; return tokens, keys and values.

    Without `keep`, keys and values are dropped: those of all layers take more memory than the rest.
    """
    keys: list[Tensor] = []
    values: list[Tensor] = []
    for index, block in enumerate(blocks):
        before = (past.keys[index], past.values[index]) if past.frames else None
        x, key, value = block(x, modulation, text, index, angles=angles, bias=bias, before=before)
        if keep:
            keys.append(key)
            values.append(value.contiguous())  # not a view of the queries and keys
        del key, value
    return x, tuple(keys), tuple(values)


def modulation_table(rows: int, width: int) -> Float[Tensor, "rows width"]:
    """Draw the start values of a modulation table."""
    return nn.init.normal_(torch.empty(rows, width), std=width**-0.5)


def normalise(x: Float[Tensor, "b n d"], eps: float) -> Float[Tensor, "b n d"]:
    """Normalise every token, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def modulate(
    x: Float[Tensor, "b n d"], shift: Float[Tensor, "b t d"], scale: Float[Tensor, "b t d"]
) -> Float[Tensor, "b n d"]:
    """Scale and shift the tokens of each latent frame, in the higher of both precisions."""
    y = rearrange(x, "b (t p) d -> b t p d", t=shift.shape[1])
    moved = y * (1 + scale[:, :, None]) + shift[:, :, None]
    return rearrange(moved.to(x.dtype), "b t p d -> b (t p) d")


def add_gated(
    x: Float[Tensor, "b n d"], update: Float[Tensor, "b n d"], gate: Float[Tensor, "b t d"]
) -> Float[Tensor, "b n d"]:
    """Add an update, multiplied by the gate of its latent frame, in the higher precision."""
    y = rearrange(update, "b (t p) d -> b t p d", t=gate.shape[1])
    gated = rearrange(y * gate[:, :, None], "b t p d -> b (t p) d")
    return (x + gated).to(x.dtype)


def patchify(
    latent: Float[Tensor, "b c t h w"], patch: tuple[int, int, int]
) -> Float[Tensor, "b n k"]:
    """Cut a latent into patches, in the order time, height, width."""
    p, q, r = patch
    return rearrange(latent, "b c (t p) (h q) (w r) -> b (t h w) (c p q r)", p=p, q=q, r=r)


def unpatchify(
    x: Float[Tensor, "b n k"], patch: tuple[int, int, int], grid: tuple[int, int, int]
) -> Float[Tensor, "b o t h w"]:
    """Put the tokens' patches back into a latent; grid: number of tokens per axis."""
    t, h, w = grid
    p, q, r = patch
    return rearrange(
        x, "b (t h w) (p q r c) -> b c (t p) (h q) (w r)", t=t, h=h, w=w, p=p, q=q, r=r
    )
