"""Bundled text encoder: prompts to context, mask and pooled vector.

A BERT encoder (Devlin et al. 2018, arXiv 1810.04805) with the weights of MiniLM (all-MiniLM-L6-v2,
Apache-2.0): pruned vocabulary, matrices in int8 with a scale per row
(docs/decisions/0002-text-encoder.md). Runs in fp32.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from skyloom.models.attention import attend, join_heads, mask_bias, split_heads
from skyloom.models.base import TextContext
from skyloom.models.checkpoint import build, open_part, save_part, to_int8
from skyloom.models.diorama.config import TextConfig
from skyloom.models.diorama.prompt_attributes import PromptAttributes
from skyloom.models.diorama.tokenizer import Tokenizer

_PAD_TO = 16
_CONTEXT_SCALE = 2.0
_VOCABULARY = "vocabulary"


class DioramaTextEncoder(nn.Module):
    """BERT encoder: word, position and segment embeddings, then post-norm layers."""

    def __init__(self, config: TextConfig, vocabulary: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(vocabulary)
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.positions, config.width)
        self.segment = nn.Parameter(torch.zeros(config.width))
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config.layers))
        self.meaning = (
            PromptAttributes(config.context_width, config.meaning) if config.meaning else None
        )
        self._lexicon: Tensor | None = None

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Keep the encoder in fp32 on the CPU, where results do not depend on the device."""
        self.eval().to("cpu", torch.float32)

    def forward(
        self, tokens: Int[Tensor, "b m"], mask: Bool[Tensor, "b m"] | None = None
    ) -> Float[Tensor, "b m d"]:
        """Return the last hidden state of every token; masked tokens are not attended to."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.norm(self.words(tokens) + self.positions(positions) + self.segment)
        bias = None if mask is None else rearrange(mask_bias(mask), "b m -> b 1 1 m")
        for layer in self.layers:
            x = layer(x, bias)
        return x

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts one at a time: results do not depend on the batch."""
        rows, truncated = zip(*(self._tokens(prompt) for prompt in prompts), strict=True)
        hidden = [self(torch.tensor([row], device=self.segment.device))[0] for row in rows]
        return self._collect(hidden, rows, truncated)

    @torch.no_grad()
    def encode_together(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts in one padded batch: faster, equal up to rounding."""
        rows, truncated = zip(*(self._tokens(prompt) for prompt in prompts), strict=True)
        length = max(map(len, rows))
        device = self.segment.device
        tokens = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(length, device=device) < lengths[:, None]
        hidden = self(tokens, mask)
        unpadded = [h[: len(row)] for h, row in zip(hidden, rows, strict=True)]
        return self._collect(unpadded, rows, truncated)

    @torch.no_grad()
    def word_vectors(self, tokens: Sequence[int]) -> Float[Tensor, "m d"]:
        """Return the word embeddings of tokens, normalised and centred to about unit scale."""
        if self._lexicon is None:
            table = F.layer_norm(self.words.weight, (self.config.width,))
            table = table - table.mean(0)
            self._lexicon = table / table.square().mean().sqrt()
        return self._lexicon[list(tokens)]

    def _tokens(self, prompt: str) -> tuple[list[int], int]:
        """Return token ids cut to `max_tokens`, and the number of dropped tokens."""
        tokens = self.tokenizer(prompt)
        limit = self.config.max_tokens
        if len(tokens) <= limit:
            return tokens, 0
        return [*tokens[: limit - 1], tokens[-1]], len(tokens) - limit

    def _collect(
        self, hidden: Sequence[Tensor], rows: Sequence[Sequence[int]], truncated: tuple[int, ...]
    ) -> TextContext:
        """Pad to a batch at about unit scale; append word vectors and prompt attributes."""
        width = self.config.width
        lengths = [len(h) for h in hidden]
        length = -(-max(lengths) // _PAD_TO) * _PAD_TO
        context = torch.zeros(
            len(hidden), length, self.config.context_width, device=self.segment.device
        )
        mask = torch.zeros(len(hidden), length, dtype=torch.bool, device=self.segment.device)
        for index, h in enumerate(hidden):
            context[index, : len(h), :width] = h * _CONTEXT_SCALE
            mask[index, : len(h)] = True
        pooled = torch.stack([F.normalize(h.mean(0), dim=0) for h in hidden]) * width**0.5
        if self.config.lexical:
            for index, row in enumerate(rows):
                context[index, : len(row), width:] = self.word_vectors(row)
            sums = [
                self.word_vectors(row[1:-1]).sum(0) / max(1, len(row) - 2) ** 0.5 for row in rows
            ]
            pooled = torch.cat([pooled, torch.stack(sums)], dim=1)
        if self.meaning is not None:
            attributes = [
                self.meaning(context[i : i + 1, : len(h)], mask[i : i + 1, : len(h)])
                for i, h in enumerate(hidden)
            ]
            pooled = torch.cat([pooled, torch.cat(attributes)], dim=1)
        return TextContext(context, mask, pooled, truncated)


class TextLayer(nn.Module):
    """Self-attention and feed-forward, each followed by a layer norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.eps)
        self.up = nn.Linear(config.width, config.ffn)
        self.down = nn.Linear(config.ffn, config.width)
        self.norm_ffn = nn.LayerNorm(config.width, eps=config.eps)

    def forward(self, x: Float[Tensor, "b m d"], bias: Tensor | None) -> Float[Tensor, "b m d"]:
        """Apply the layer; `bias` is added to the attention scores."""
        query, key, value = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, dim=-1))
        x = self.norm(x + self.out(join_heads(attend(query, key, value, bias))))
        return self.norm_ffn(x + self.down(F.gelu(self.up(x))))


def save_text_encoder(
    folder: Path, encoder: DioramaTextEncoder, metadata: dict[str, str]
) -> list[Path]:
    """Write the part `text`: matrices in int8, the vocabulary as UTF-8 bytes."""
    state = to_int8(encoder.state_dict())
    text = "\n".join(encoder.tokenizer.vocabulary).encode()
    state[_VOCABULARY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return save_part(folder, "text", encoder.config, state, metadata=metadata)


def load_text_encoder(folder: Path) -> DioramaTextEncoder:
    """Load the part `text` of a model folder, dequantized to fp32."""
    device = torch.device("cpu")
    with open_part(folder, "text") as reader:
        config = reader.config(TextConfig)
        vocabulary = reader.read(_VOCABULARY).numpy().tobytes().decode().split("\n")
        return build(
            lambda: DioramaTextEncoder(config, vocabulary), reader, device, skip=[_VOCABULARY]
        )
