"""Read the weights and the vocabulary of a UMT5 encoder from the files of other tools.

Layouts differ in names only: transformers (also ComfyUI's single files, with the vocabulary inside
as the tensor `spiece_model`), the original code, and GGUF. Quantized matrices stay quantized.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from skyloom.core.errors import CheckpointError
from skyloom.models.checkpoint import TensorSource
from skyloom.models.quantized import Weight
from skyloom.models.wan.tokenizer import WanTokenizer
from skyloom.models.weight_files import WeightFiles

VOCABULARY_TENSOR = "spiece_model"
JSON_FILE = "tokenizer.json"
SENTENCEPIECE_FILE = "spiece.model"

_TIED = "encoder.embed_tokens.weight"  # the same tensor as shared.weight
_GGUF_VOCABULARY = "tokenizer.ggml.tokens"
_WEIGHT = ".weight"
_MATRIX_AXES = 2
_LAYER = re.compile(r"(\d+)\.(.+)")
_HINT = "Take the text encoder of the model's page, such as umt5_xxl_fp16.safetensors."


@dataclass(frozen=True)
class Umt5Config:
    """Sizes of the encoder.

    vocabulary: number of token embeddings. attention_width: of all heads together. buckets: number
    of relative distances that a head tells apart; all from `farthest` on are one.
    """

    vocabulary: int
    width: int
    attention_width: int
    heads: int
    ffn: int
    layers: int
    buckets: int = 32
    farthest: int = 128
    eps: float = 1e-6


@dataclass(frozen=True)
class _Layout:
    """Names of a layout, without ".weight": of the embedding, the last norm, and in layers."""

    embedding: str
    norm: str
    layers: str
    parts: Mapping[str, str]


_LAYOUTS = (
    _Layout(
        "shared",
        "encoder.final_layer_norm",
        "encoder.block.",
        {
            "norm": "layer.0.layer_norm",
            "query": "layer.0.SelfAttention.q",
            "key": "layer.0.SelfAttention.k",
            "value": "layer.0.SelfAttention.v",
            "out": "layer.0.SelfAttention.o",
            "bias": "layer.0.SelfAttention.relative_attention_bias",
            "ffn_norm": "layer.1.layer_norm",
            "gate": "layer.1.DenseReluDense.wi_0",
            "up": "layer.1.DenseReluDense.wi_1",
            "down": "layer.1.DenseReluDense.wo",
        },
    ),
    _Layout(
        "token_embedding",
        "norm",
        "blocks.",
        {
            "norm": "norm1",
            "query": "attn.q",
            "key": "attn.k",
            "value": "attn.v",
            "out": "attn.o",
            "bias": "pos_embedding.embedding",
            "ffn_norm": "norm2",
            "gate": "ffn.gate.0",
            "up": "ffn.fc1",
            "down": "ffn.fc2",
        },
    ),
    _Layout(
        "token_embd",
        "enc.output_norm",
        "enc.blk.",
        {
            "norm": "attn_norm",
            "query": "attn_q",
            "key": "attn_k",
            "value": "attn_v",
            "out": "attn_o",
            "bias": "attn_rel_b",
            "ffn_norm": "ffn_norm",
            "gate": "ffn_gate",
            "up": "ffn_up",
            "down": "ffn_down",
        },
    ),
)


class Umt5State:
    """The weights of a file under the names of `Umt5`, and the sizes that they tell.

    Raises CheckpointError for missing and unknown names.
    """

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        layout = _layout(source.shapes)
        self._stored = {"embed.weight": layout.embedding, "norm.weight": layout.norm}
        for index in range(_layer_count(source.shapes, layout)):
            for ours, theirs in layout.parts.items():
                self._stored[f"layers.{index}.{ours}.weight"] = f"{layout.layers}{index}.{theirs}"
        self._stored = {ours: theirs + _WEIGHT for ours, theirs in self._stored.items()}
        _check_names(self._stored.values(), source.shapes)
        self.shapes = {ours: source.shapes[theirs] for ours, theirs in self._stored.items()}
        self.config = _config(self.shapes)

    def read(self, name: str) -> Weight:
        """Read a weight."""
        return self._source.read(self._stored[name])

    def layer(self, index: int) -> "LayerState":
        """Return the weights of one layer, under the names of `Umt5Layer`."""
        return LayerState(self, f"layers.{index}.")


class LayerState:
    """The weights whose names begin with a prefix, under the rest of their names."""

    def __init__(self, source: TensorSource, prefix: str) -> None:
        self._source = source
        self._prefix = prefix
        self.shapes = {
            name.removeprefix(prefix): shape
            for name, shape in source.shapes.items()
            if name.startswith(prefix)
        }

    def read(self, name: str) -> Weight:
        """Read a weight."""
        return self._source.read(self._prefix + name)


def read_tokenizer(
    files: WeightFiles, paths: Sequence[Path], vocabulary: Path | None = None
) -> WanTokenizer:
    """Read the vocabulary of a text encoder.

    It is read from `vocabulary` (`tokenizer.json`, a SentencePiece model or a folder with one) or,
    by default, from the weights' files, their folder or the folder `tokenizer` beside that. Raises
    CheckpointError if there is none, or a damaged one.
    """
    if vocabulary is None and VOCABULARY_TENSOR in files.shapes:
        content = files.read(VOCABULARY_TENSOR)
        assert isinstance(content, Tensor), "a vector is never quantized"
        return WanTokenizer.from_sentencepiece(content.numpy().tobytes())
    if vocabulary is None and _GGUF_VOCABULARY in files.metadata:
        return WanTokenizer.from_gguf(files.metadata)
    path = _vocabulary_file(paths, vocabulary)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    is_json = path.suffix == ".json"
    return WanTokenizer.from_json(content) if is_json else WanTokenizer.from_sentencepiece(content)


def _vocabulary_file(paths: Sequence[Path], vocabulary: Path | None) -> Path:
    if vocabulary is not None and not vocabulary.is_dir():
        return vocabulary
    folders = [vocabulary] if vocabulary else []
    if vocabulary is None:
        own = [path if path.is_dir() else path.parent for path in paths]
        folders = [*own, *(folder.parent / "tokenizer" for folder in own)]
    for folder in folders:
        for name in (JSON_FILE, SENTENCEPIECE_FILE):
            if (folder / name).is_file():
                return folder / name
    raise CheckpointError(
        f"{folders[0]} has no vocabulary of the text encoder.",
        hint=f"Put {JSON_FILE} or {SENTENCEPIECE_FILE} of umt5-xxl beside the weights.",
    )


def _layout(names: Collection[str]) -> _Layout:
    found = [layout for layout in _LAYOUTS if layout.embedding + _WEIGHT in names]
    if not found:
        raise CheckpointError("The text encoder's file holds no UMT5 encoder.", hint=_HINT)
    return found[0]


def _layer_count(names: Collection[str], layout: _Layout) -> int:
    """Return the number of layers, one more than the highest index."""
    rest = (name.removeprefix(layout.layers) for name in names if name.startswith(layout.layers))
    matches = (_LAYER.fullmatch(name) for name in rest)
    indices = {int(match[1]) for match in matches if match}
    return len(indices)


def _check_names(expected: Collection[str], names: Collection[str]) -> None:
    """Raise CheckpointError unless a file's names are the expected ones."""
    missing = sorted(set(expected) - set(names))
    unknown = sorted(set(names) - {*expected, _TIED, VOCABULARY_TENSOR})
    if missing or unknown:
        raise CheckpointError(
            f"The text encoder's file has {len(missing)} tensors too few "
            f"({', '.join(missing[:3]) or 'none'}) and {len(unknown)} too many "
            f"({', '.join(unknown[:3]) or 'none'}).",
            hint=_HINT,
        )


def _config(shapes: Mapping[str, tuple[int, ...]]) -> Umt5Config:
    """Read the sizes of the encoder. Raises CheckpointError for axes that do not fit."""
    names = ("embed", "layers.0.bias", "layers.0.query", "layers.0.gate")
    sides = [shapes.get(name + _WEIGHT, ()) for name in names]
    if any(len(shape) != _MATRIX_AXES for shape in sides):
        raise CheckpointError("The text encoder's tensors are no matrices.", hint=_HINT)
    (vocabulary, width), (buckets, heads), (attention_width, _), (ffn, _) = sides
    if not heads or attention_width % heads:
        raise CheckpointError(
            f"The text encoder's {attention_width} channels do not fit {heads} heads.", hint=_HINT
        )
    return Umt5Config(
        vocabulary=vocabulary,
        width=width,
        attention_width=attention_width,
        heads=heads,
        ffn=ffn,
        layers=sum(name.endswith(".query.weight") for name in shapes),
        buckets=buckets,
    )
