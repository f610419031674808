# pyright: basic
"""Decode windows one after another, in constant memory, while the next one is sampled."""

from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.errors import NumericsError
from skyloom.core.types import VideoShape
from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.temporal_smoothing import smooth_latent
from skyloom.generate.windows import Window
from skyloom.media.frames import to_frames
from skyloom.models.base import Autoencoder


@dataclass(frozen=True, eq=False)
class _DecoderState:
    """The decoder's cache and the last decoded latent frame."""

    cache: Any
    last: Tensor


@dataclass(frozen=True, eq=False)
class _TrialDecode:
    """A window decoded on trial: frames per chunk, and the decoder's state after it."""

    latent: Tensor
    chunks: list[Tensor]
    after: _DecoderState | None


@dataclass
class StreamingDecoder:
    """Decodes windows in chunks on a background thread; `ready` yields the frames in order.

    The latent of a window holds the latent frames that the window generated.

    Latent frames are smoothed over time at `smoothing_level` (generate/temporal_smoothing.py),
    except for `known` ones: pairs of (shot, latent frame).
    """

    autoencoder: Autoencoder
    executor: DeterministicExecutor
    smoothing_level: float = 0.0
    known: Collection[tuple[int, int]] = frozenset()
    _state: _DecoderState | None = None
    _chunks: list[Future[Tensor]] = field(default_factory=list)
    _trials: list[_TrialDecode] = field(default_factory=list)

    def put(self, latent: Float[Tensor, "1 c t h w"], window: Window) -> None:
        """Queue the next window. A latent that was decoded on trial is not decoded again."""
        trial = next((one for one in self._trials if _is_same(one.latent, latent)), None)
        self._trials.clear()
        if trial is not None:
            self._state = trial.after
            for chunk in trial.chunks:
                self._chunks.append(self.executor.submit(partial(_identity, chunk)))
            return
        for first, end in window.decode_chunks:
            chunk = _chunk(latent, window, first, end)
            self._chunks.append(self.executor.submit(partial(self._decode, chunk, window, first)))

    def decode_trial(
        self, latent: Float[Tensor, "1 c t h w"], window: Window
    ) -> UInt8[Tensor, "t h w c"]:
        """Decode a window without changing the decoder's state.

        `put` reuses the result if it gets the same tensor, or the same part of one.
        """
        for one in self._trials:
            if _is_same(one.latent, latent):
                return torch.cat(one.chunks)
        # calls run in order, so every queued window is decoded before this one
        self._trials.append(self.executor.submit(partial(self._try, latent, window)).result())
        return torch.cat(self._trials[-1].chunks)

    def ready(self, *, max_pending: int | None = None) -> Iterator[UInt8[Tensor, "t h w c"]]:
        """Yield decoded frames; block while more than `max_pending` chunks are not decoded."""
        while self._chunks and (
            self._chunks[0].done() or (max_pending is not None and len(self._chunks) > max_pending)
        ):
            yield self._chunks.pop(0).result()

    def _try(self, latent: Tensor, window: Window) -> _TrialDecode:
        state = self._state
        chunks: list[Tensor] = []
        for first, end in window.decode_chunks:
            chunk = _chunk(latent, window, first, end)
            frames, state = self._decode_chunk(chunk, window, first, state)
            chunks.append(frames)
        return _TrialDecode(latent, chunks, state)

    def _decode(self, latent: Tensor, window: Window, first: int) -> Tensor:
        frames, self._state = self._decode_chunk(latent, window, first, self._state)
        return frames

    def _decode_chunk(
        self, latent: Tensor, window: Window, first: int, state: _DecoderState | None
    ) -> tuple[Tensor, _DecoderState | None]:
        """The displayed frames of a chunk and the next state, which uncached chunks leave as is."""
        before = state if first else None
        known = [
            number
            for number in range(latent.shape[2])
            if (window.shot, first + number) in self.known
        ]
        smooth = smooth_latent(
            latent, None if before is None else before.last, self.smoothing_level, known
        )
        pixels, cache = self.autoencoder.decode_step(
            smooth.to(self.autoencoder.device), None if before is None else before.cache
        )
        if first < window.cache_until:
            state = _DecoderState(cache, smooth[:, :, -1])
        frames = to_frames(pixels[0]).cpu()
        begin = self.autoencoder.scale.video_frames(first) if first else 0
        start, stop = window.display_range
        return frames[max(0, start - begin) : max(0, stop - begin)], state


def check_decoder(
    autoencoder: Autoencoder, executor: DeterministicExecutor, shape: VideoShape
) -> None:
    """Decode one latent frame of a video's size, to fail before sampling and not after it.

    Raises NumericsError for pixels that are not finite.
    """
    size = autoencoder.scale.latent_shape(shape)
    latent = torch.zeros(1, autoencoder.latent_channels, 1, size.height, size.width)

    def decode() -> Tensor:
        return autoencoder.decode_step(latent.to(autoencoder.device), None)[0]

    pixels = executor.run_one(decode)
    if not pixels.float().sum().isfinite():
        raise NumericsError(
            "The autoencoder gave pixels that are not finite.",
            hint="Its weights may be damaged: run skyloom models verify.",
        )


def _chunk(latent: Tensor, window: Window, first: int, end: int) -> Tensor:
    """Latent frames [first, end) of the generated latent of a window."""
    begin = window.generated[0]
    return latent[:, :, first - begin : end - begin]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same elements."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _identity(frames: Tensor) -> Tensor:
    return frames
