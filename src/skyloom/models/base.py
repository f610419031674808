"""Interfaces of a model's parts (text encoder, autoencoder, transformer), and the whole model.

Everything above `models` uses these interfaces only; each family implements them in its folder.
Latents are normalised, `[b c t h w]`; sigma 1 is noise and 0 is data (diffusion/flow.py).
"""

from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from threading import Lock
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from skyloom.core.errors import CheckpointError
from skyloom.core.types import ScaleFactors
from skyloom.models.attention import KvCache
from skyloom.models.block_streamer import BlockStreamer
from skyloom.models.family import Prediction
from skyloom.models.memory import ModelMemory, PartName, Rung
from skyloom.models.registry import DEFAULT_MODEL, REPAIR, ModelInfo, family_module, find_model

AttentionMode = Literal["bidirectional", "causal"]
_TAKE_TURNS: tuple[Rung, ...] = ("swapped", "tiled")


@dataclass(frozen=True)
class TextContext:
    """Encoded prompts, padded with zeros.

    pooled: None for a text encoder without pooled vectors. truncated: number of dropped tokens per
    prompt. truncated_text: the first dropped words per prompt; empty if they are not known.
    """

    context: Float[Tensor, "b m d"]
    context_mask: Bool[Tensor, "b m"]
    pooled: Float[Tensor, "b p"] | None
    truncated: tuple[int, ...]
    truncated_text: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextCondition:
    """Prompt projected for every layer; keys and values are `[b heads m c]`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    bias: Float[Tensor, "b 1 1 m"] | None
    pooled: Float[Tensor, "b d"] | None
    attributes: Float[Tensor, "b s"] | None = None


@runtime_checkable
class Part(Protocol):
    """A network that knows the precision of its own layers."""

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights to a device, for inference; layers that tolerate it get `dtype`."""
        ...


@runtime_checkable
class TextEncoder(Part, Protocol):
    """Encodes prompts."""

    def encode(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts one at a time: results do not depend on the batch."""
        ...


@runtime_checkable
class Autoencoder(Part, Protocol):
    """Encodes videos to latents and decodes them."""

    @property
    def scale(self) -> ScaleFactors:
        """Number of frames and pixels per latent cell."""
        ...

    @property
    def latent_channels(self) -> int:
        """Number of channels of a latent."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    def encode(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b c u y x"]:
        """Encode pixels in [-1, 1] to a normalised latent.

        The first latent frame covers the first video frame alone: t = 1 + k * `scale.time`.
        """
        ...

    def decode(self, latent: Float[Tensor, "b c u y x"]) -> Float[Tensor, "b 3 t h w"]:
        """Decode to pixels in about [-1, 1] (not clamped)."""
        ...

    def decode_step(
        self, latent: Float[Tensor, "b c u y x"], cache: Any
    ) -> tuple[Float[Tensor, "b 3 t h w"], Any]:
        """Decode the next window; return its pixels and the cache for the window after it.

        cache: None for the first window, whose first latent frame covers one video frame; every
        other one covers `scale.time`. The returned cache is never None. Windows decoded in order
        equal the video decoded whole.
        """
        ...


@runtime_checkable
class Previewer(Protocol):
    """An autoencoder that makes coarse pictures of latents in far less time than it decodes."""

    def preview(self, latent: Float[Tensor, "c y x"]) -> Float[Tensor, "3 h w"] | None:
        """Return the pixels of a latent frame in about [-1, 1]; None if they are not known yet."""
        ...


@runtime_checkable
class Transformer(Part, Protocol):
    """Predicts the denoising direction of every latent frame."""

    @property
    def prediction(self) -> Prediction:
        """What the output is; `diffusion.flow.to_velocity` converts it."""
        ...

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Precision of latents and text that it takes."""
        ...

    @property
    def uncached_frame_offset(self) -> int:
        """Index given to the first latent frame of a window inside a video without a cache."""
        ...

    def prepare_text(
        self,
        context: Float[Tensor, "b m k"],
        context_mask: Bool[Tensor, "b m"] | None = None,
        pooled: Float[Tensor, "b p"] | None = None,
    ) -> TextCondition:
        """Project a prompt once for all layers and steps; masked tokens are not attended to."""
        ...

    def __call__(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition | TextContext,
        *,
        cache: KvCache | None = None,
        span: Float[Tensor, "b t"] | None = None,
        frame_indices: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b c t h w"]:
        """Predict a window; with a cache, it follows the cached latent frames.

        text: prepared by `prepare_text`; encoded prompts are prepared first.
        span: step size of a few-step student; None for the teacher. frame_indices: indices of the
        latent frames in their video; by default they follow the cached ones.
        """
        ...

    def extend_cache(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        cache: KvCache,
        span: Float[Tensor, "b t"] | None = None,
    ) -> KvCache:
        """Append a finished window to the cache, stored at the noise level `sigma`."""
        ...


class DenoisingNetwork(nn.Module):
    """Base class of transformers: properties that follow from the config and the head."""

    config: Any
    head: nn.Linear | nn.Conv2d
    blocks: nn.ModuleList

    def __init__(self) -> None:
        super().__init__()
        self._streamers: list[BlockStreamer[Any]] = []  # shared with views that have LoRAs

    @property
    def running_blocks(self) -> Iterable[Any]:
        """The blocks in order, each with its weights on the device while it is the current one."""
        for streamer in self._streamers:
            return (own for _, own in zip(streamer, self.blocks, strict=True))
        return self.blocks

    def stream_blocks(self, device: torch.device | None) -> None:
        """Keep the weights of the blocks in host memory and all others on a device.

        None ends it; the blocks stay in host memory then. Networks without `blocks` cannot.
        """
        while self._streamers:
            self._streamers.pop().close()
        if device is None:
            return
        in_blocks = {id(one) for one in (*self.blocks.parameters(), *self.blocks.buffers())}
        for weight in (*self.parameters(), *self.buffers()):
            if id(weight) not in in_blocks:
                weight.data = weight.data.to(device)
        self._streamers.append(BlockStreamer(tuple(self.blocks), device))

    @property
    def prediction(self) -> Prediction:
        """What the output is."""
        return self.config.prediction

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.head.weight.dtype

    @property
    def uncached_frame_offset(self) -> int:
        """Index of the first latent frame of a window inside a video without a cache."""
        return 0

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device for inference, all weights in `dtype`."""
        self.eval().to(device, dtype)


@runtime_checkable
class SoundModel(Protocol):
    """Makes the sound of generated latent frames: the optional second modality of a family."""

    @property
    def rate(self) -> int:
        """Samples per second."""
        ...

    @property
    def channels(self) -> int:
        """Number of channels: 1, 2 or 6."""
        ...

    def generate(
        self, latent: Float[Tensor, "1 c t h w"], text: TextCondition, samples: int, seed: int
    ) -> Float[Tensor, "channels samples"]:
        """Make exactly `samples` samples in [-1, 1] for the shown frames of a window."""
        ...


@runtime_checkable
class ClipReader(Protocol):
    """Classifies the content of a clip; used to compare windows and to recognise subjects."""

    def labels(self, category: str) -> tuple[str, ...]:
        """Return the labels of a category, such as "noun", in the order of its scores.

        The label "none" stands for the absence of a colour or direction.
        """
        ...

    def choose_frames(self, total: int) -> Sequence[int]:
        """Return the indices of the frames that it looks at, in a clip of `total` frames."""
        ...

    def features(self, frames: UInt8[Tensor, "t h w c"]) -> Float[Tensor, "u d"]:
        """Return feature vectors of frames spread over the clip, in fp32 on the CPU."""
        ...

    def scores(self, frames: UInt8[Tensor, "t h w c"]) -> Mapping[str, Float[Tensor, " k"]]:
        """Return the scores of every category's labels, from 0 to 1."""
        ...


@dataclass(frozen=True)
class NetworkCost:
    """Sizes from which time and memory of a generation are estimated.

    scale, latent_channels: of the autoencoder. patch: latent cells per token (time, height, width).
    token_flops: floating-point operations of one call per token. key_flops: further ones per token
    and attended token. token_bytes: live bytes of activations per token. memory: from which the
    places of the parts are planned; None for a family whose models are small.
    """

    scale: ScaleFactors
    latent_channels: int
    patch: tuple[int, int, int]
    token_flops: float
    key_flops: float
    token_bytes: int
    memory: ModelMemory | None = None


@runtime_checkable
class FamilyLoader(Protocol):
    """Functions of a family's module `load`; each raises CheckpointError for a damaged folder."""

    def load(self, info: ModelInfo, device: torch.device, dtype: torch.dtype) -> "ModelBundle":
        """Load all parts of a model."""
        ...

    def load_autoencoder(
        self, info: ModelInfo, device: torch.device, dtype: torch.dtype
    ) -> Autoencoder:
        """Load the autoencoder alone."""
        ...

    def load_clip_reader(self, info: ModelInfo) -> ClipReader | None:
        """Load the model's clip reader; None if it has none."""
        ...

    def read_network_cost(self, info: ModelInfo) -> NetworkCost:
        """Read the cost of the networks from their configs, without weights."""
        ...


def _all_resident() -> dict[PartName, Rung]:
    return {"text_encoder": "resident", "transformer": "resident", "autoencoder": "resident"}


@runtime_checkable
class LayeredEncoder(Protocol):
    """A text encoder that reads its weights when it needs them.

    streamed: one layer at a time for each call, instead of keeping all.
    """

    streamed: bool

    def free(self) -> None:
        """Drop the weights until they are needed again."""
        ...


@runtime_checkable
class TiledDecoder(Protocol):
    """An autoencoder that can decode in tiles, with less memory; seams may be seen."""

    def tile(self, on: bool) -> None:
        """Decode in tiles from now on, or whole frames again."""
        ...


@dataclass
class ModelBundle:
    """A loaded model: its parts, and where they lie.

    rungs: how each part is placed (models/memory.py). sound: None for a family without sound.
    """

    info: ModelInfo
    text_encoder: TextEncoder
    autoencoder: Autoencoder
    transformer: Transformer
    device: torch.device
    dtype: torch.dtype
    sound: SoundModel | None = None
    rungs: dict[PartName, Rung] = field(default_factory=_all_resident)
    _uses: Counter[str] = field(default_factory=Counter[str], repr=False)
    _there: set[PartName] = field(default_factory=set[PartName], repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    @classmethod
    def load(
        cls,
        info: ModelInfo,
        device: torch.device,
        dtype: torch.dtype,
        *,
        rungs: Mapping[PartName, Rung] | None = None,
    ) -> "ModelBundle":
        """Load the parts of a model. Raises CheckpointError for damaged weights.

        With `rungs`, parts are loaded into host memory and moved where these say.
        """
        home = device if rungs is None else torch.device("cpu")
        bundle = find_loader(info).load(info, home, dtype)
        bundle.device = device
        if rungs is not None:
            bundle.rungs = dict.fromkeys(rungs, "swapped")
            bundle.arrange(rungs)
        return bundle

    @cached_property
    def clip_reader(self) -> ClipReader | None:
        """The model's clip reader, loaded on first use; None if it has none."""
        return find_loader(self.info).load_clip_reader(self.info)

    def arrange(self, rungs: Mapping[PartName, Rung]) -> None:
        """Place the parts differently; those that leave the device go first.

        Not while a part is in use. Results are the same, up to tiles of the autoencoder.
        """
        with self._lock:
            changed = [one for one in rungs.items() if one[1] != self.rungs[one[0]]]
            for part, rung in sorted(changed, key=lambda one: one[1] == "resident"):
                self.rungs[part] = rung
                self._settle(part)

    @contextmanager
    def use(self, part: PartName) -> Generator[Any]:
        """Have a part ready to run within the block.

        Swapped parts that are not in use go to host memory first. A part stays until another one
        is used; the text encoder does not. Blocks may be nested and run in several threads.
        """
        with self._lock:
            for other in self._there - {part}:
                if not self._uses[other]:
                    self._move_away(other)
            if self.rungs[part] in _TAKE_TURNS and part not in self._there:
                self._network(part).place(self.device, self.dtype)
                self._there.add(part)
            self._uses[part] += 1
        try:
            yield self._network(part)
        finally:
            with self._lock:
                self._uses[part] -= 1
                if part == "text_encoder" and part in self._there and not self._uses[part]:
                    self._move_away(part)

    def bytes_on(self, device_type: str) -> int:
        """Return the bytes of the parts' weights on devices of a type."""
        return sum(
            weight.nbytes
            for network in (self.text_encoder, self.transformer, self.autoencoder)
            if isinstance(network, nn.Module)
            for weight in (*network.parameters(), *network.buffers())
            if weight.device.type == device_type
        )

    def _network(self, part: PartName) -> Part:
        return getattr(self, part)

    def _settle(self, part: PartName) -> None:
        """Put a part where its new rung says."""
        rung = self.rungs[part]
        network = self._network(part)
        if isinstance(network, LayeredEncoder):
            network.streamed = rung == "streamed"
            network.free()
        if isinstance(network, DenoisingNetwork):
            network.stream_blocks(None)
        if isinstance(network, TiledDecoder):
            network.tile(rung == "tiled")
        if rung in _TAKE_TURNS or rung == "host" or isinstance(network, DenoisingNetwork):
            self._move_away(part)
        if rung == "streamed" and isinstance(network, DenoisingNetwork):
            network.stream_blocks(self.device)
        elif rung in ("resident", "streamed"):
            network.place(self.device, self.dtype)

    def _move_away(self, part: PartName) -> None:
        network = self._network(part)
        if isinstance(network, LayeredEncoder):
            network.free()
        network.place(torch.device("cpu"), self.dtype)
        self._there.discard(part)


def find_loader(info: ModelInfo) -> FamilyLoader:
    """Import the loader of a model's family. Raises CheckpointError for an unknown family."""
    return cast(FamilyLoader, family_module(info.family, "load"))


def load_clip_reader(info: ModelInfo | None = None) -> ClipReader:
    """Load a model's clip reader or, if it has none, the default model's.

    Raises CheckpointError for a damaged one.
    """
    default = find_model(DEFAULT_MODEL)
    for model in (info or default, default):
        reader = find_loader(model).load_clip_reader(model)
        if reader is not None:
            return reader
    raise CheckpointError(f"{DEFAULT_MODEL} must have a clip reader, got none.", hint=REPAIR)


def as_condition(text: TextCondition | TextContext, transformer: Transformer) -> TextCondition:
    """Return the prepared text; encoded prompts are prepared, a single one without padding."""
    if isinstance(text, TextCondition):
        return text
    if len(text.context) == 1:
        return prepare_prompt(text, 0, transformer)
    context = text.context.to(transformer.device, transformer.dtype)
    mask = text.context_mask.to(transformer.device)
    pooled = text.pooled
    if pooled is not None:
        pooled = pooled.to(transformer.device, transformer.dtype)
    return transformer.prepare_text(context, mask, pooled)


def prepare_prompt(text: TextContext, row: int, transformer: Transformer) -> TextCondition:
    """Prepare one of the encoded prompts, without its padding."""
    where = (transformer.device, transformer.dtype)
    length = int(text.context_mask[row].sum())
    context = text.context[row : row + 1, :length].to(*where)
    pooled = None if text.pooled is None else text.pooled[row : row + 1].to(*where)
    return transformer.prepare_text(context, None, pooled)
