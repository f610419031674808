"""Attention, its masks, and the fixed-size key-value cache of causal attention."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

_BLOCK_ROWS = 1024  # queries whose scores stay in the cache


def attend(
    query: Float[Tensor, "b heads n c"],
    key: Float[Tensor, "b heads m c"],
    value: Float[Tensor, "b heads m c"],
    bias: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "b heads n c"]:
    """Softmax attention; `bias`, which broadcasts to `[b heads n m]`, is added to the scores.

    On a CPU two matrix products are faster than the fused kernel for few queries, and in bf16, in
    blocks, for many (bench/attention.py).
    """
    few = query.shape[2] <= _BLOCK_ROWS
    if query.device.type != "cpu" or not (few or query.dtype == torch.bfloat16):
        mask = None if bias is None else bias.to(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scaled = query * query.shape[-1] ** -0.5
    if few:
        return _attend_block(scaled, key, value, bias)
    mixed = torch.empty_like(query)
    per_query = bias is not None and bias.ndim > 1 and bias.shape[-2] > 1
    for head in range(query.shape[1]):
        heads = slice(head, head + 1)
        for first in range(0, query.shape[2], _BLOCK_ROWS):
            rows = slice(first, first + _BLOCK_ROWS)
            mixed[:, heads, rows] = _attend_block(
                scaled[:, heads, rows],
                key[:, heads],
                value[:, heads],
                bias[..., rows, :] if bias is not None and per_query else bias,
            )
    return mixed


def _attend_block(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of already scaled queries by two matrix products."""
    scores = query @ key.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(dim=-1) @ value


def mask_bias(mask: Bool[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return 0 where attention is allowed and -1e9 (softmax weight 0) where it is not."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e9)


def block_causal_mask(
    frames: int, window: int, tokens: int, device: torch.device
) -> Bool[Tensor, "n n"]:
    """Mask in which a token attends to its own window of latent frames and all windows before.

    tokens: number of tokens per latent frame.
    """
    index = (torch.arange(frames, device=device) // window).repeat_interleave(tokens)
    return index[:, None] >= index[None, :]


@dataclass(frozen=True)
class KvCache:
    """Keys before rotary embedding, and values, of the latent frames that a new window attends to.

    Holds at most the `sink` first and the `recent` last latent frames. frames: number held now;
    seen: number appended so far. One tensor per layer, `[b heads frames*tokens c]`; a network
    without attention has none.
    """

    sink: int
    recent: int
    frames: int = 0
    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    seen: int = 0

    def extended(
        self, keys: tuple[Tensor, ...], values: tuple[Tensor, ...], frames: int
    ) -> "KvCache":
        """Append a window; drop frames between the sink and the recent ones."""
        total = self.frames + frames
        if self.frames:
            keys = tuple(torch.cat(pair, dim=2) for pair in zip(self.keys, keys, strict=True))
            values = tuple(torch.cat(pair, dim=2) for pair in zip(self.values, values, strict=True))
        kept = min(total, self.sink + self.recent)
        if keys and total > kept:
            tokens = keys[0].shape[2] // total
            keep = [
                *range(self.sink * tokens),
                *range((total - self.recent) * tokens, total * tokens),
            ]
            index = torch.tensor(keep, device=keys[0].device)
            keys = tuple(key.index_select(2, index) for key in keys)
            values = tuple(value.index_select(2, index) for value in values)
        return KvCache(
            self.sink,
            self.recent,
            frames=kept,
            keys=keys,
            values=values,
            seen=self.seen + frames,
        )


def split_heads(x: Float[Tensor, "b n d"], heads: int) -> Float[Tensor, "b heads n c"]:
    """Split channels by head."""
    return rearrange(x, "b n (heads c) -> b heads n c", heads=heads)


def join_heads(x: Float[Tensor, "b heads n c"]) -> Float[Tensor, "b n d"]:
    """Concatenate the heads' channels."""
    return rearrange(x, "b heads n c -> b n (heads c)")
