"""Spacetime transformer of the first diorama model: Wan's blocks and what a small model needs.

The same weights attend bidirectionally or causally in windows of `config.window` latent frames;
only the attention mask differs.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from skyloom.models.attention import KvCache, block_causal_mask, mask_bias
from skyloom.models.base import (
    AttentionMode,
    DenoisingNetwork,
    Prediction,
    TextCondition,
    TextContext,
    as_condition,
)
from skyloom.models.diorama.v1.refiner import Detail
from skyloom.models.embeddings import (
    PlaceEmbedding,
    Sketch,
    SpanEmbedding,
    TextProjection,
    TimeEmbedding,
    place_waves,
)
from skyloom.models.rope import window_angles
from skyloom.models.transformer_block import (
    Block,
    modulate,
    modulation_table,
    normalise,
    patchify,
    run_blocks,
    text_condition,
    unpatchify,
)


@dataclass(frozen=True)
class DitConfig:
    """Sizes, and options that Wan's models do not have.

    pooled_text: add the pooled prompt to the time embedding.
    span: embed the step size, for a few-step student in the same weights.
    places: add an absolute position embedding to every token.
    sketch: width of the prompt attributes (the last pooled channels) from which the mean latent is
        predicted; 0 turns it off.
    horizon: latent frames that the mean latent covers; later positions are numbered after it.
    detail, detail_blocks: width and number of blocks of the latent refiner; width 0 turns it off.
    """

    in_channels: int
    out_channels: int
    width: int
    heads: int
    layers: int
    ffn: int
    text_width: int
    patch: tuple[int, int, int] = (1, 2, 2)
    frequency_width: int = 256
    pooled_text: bool = False
    pooled_width: int | None = None
    span: bool = False
    places: bool = False
    sketch: int = 0
    horizon: int = 0
    detail: int = 0
    detail_blocks: int = 2
    prediction: Prediction = "velocity"
    window: int = 3
    rope_theta: float = 10000.0
    eps: float = 1e-6

    @property
    def head_width(self) -> int:
        """Number of channels of one head."""
        return self.width // self.heads


class Dit(DenoisingNetwork):
    """Predict velocity, clean estimate or angular target, as `config.prediction` names."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        patch = math.prod(config.patch)
        self.patch = nn.Linear(config.in_channels * patch, config.width)
        self.time = TimeEmbedding(config.frequency_width, config.width)
        self.text = TextProjection(config.text_width, config.width)
        self.pooled = (
            nn.Linear(config.pooled_width or config.text_width, config.width)
            if config.pooled_text
            else None
        )
        self.span = SpanEmbedding(config.frequency_width, config.width) if config.span else None
        self.places = PlaceEmbedding(config.width) if config.places else None
        self.sketch = (
            Sketch(config.sketch, config.width, config.out_channels * patch)
            if config.sketch
            else None
        )
        self.blocks = nn.ModuleList(
            Block(config.width, config.heads, config.ffn, config.eps) for _ in range(config.layers)
        )
        self.table = nn.Parameter(modulation_table(2, config.width))
        self.head = nn.Linear(config.width, config.out_channels * patch)
        if not self.table.is_meta:
            _initialise(self)
        self.detail = _detail(config) if config.detail else None

    @property
    def uncached_frame_offset(self) -> int:
        """Index of the first latent frame of a window inside a video without a cache."""
        return self.config.horizon

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def prepare_text(
        self,
        context: Float[Tensor, "b m k"],
        context_mask: Bool[Tensor, "b m"] | None = None,
        pooled: Float[Tensor, "b p"] | None = None,
    ) -> TextCondition:
        """Project a prompt once for all layers and steps; masked tokens are not attended to."""
        projected = self.text(context)
        vector = None if self.pooled is None or pooled is None else self.pooled(pooled)
        attributes = None
        if self.sketch is not None and pooled is not None:
            attributes = pooled[:, -self.config.sketch :]
        return text_condition(self.running_blocks, projected, context_mask, vector, attributes)

    def draw_sketch(
        self, attributes: Float[Tensor, "b s"], frames: int, height: int, width: int
    ) -> Float[Tensor, "b o t h w"]:
        """Predict the mean clean latent of a prompt's videos."""
        assert self.sketch is not None
        rows = height // self.config.patch[1]
        columns = width // self.config.patch[2]
        positions = place_waves(torch.arange(frames, device=attributes.device), rows, columns)
        drawn = self.sketch(attributes, positions)
        return unpatchify(drawn, self.config.patch, (frames, rows, columns))

    def forward(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition | TextContext,
        *,
        attention_mode: AttentionMode = "bidirectional",
        cache: KvCache | None = None,
        span: Float[Tensor, "b t"] | None = None,
        frame_indices: Int[Tensor, " t"] | None = None,
    ) -> Float[Tensor, "b o t h w"]:
        """Predict every latent frame; with a cache, `latent` is the window after the cached frames.

        span: None predicts the velocity at `sigma`; else the student's mean velocity from `sigma`
        to `sigma - span`, guidance included. frame_indices: indices of the latent frames in their
        video; by default they follow the cached ones.
        """
        return self._run(
            latent,
            sigma,
            as_condition(text, self),
            attention_mode=attention_mode,
            cache=cache,
            span=span,
            frame_indices=frame_indices,
        )[0]

    def extend_cache(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        cache: KvCache,
        span: Float[Tensor, "b t"] | None = None,
        frame_indices: Int[Tensor, " t"] | None = None,
    ) -> KvCache:
        """Append a finished window to the cache, stored at the noise level `sigma`."""
        return self._run(
            latent,
            sigma,
            text,
            attention_mode="causal",
            cache=cache,
            span=span,
            frame_indices=frame_indices,
        )[1]

    def _run(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        text: TextCondition,
        *,
        attention_mode: AttentionMode,
        cache: KvCache | None,
        span: Float[Tensor, "b t"] | None,
        frame_indices: Int[Tensor, " t"] | None,
    ) -> tuple[Float[Tensor, "b o t h w"], KvCache]:
        """Forward pass; rotary time positions start at the first cached frame."""
        config = self.config
        _, _, frames, height, width = latent.shape
        rows = height // config.patch[1]
        columns = width // config.patch[2]
        tokens = rows * columns
        x = self.patch(patchify(latent.to(self.patch.weight.dtype), config.patch)).to(
            self.patch.weight.dtype
        )
        past = cache or KvCache(sink=0, recent=0)
        x = self._placed(x, text, past, (frames, rows, columns), frame_indices)
        embedded = self.time(sigma)
        if text.pooled is not None:
            embedded = embedded + text.pooled[:, None]
        if span is not None:
            assert self.span is not None, "only a model with a student accepts a span"
            embedded = embedded + self.span(span)
        modulation = self.time.modulation(embedded)
        angles = window_angles(
            past.frames + frames,
            rows,
            columns,
            head_width=config.head_width,
            theta=config.rope_theta,
            device=x.device,
            dtype=x.dtype,
        )
        bias = None
        if attention_mode == "causal" and cache is None:
            bias = mask_bias(block_causal_mask(frames, config.window, tokens, latent.device))
        x, keys, values = run_blocks(
            self.running_blocks,
            x,
            modulation,
            text,
            past=past,
            angles=angles,
            bias=bias,
            keep=cache is not None,
        )
        shift, scale = (self.table + embedded[:, :, None]).unbind(2)
        features = modulate(normalise(x, config.eps), shift, scale)
        out = unpatchify(self.head(features), config.patch, (frames, rows, columns))
        if self.detail is not None:
            out = self.detail(out, latent, features, embedded)
        after = past.extended(keys, values, frames) if cache is not None else past
        return out, after

    def _placed(
        self,
        x: Tensor,
        text: TextCondition,
        past: KvCache,
        grid: tuple[int, int, int],
        frame_indices: Tensor | None,
    ) -> Tensor:
        """Add position embeddings to the tokens and, up to the horizon, the mean latent."""
        frames, rows, columns = grid
        horizon = self.config.horizon
        local = torch.arange(frames, device=x.device) + past.frames
        early = torch.ones_like(local, dtype=torch.bool)
        if horizon:
            if frame_indices is None:
                frame_indices = torch.arange(frames, device=x.device) + past.seen
            early = frame_indices < horizon
            local = torch.where(early, frame_indices, local + horizon)
        where = place_waves(local, rows, columns).to(x.dtype)
        if self.places is not None:
            x = x + self.places(where)
        if self.sketch is not None and text.attributes is not None and bool(early.any()):
            drawn = self.sketch.into(self.sketch(text.attributes.to(x.dtype), where))
            x = x + drawn * early.to(x.dtype).repeat_interleave(rows * columns)[:, None]
        return x


def _detail(config: DitConfig) -> Detail:
    return Detail(
        config.out_channels, config.width, config.detail, config.patch, config.detail_blocks
    )


@torch.no_grad()
def _initialise(dit: Dit) -> None:
    """Xavier matrices, scaled-down residual branches, zero head."""
    for module in dit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for linear in (
        dit.time.inner,
        dit.time.outer,
        dit.text.inner,
        dit.text.outer,
        dit.time.to_modulation,
    ):
        nn.init.normal_(linear.weight, std=0.02)
    for block in dit.layers:
        for linear in (block.out, block.cross.out, block.down):
            linear.weight.mul_((2 * len(dit.layers)) ** -0.5)
    if dit.pooled is not None:
        nn.init.zeros_(dit.pooled.weight)
    if dit.span is not None:
        nn.init.zeros_(dit.span.outer.weight)
    if dit.places is not None:
        nn.init.zeros_(dit.places.outer.weight)
    if dit.sketch is not None:
        nn.init.zeros_(dit.sketch.into.weight)
    nn.init.zeros_(dit.head.weight)
