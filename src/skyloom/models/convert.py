"""Foreign keys to ours and back: dict in, dict out, one table per family.

Wan as diffusers names it (`WanTransformer3DModel`). Three things differ besides names: query, key and value are one
matrix here; the patch embedding is a matrix instead of a convolution; and rotary pairs are (i, i + half) here but
neighbours there, so the rows of queries and keys are reordered within each head.
"""

import torch
from einops import rearrange
from torch import Tensor

from skyloom.core.errors import CheckpointError
from skyloom.models.dit import DitConfig

State = dict[str, Tensor]

_PLAIN = {
    "condition_embedder.time_embedder.linear_1": "time.inner",
    "condition_embedder.time_embedder.linear_2": "time.outer",
    "condition_embedder.time_proj": "time.to_modulation",
    "condition_embedder.text_embedder.linear_1": "text.inner",
    "condition_embedder.text_embedder.linear_2": "text.outer",
    "proj_out": "head",
}
_PLAIN_BLOCK = {
    "attn1.to_out.0": "out",
    "attn2.to_out.0": "cross.out",
    "norm2": "cross_norm",
    "ffn.net.0.proj": "up",
    "ffn.net.2": "down",
}


def wan_from_diffusers(state: State, config: DitConfig) -> State:
    """Weights of a diffusers Wan transformer under our keys. Raises CheckpointError naming unused keys."""
    left = dict(state)
    ours: State = {"table": rearrange(left.pop("scale_shift_table"), "1 two d -> two d")}
    ours["patch.weight"] = rearrange(left.pop("patch_embedding.weight"), "d c p q r -> d (c p q r)")
    ours["patch.bias"] = left.pop("patch_embedding.bias")
    for theirs, name in _PLAIN.items():
        for kind in ("weight", "bias"):
            ours[f"{name}.{kind}"] = left.pop(f"{theirs}.{kind}")
    for layer in range(config.layers):
        ours |= _block(left, f"blocks.{layer}.", config)
    if left:
        raise CheckpointError(
            f"{len(left)} tensors have no place here ({', '.join(sorted(left)[:3])})."
        )
    return ours


def _block(left: State, prefix: str, config: DitConfig) -> State:
    """One block's tensors, taken out of `left`."""
    taken: State = {"table": rearrange(left.pop(f"{prefix}scale_shift_table"), "1 six d -> six d")}
    for kind in ("weight", "bias"):
        for theirs, name in _PLAIN_BLOCK.items():
            taken[f"{name}.{kind}"] = left.pop(f"{prefix}{theirs}.{kind}")
        query, key, value = (left.pop(f"{prefix}attn1.to_{role}.{kind}") for role in "qkv")
        taken[f"qkv.{kind}"] = torch.cat(
            [_halves(query, config.heads), _halves(key, config.heads), value]
        )
        taken[f"cross.query.{kind}"] = left.pop(f"{prefix}attn2.to_q.{kind}")
        pair = [left.pop(f"{prefix}attn2.to_{role}.{kind}") for role in "kv"]
        taken[f"cross.key_value.{kind}"] = torch.cat(pair)
    for role, name in (("q", "query_norm"), ("k", "key_norm")):
        taken[f"{name}.weight"] = _halves(
            left.pop(f"{prefix}attn1.norm_{role}.weight"), config.heads
        )
        taken[f"cross.{name}.weight"] = left.pop(f"{prefix}attn2.norm_{role}.weight")
    return {f"{prefix}{name}": value for name, value in taken.items()}


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Rows in neighbouring pairs to rows with pairs half a head apart."""
    return rearrange(rows, "(heads pair two) ... -> (heads two pair) ...", heads=heads, two=2)
