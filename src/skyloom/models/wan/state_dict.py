"""Convert the state dict of a diffusers Wan transformer (`WanTransformer3DModel`).

Besides names, three things differ: query, key and value are one matrix here; the patch embedding is
a matrix instead of a convolution; rotary pairs are (i, i + half) here and (2i, 2i + 1) there, so
the rows of queries and keys are reordered within each head.
"""

import torch
from einops import rearrange
from torch import Tensor

from skyloom.core.errors import CheckpointError
from skyloom.models.wan.config import WanConfig

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


def wan_from_diffusers(state: State, config: WanConfig) -> State:
    """Rename and reshape the weights. Raises CheckpointError naming unused keys."""
    left = dict(state)
    converted: State = {"table": rearrange(left.pop("scale_shift_table"), "1 two d -> two d")}
    converted["patch.weight"] = rearrange(
        left.pop("patch_embedding.weight"), "d c p q r -> d (c p q r)"
    )
    converted["patch.bias"] = left.pop("patch_embedding.bias")
    for source, name in _PLAIN.items():
        for kind in ("weight", "bias"):
            converted[f"{name}.{kind}"] = left.pop(f"{source}.{kind}")
    for layer in range(config.layers):
        converted.update(_block(left, f"blocks.{layer}.", config))
    if left:
        raise CheckpointError(
            f"{len(left)} tensors are unknown ({', '.join(sorted(left)[:3])}).",
            hint="The weights are of another family or version.",
        )
    return converted


def _block(left: State, prefix: str, config: WanConfig) -> State:
    """Convert one block; removes its tensors from `left`."""
    block: State = {"table": rearrange(left.pop(f"{prefix}scale_shift_table"), "1 six d -> six d")}
    for kind in ("weight", "bias"):
        for source, name in _PLAIN_BLOCK.items():
            block[f"{name}.{kind}"] = left.pop(f"{prefix}{source}.{kind}")
        query, key, value = (left.pop(f"{prefix}attn1.to_{role}.{kind}") for role in "qkv")
        block[f"qkv.{kind}"] = torch.cat(
            [_halves(query, config.heads), _halves(key, config.heads), value]
        )
        block[f"cross.query.{kind}"] = left.pop(f"{prefix}attn2.to_q.{kind}")
        pair = [left.pop(f"{prefix}attn2.to_{role}.{kind}") for role in "kv"]
        block[f"cross.key_value.{kind}"] = torch.cat(pair)
    for role, name in (("q", "query_norm"), ("k", "key_norm")):
        block[f"{name}.weight"] = _halves(
            left.pop(f"{prefix}attn1.norm_{role}.weight"), config.heads
        )
        block[f"cross.{name}.weight"] = left.pop(f"{prefix}attn2.norm_{role}.weight")
    return {f"{prefix}{name}": value for name, value in block.items()}


def _halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows from neighbouring pairs to pairs half a head apart."""
    return rearrange(rows, "(heads pair two) ... -> (heads two pair) ...", heads=heads, two=2)
