"""Read the state dict of a Wan transformer in the layout of diffusers or of the original code.

Besides names, three things differ: query, key and value are one matrix here; the patch embedding is
a matrix instead of a convolution; rotary pairs are (i, i + half) here and (2i, 2i + 1) there, so
the rows of queries and keys are reordered within each head. Quantised matrices stay quantised.
"""

import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from skyloom.core.errors import CheckpointError
from skyloom.models.checkpoint import TensorSource, WeightRecipe
from skyloom.models.quantized import QuantizedWeight, cat_rows, permute_rows
from skyloom.models.wan.config import WanConfig

Weight = Tensor | QuantizedWeight

# names of the original code, then those of diffusers
_ORIGINAL_NAMES = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^head\.head\.", "proj_out."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"(\.attn[12])\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attn[12])\.o\.", r"\1.to_out.0."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"^(blocks\.\d+)\.norm3\.", r"\1.norm2."),  # the norm before cross-attention
)
_PLAIN = {
    "time.inner": "condition_embedder.time_embedder.linear_1",
    "time.outer": "condition_embedder.time_embedder.linear_2",
    "time.to_modulation": "condition_embedder.time_proj",
    "text.inner": "condition_embedder.text_embedder.linear_1",
    "text.outer": "condition_embedder.text_embedder.linear_2",
    "head": "proj_out",
}
_PLAIN_BLOCK = {
    "out": "attn1.to_out.0",
    "cross.query": "attn2.to_q",
    "cross.out": "attn2.to_out.0",
    "cross_norm": "norm2",
    "up": "ffn.net.0.proj",
    "down": "ffn.net.2",
}


def is_original_layout(names: Mapping[str, object]) -> bool:
    """Whether names are those of the original code (also used by ComfyUI), not of diffusers."""
    return "head.modulation" in names


def diffusers_name(name: str) -> str:
    """Return the name in diffusers' layout of a tensor in the original layout."""
    for pattern, replacement in _ORIGINAL_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


class WanState:
    """The weights of a file under the names of `Wan`; a tensor is converted when it is read.

    Raises CheckpointError for missing and unknown names.
    """

    def __init__(self, source: TensorSource, config: WanConfig) -> None:
        self._source = source
        rename = diffusers_name if is_original_layout(source.shapes) else str
        self._stored = {rename(name): name for name in source.shapes}
        self._recipes = weight_recipes(config)
        used = {name for recipe in self._recipes.values() for name in recipe.names}
        missing = sorted(used - self._stored.keys())
        unknown = sorted(self._stored.keys() - used)
        if missing or unknown:
            raise CheckpointError(
                f"The transformer's file has {len(missing)} tensors too few "
                f"({', '.join(missing[:3]) or 'none'}) and {len(unknown)} too many "
                f"({', '.join(unknown[:3]) or 'none'}).",
                hint="The weights are of another model, or a part of them is missing.",
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        shapes = self._source.shapes
        return {
            name: tuple(
                recipe.convert(
                    *(torch.empty(shapes[self._stored[one]], device="meta") for one in recipe.names)
                ).shape
            )
            for name, recipe in self._recipes.items()
        }

    def read(self, name: str) -> Weight:
        """Read and convert a tensor."""
        recipe = self._recipes[name]
        return recipe.convert(*(self._source.read(self._stored[one]) for one in recipe.names))


def weight_recipes(config: WanConfig) -> dict[str, WeightRecipe]:
    """Return how every tensor of the network is made of those of diffusers' layout."""
    recipes = {
        "table": WeightRecipe(("scale_shift_table",), _squeeze),
        "patch.weight": WeightRecipe(("patch_embedding.weight",), _flatten),
        "patch.bias": WeightRecipe(("patch_embedding.bias",), _same),
    }
    for name, stored in _PLAIN.items():
        for kind in ("weight", "bias"):
            recipes[f"{name}.{kind}"] = WeightRecipe((f"{stored}.{kind}",), _same)
    for layer in range(config.layers):
        prefix = f"blocks.{layer}."
        for name, recipe in _block_recipes(config.heads).items():
            names = tuple(prefix + stored for stored in recipe.names)
            recipes[prefix + name] = WeightRecipe(names, recipe.convert)
    return recipes


def _block_recipes(heads: int) -> dict[str, WeightRecipe]:
    """How the tensors of a block are made."""
    fuse = partial(_fuse, heads=heads)
    halves = partial(_halves, heads=heads)
    recipes = {"table": WeightRecipe(("scale_shift_table",), _squeeze)}
    for kind in ("weight", "bias"):
        for name, stored in _PLAIN_BLOCK.items():
            recipes[f"{name}.{kind}"] = WeightRecipe((f"{stored}.{kind}",), _same)
        query_key_value = tuple(f"attn1.to_{role}.{kind}" for role in "qkv")
        recipes[f"qkv.{kind}"] = WeightRecipe(query_key_value, fuse)
        key_value = tuple(f"attn2.to_{role}.{kind}" for role in "kv")
        recipes[f"cross.key_value.{kind}"] = WeightRecipe(key_value, _join)
    for role, name in (("q", "query_norm"), ("k", "key_norm")):
        recipes[f"{name}.weight"] = WeightRecipe((f"attn1.norm_{role}.weight",), halves)
        recipes[f"cross.{name}.weight"] = WeightRecipe((f"attn2.norm_{role}.weight",), _same)
    return recipes


def _same(weight: Weight) -> Weight:
    return weight


def _squeeze(table: Tensor) -> Tensor:
    """Drop the batch axis of a modulation table."""
    return table[0]


def _flatten(weight: Tensor) -> Tensor:
    """Make a matrix of the patch embedding's convolution."""
    return weight.flatten(1)


def _join(*rows: Weight) -> Weight:
    return cat_rows(rows)


def _fuse(query: Weight, key: Weight, value: Weight, *, heads: int) -> Weight:
    """Make one matrix of query, key and value."""
    return cat_rows([_halves(query, heads=heads), _halves(key, heads=heads), value])


def _halves(rows: Weight, *, heads: int) -> Weight:
    """Reorder rows from neighbouring pairs to pairs half a head apart."""
    count = rows.shape[0]
    index = torch.arange(count).reshape(heads, count // heads // 2, 2).transpose(1, 2).flatten()
    return permute_rows(rows, index)
