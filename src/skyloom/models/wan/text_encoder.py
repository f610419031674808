"""UMT5 encoder (Chung et al. 2023, arXiv 2304.09151), the text encoder of the Wan models.

It differs from T5 v1.1 in that each layer has its own biases of relative positions. A prompt runs
at its own length: padding and masking it first gives the same result, and the transformer appends
the zero rows up to its text length. Matrix products run in the weights' precision, fp32 or bf16;
norms, attention and the sums of residual branches run in fp32. fp16 is refused: it overflows in
the feed-forward layers.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from skyloom.core.errors import CheckpointError, ConfigError
from skyloom.core.version import __version__
from skyloom.models.attention import join_heads, split_heads
from skyloom.models.base import TextContext
from skyloom.models.checkpoint import build
from skyloom.models.embedding_cache import EmbeddingCache
from skyloom.models.quantized import QuantizedWeight, dense
from skyloom.models.transformer_block import RmsNorm
from skyloom.models.wan.text_encoder_state_dict import Umt5Config, Umt5State, read_tokenizer
from skyloom.models.wan.tokenizer import PromptTokens, WanTokenizer, clean_prompt
from skyloom.models.weight_files import open_weights, weight_paths

TEXT_LENGTH = 512
"""Number of text tokens that Wan transformers attend to; longer prompts are cut."""

Ids = tuple[int, ...]


class Umt5Layer(nn.Module):
    """Self-attention with biases of relative positions, and a gated feed-forward layer."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.norm = RmsNorm(config.width, config.eps)
        self.query = nn.Linear(config.width, config.attention_width, bias=False)
        self.key = nn.Linear(config.width, config.attention_width, bias=False)
        self.value = nn.Linear(config.width, config.attention_width, bias=False)
        self.out = nn.Linear(config.attention_width, config.width, bias=False)
        self.bias = nn.Embedding(config.buckets, config.heads)
        self.ffn_norm = RmsNorm(config.width, config.eps)
        self.gate = nn.Linear(config.width, config.ffn, bias=False)
        self.up = nn.Linear(config.width, config.ffn, bias=False)
        self.down = nn.Linear(config.ffn, config.width, bias=False)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device for inference; norms and biases of positions keep fp32."""
        self.dtype = dtype
        self.eval().to(device, dtype)
        for layer in (self.norm, self.bias, self.ffn_norm):
            layer.float()

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Apply the layer to hidden states in fp32."""
        y = self.norm(x).to(self.dtype)
        query, key, value = (
            split_heads(project(y), self.config.heads).float()
            for project in (self.query, self.key, self.value)
        )
        buckets = distance_buckets(x.shape[1], self.config.buckets, self.config.farthest)
        bias = rearrange(self.bias(buckets.to(x.device)), "n m heads -> 1 heads n m")
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        x = x + self.out(join_heads(mixed).to(self.dtype))
        y = self.ffn_norm(x).to(self.dtype)
        return x + self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))


class Umt5(nn.Module):
    """Token embeddings, layers and a last norm."""

    def __init__(self, config: Umt5Config) -> None:
        super().__init__()
        self.config = config
        self.dtype = torch.float32
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Umt5Layer(config) for _ in range(config.layers))
        self.norm = RmsNorm(config.width, config.eps)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device for inference; norms and biases of positions keep fp32."""
        self.dtype = dtype
        self.eval().to(device, dtype)
        self.norm.float()
        for layer in self.modules():
            if isinstance(layer, Umt5Layer):
                layer.place(device, dtype)

    def forward(self, ids: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Encode token ids to hidden states in the weights' precision."""
        x = self.embed(ids).float()
        for layer in self.layers:
            x = layer(x)
        return self.norm(x).to(self.dtype)


class WanTextEncoder:
    """Encodes prompts with UMT5; weights are read when a prompt is not in the cache.

    streamed: read one layer at a time from the files for each call instead of keeping all on the
    device; the result is the same. paths: of the weights; vocabulary: of the tokenizer (see
    `read_tokenizer`). identity: names the files' content in cache keys, such as their sha256; by
    default their paths, sizes and times of change. Raises CheckpointError for missing files.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        vocabulary: Path | None = None,
        identity: str | None = None,
        streamed: bool = False,
        cache: EmbeddingCache | None = None,
        text_length: int = TEXT_LENGTH,
    ) -> None:
        self.streamed = streamed
        self._paths = tuple(paths)
        self._vocabulary = vocabulary
        self._identity = identity or _files_identity(self._paths)
        self._cache = cache
        self._text_length = text_length
        self._device = torch.device("cpu")
        self._dtype = torch.float32
        self._tokenizer: WanTokenizer | None = None
        self._network: Umt5 | None = None
        self._lock = Lock()

    @property
    def loaded(self) -> bool:
        """Whether weights are in memory."""
        return self._network is not None

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Choose where and how to compute, and move weights that are loaded.

        Raises ConfigError for a precision other than fp32 and bf16.
        """
        if dtype not in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            raise ConfigError(
                f"The dtype of the text encoder must be float32 or bfloat16, got {name}.",
                hint="float16 overflows in its feed-forward layers.",
            )
        with self._lock:
            if dtype != self._dtype:
                self._network = None
            elif self._network is not None:
                self._network.place(device, dtype)
            self._device = device
            self._dtype = dtype

    def free(self) -> None:
        """Drop the weights; the next prompt that is not cached reads them again."""
        with self._lock:
            self._network = None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts one at a time: results do not depend on the batch.

        Prompts are cleaned, and cut to the text length. Raises CheckpointError for damaged files.
        """
        with self._lock:
            tokens = self._tokenize(prompts)
            embeddings = self._embeddings(tuple(dict.fromkeys(one.ids for one in tokens)))
        rows = [embeddings[one.ids] for one in tokens]
        lengths = torch.tensor([len(row) for row in rows])
        return TextContext(
            context=nn.utils.rnn.pad_sequence(rows, batch_first=True),
            context_mask=torch.arange(int(lengths.max())) < lengths[:, None],
            pooled=None,
            truncated=tuple(one.dropped for one in tokens),
            truncated_text=tuple(one.dropped_text for one in tokens),
        )

    def _tokenize(self, prompts: Sequence[str]) -> list[PromptTokens]:
        if self._tokenizer is None:
            with open_weights(self._paths) as files:
                self._tokenizer = read_tokenizer(files, self._paths, self._vocabulary)
        return [self._tokenizer(clean_prompt(prompt), self._text_length) for prompt in prompts]

    def _embeddings(self, rows: Sequence[Ids]) -> dict[Ids, Tensor]:
        """Return the embedding of each row of token ids, on the CPU, from the cache if possible."""
        found: dict[Ids, Tensor] = {}
        if self._cache is not None:
            cached = {ids: self._cache.load(self._key(ids)) for ids in rows}
            found = {ids: value for ids, value in cached.items() if value is not None}
        missing = [ids for ids in rows if ids not in found]
        if not missing:
            return found
        for ids, value in zip(missing, self._compute(missing), strict=True):
            found[ids] = value.cpu()
            if self._cache is not None:
                self._cache.save(self._key(ids), found[ids])
        return found

    def _compute(self, rows: Sequence[Ids]) -> list[Tensor]:
        if self._network is not None:
            return self._run(self._network, rows)
        with open_weights(self._paths) as files:
            state = Umt5State(files)
            if self.streamed:
                return self._stream(state, rows)
            self._network = build(partial(Umt5, state.config), state, self._device, self._dtype)
        return self._run(self._network, rows)

    def _run(self, network: Umt5, rows: Sequence[Ids]) -> list[Tensor]:
        _check_ids(rows, network.config)
        return [network(torch.tensor([ids], device=self._device))[0] for ids in rows]

    def _stream(self, state: Umt5State, rows: Sequence[Ids]) -> list[Tensor]:
        """Apply one layer after another to all prompts; of the embeddings, only rows are read."""
        _check_ids(rows, state.config)
        hidden = [x.to(self._device).float() for x in _look_up(state, rows, self._dtype)]
        for index in range(state.config.layers):
            hidden = self._apply_layer(state, index, hidden)
        norm = RmsNorm(state.config.width, state.config.eps).to(self._device)
        norm.weight.copy_(dense(state.read("norm.weight")))
        return [norm(x).to(self._dtype)[0] for x in hidden]

    def _apply_layer(self, state: Umt5State, index: int, hidden: Sequence[Tensor]) -> list[Tensor]:
        """Read a layer, apply it and drop it."""
        make = partial(Umt5Layer, state.config)
        layer = build(make, state.layer(index), self._device, self._dtype)
        return [layer(x) for x in hidden]

    def _key(self, ids: Ids) -> str:
        """Return the name of an embedding: a digest of all that its bits depend on."""
        device = self._device
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        versions = [__version__, torch.__version__]
        parts = [self._identity, versions, machine, str(self._dtype), ids]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@lru_cache(maxsize=8)
def distance_buckets(length: int, count: int, farthest: int) -> Int[Tensor, "n n"]:
    """Return the bucket of the distance from each token to each other one, on the CPU.

    Half of the buckets are for later tokens. Of each half, one half has a distance each, the other
    covers growing ranges of distances up to `farthest` (Raffel et al. 2019, arXiv 1910.10683).
    """
    where = torch.arange(length)
    distance = where[None] - where[:, None]
    half = count // 2
    near = half // 2
    apart = distance.abs()
    far = torch.log(apart.clamp(min=1).float() / near) / math.log(farthest / near) * (half - near)
    bucket = torch.where(apart < near, apart, (near + far.long()).clamp(max=half - 1))
    return bucket + half * (distance > 0)


def _look_up(state: Umt5State, rows: Sequence[Ids], dtype: torch.dtype) -> list[Tensor]:
    """Return the embeddings `[1 n d]` of each row; a mapped file is read at these places only."""
    table = state.read("embed.weight")
    indices = [torch.tensor(ids) for ids in rows]
    if isinstance(table, QuantizedWeight):
        return [table.select(index).dequantize(dtype)[None] for index in indices]
    return [table[index].to(dtype)[None] for index in indices]


def _check_ids(rows: Sequence[Ids], config: Umt5Config) -> None:
    """Raise CheckpointError for tokens that the encoder does not know."""
    highest = max(max(ids) for ids in rows)
    if highest >= config.vocabulary:
        raise CheckpointError(
            f"The text encoder knows {config.vocabulary} tokens, its vocabulary more "
            f"({highest + 1}).",
            hint="They belong to different models.",
        )


def _files_identity(paths: Sequence[Path]) -> str:
    """Return paths, sizes and times of change of weight files. Raises CheckpointError."""
    rows: list[tuple[str, int, int, int]] = []
    for file in (file.resolve() for path in paths for file in weight_paths(path)):
        try:
            stat = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error}).") from error
        rows.append((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return json.dumps(rows)
