# pyright: basic
"""Sample a video of any length window by window, in constant memory.

The first window has the model's native length and is sampled in one pass. Later windows attend to
cached keys and values of the first latent frames and of those right before the window (attention
sink and recent frames: Xiao et al. 2023, arXiv 2309.17453; keys are cached without rotary
embedding and get window-local positions). Noise is drawn per window, so a frame does not depend on
the length of the video. While one window is sampled, the previous one is decoded.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.seeds import chain_frames, noise
from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.flow import add_noise
from skyloom.diffusion.sampling import SampleStep, sample_euler
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.resume import FinishedWindow, WindowStore
from skyloom.generate.temporal_smoothing import smooth_latent
from skyloom.media.frames import to_frames
from skyloom.models.diorama.v1.autoencoder import DecoderCache, Vae
from skyloom.models.registry import Rollout

DECODE_FRAMES = 3  # latent frames per call of the decoder


@dataclass(frozen=True)
class Window:
    """Latent frames [start, stop) of a shot, sampled together.

    Latent frames before `decode_until` are decoded; those before `cache_until` are cached for
    later windows. `display_range` is the (first, end) video frames of the shot to output; None
    outputs all decoded frames. `card` is the storyboard card of the window; `prompt_fade` is the
    weight of the previous card's prompt per latent frame.
    """

    index: int
    start: int
    stop: int
    decode_until: int
    cache_until: int
    display_range: tuple[int, int] | None = None
    shot: int = 0
    card: int = 0
    prompt_fade: tuple[float, ...] = ()

    @property
    def decode_chunks(self) -> tuple[tuple[int, int], ...]:
        """Ranges of latent frames per decoder call; none mixes cached and uncached frames."""
        cached = min(self.cache_until, self.decode_until)
        runs = ((self.start, cached), (cached, self.decode_until))
        return tuple(
            (first, min(first + DECODE_FRAMES, end))
            for begin, end in runs
            for first in range(begin, end, DECODE_FRAMES)
        )


def make_windows(frames: int, native: int, rollout: Rollout | None) -> tuple[Window, ...]:
    """The windows of `frames` latent frames, for a model that samples `native` of them at once."""
    if rollout is None or frames <= native:
        return (Window(0, 0, frames, decode_until=frames, cache_until=frames),)
    count = -(-(frames - native) // rollout.window)
    edges = [0, *(native + rollout.window * index for index in range(count + 1))]
    return tuple(
        Window(index, start, stop, decode_until=min(stop, frames), cache_until=stop)
        for index, (start, stop) in enumerate(pairwise(edges))
    )


@dataclass(frozen=True)
class WindowScore:
    """A critic's result. `score` is the worst measure divided by its bound: above 1 it fails."""

    score: float
    measures: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"score": self.score, "measures": dict(self.measures)}


class Critic(Protocol):
    """Scores a window by its frames. Must be deterministic."""

    @property
    def bounds(self) -> Mapping[str, float]:
        """Largest accepted value per measure."""
        ...

    def __call__(
        self,
        frames: UInt8[Tensor, "t h w c"],
        first: UInt8[Tensor, "u h w c"] | None,
        before: UInt8[Tensor, "v h w c"],
    ) -> WindowScore:
        """Score a window.

        `first` is the first window of the card, None for that window itself; `before` are the
        frames right before the window in its shot, and may be empty.
        """
        ...


@dataclass(frozen=True, eq=False)
class WindowStep:
    """One sampler step of a window. The last step of the accepted take has a `result`."""

    window: Window
    step: SampleStep
    result: FinishedWindow | None = None

    @property
    def finished(self) -> Float[Tensor, "1 c t h w"] | None:
        """The window's clean latent, after its last step."""
        return None if self.result is None else self.result.latent


@dataclass(frozen=True, eq=False)
class SamplingSpec:
    """Sampling settings: windows, a canvas per window, noise levels and a seed.

    `set_prompt` is called before each window. `card_seeds` are seeds of single cards, by index.
    `store` holds windows and steps of an interrupted run, which are not sampled again.
    `noise_correlation` is the correlation between the noise of neighbouring latent frames.
    `score_window` rates a finished window: one with a score above 1 is sampled again with other
    noise, up to `retakes` times, and the take with the lowest score is kept.
    """

    windows: tuple[Window, ...]
    canvas_at: Callable[[Window], Canvas]
    sigmas: Float[Tensor, " n"]
    seed: int
    rollout: Rollout | None
    store: WindowStore | None = None
    set_prompt: Callable[[Window], None] | None = None
    card_seeds: Mapping[int, int] = field(default_factory=dict[int, int])
    noise_correlation: float = 0.0
    score_window: Callable[[Window, Tensor], WindowScore] | None = None
    retakes: int = 0

    @property
    def steps(self) -> int:
        """Sampler steps per window."""
        return len(self.sigmas) - 1

    def window_noise(
        self, window: Window, shape: tuple[int, ...], *purpose: str | int
    ) -> Float[Tensor, "..."]:
        """Noise of a window. For a card with its own seed it depends on that card only."""
        card_seed = self.card_seeds.get(window.card)
        if card_seed is None:
            return noise(self.seed, shape, "window", window.index, *purpose)
        number = sum(one.card == window.card for one in self.windows[: window.index])
        return noise(card_seed, shape, "card", number, *purpose)

    def initial_noise(
        self, window: Window, canvas: Canvas, take: int, last: Float[Tensor, "1 c h w"] | None
    ) -> Float[Tensor, "1 c t h w"]:
        """Noise that a take starts from, correlated with `last`, the noise before the window."""
        purpose = ("take", take) if take else ()
        fresh = self.window_noise(window, (1, *canvas.latent.shape), *purpose)
        return chain_frames(fresh, self.noise_correlation, last)

    def starts_new_noise_chain(self, window: Window, before: Window | None) -> bool:
        """Whether a window's noise is independent of the previous window's."""
        return (
            before is None
            or before.shot != window.shot
            or (before.card != window.card and window.card in self.card_seeds)
        )


def generate_windows(spec: SamplingSpec, denoiser: Denoiser) -> Iterator[WindowStep]:
    """Sample all windows in order and update the denoiser's cache. May be stopped at any step."""
    before: Window | None = None
    last: Tensor | None = None  # noise of the latent frame before the window
    for window, following in zip(spec.windows, (*spec.windows[1:], None), strict=True):
        if spec.set_prompt is not None:
            spec.set_prompt(window)
        canvas = spec.canvas_at(window)
        if spec.starts_new_noise_chain(window, before):
            last = None
        cached = window.cache_until - window.start
        for step in _sample_window(spec, window, denoiser, canvas, last=last):
            if step.result is not None and following is not None:
                if following.shot != window.shot:
                    denoiser.reset_cache()
                elif cached > 0:
                    assert spec.rollout is not None
                    context = _context_latent(step.result.latent, spec, window)
                    denoiser.cache_frames(context, spec.rollout, spec.rollout.context_sigma)
            if step.result is not None and cached > 0:
                start = spec.initial_noise(window, canvas, step.result.take, last)
                last = start[:, :, cached - 1]
            yield step
        before = window


def _sample_window(
    spec: SamplingSpec,
    window: Window,
    denoiser: Denoiser,
    canvas: Canvas,
    *,
    last: Float[Tensor, "1 c h w"] | None,
) -> Iterator[WindowStep]:
    """The steps of every take of a window; one step if the store has the finished window."""
    stored = None if spec.store is None else spec.store.load(window.index)
    if stored is not None:
        step = SampleStep(spec.steps - 1, spec.steps, stored.latent, stored.latent)
        yield WindowStep(window, step, stored)
        return
    takes: list[tuple[SampleStep, WindowScore | None]] = []
    while True:
        start = spec.initial_noise(window, canvas, len(takes), last)
        for step in _sample_take(spec, window, denoiser, canvas, start=start, take=len(takes)):
            end = step
            if step.index < spec.steps - 1:
                yield WindowStep(window, step)
        score = None if spec.score_window is None else spec.score_window(window, end.latent)
        takes.append((end, score))
        if score is None or score.score <= 1 or len(takes) > spec.retakes:
            break
        yield WindowStep(window, end)
    result, end = _best_take(takes)
    if spec.store is not None:
        spec.store.save(window.index, result)
    yield WindowStep(window, end, result)


def _sample_take(
    spec: SamplingSpec,
    window: Window,
    denoiser: Denoiser,
    canvas: Canvas,
    *,
    start: Float[Tensor, "1 c t h w"],
    take: int,
) -> Iterator[SampleStep]:
    """The remaining steps of one take; at least the last one."""
    resume_from = None if spec.store is None else spec.store.load_step(window.index, take)
    if resume_from is not None and resume_from[0] == spec.steps:
        yield SampleStep(spec.steps - 1, spec.steps, resume_from[1], resume_from[1])
        return
    for step in sample_euler(denoiser.velocity, start, spec.sigmas, canvas, resume_from):
        if spec.store is not None and (
            step.index < spec.steps - 1 or spec.score_window is not None
        ):
            spec.store.save_step(window.index, take, step.index + 1, step.latent)
        yield step


def _best_take(
    takes: Sequence[tuple[SampleStep, WindowScore | None]],
) -> tuple[FinishedWindow, SampleStep]:
    """The take with the lowest score; the first of equal ones."""
    scores = [0.0 if score is None else score.score for _, score in takes]
    best = scores.index(min(scores))
    end = takes[best][0]
    rows = [score.to_dict() for _, score in takes if score is not None]
    return FinishedWindow(end.latent, best, rows), end


def _context_latent(
    latent: Float[Tensor, "1 c t h w"], spec: SamplingSpec, window: Window
) -> Float[Tensor, "1 c t h w"]:
    """The latent frames to cache, re-noised to the rollout's `context_sigma`."""
    latent = latent[:, :, : window.cache_until - window.start]
    level = spec.rollout.context_sigma if spec.rollout else 0.0
    if not level:
        return latent
    fresh = spec.window_noise(window, tuple(latent.shape), "context")
    return add_noise(latent, fresh, torch.full((1, latent.shape[2]), level))


@dataclass(frozen=True, eq=False)
class _DecoderState:
    """The decoder's cache and the last decoded latent frame."""

    cache: DecoderCache
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

    Latent frames are smoothed over time at `smoothing_level` (generate/temporal_smoothing.py),
    except for `known` ones: pairs of (shot, latent frame).
    """

    vae: Vae
    executor: DeterministicExecutor
    device: torch.device
    smoothing_level: float = 0.0
    known: Collection[tuple[int, int]] = frozenset()
    _state: _DecoderState | None = None
    _chunks: list[Future[Tensor]] = field(default_factory=list)
    _trials: list[_TrialDecode] = field(default_factory=list)

    def put(self, latent: Float[Tensor, "1 c t h w"], window: Window) -> None:
        """Queue the next window. A latent that was decoded on trial is not decoded again."""
        trial = next((one for one in self._trials if one.latent is latent), None)
        self._trials.clear()
        if trial is not None:
            self._state = trial.after
            for chunk in trial.chunks:
                self._chunks.append(self.executor.submit(partial(_identity, chunk)))
            return
        for first, end in window.decode_chunks:
            chunk = latent[:, :, first - window.start : end - window.start]
            self._chunks.append(self.executor.submit(partial(self._decode, chunk, window, first)))

    def decode_trial(
        self, latent: Float[Tensor, "1 c t h w"], window: Window
    ) -> UInt8[Tensor, "t h w c"]:
        """Decode a window without changing the decoder's state.

        `put` reuses the result if it gets the same tensor.
        """
        for one in self._trials:
            if one.latent is latent:
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
            chunk = latent[:, :, first - window.start : end - window.start]
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
        pixels, cache = self.vae.decode_step(
            smooth.to(self.device), None if before is None else before.cache
        )
        if first < window.cache_until:
            state = _DecoderState(cache, smooth[:, :, -1])
        frames = to_frames(pixels[0]).cpu()
        if window.display_range is None:
            return frames, state
        begin = self.vae.config.scale.video_frames(first) if first else 0
        start, stop = window.display_range
        return frames[max(0, start - begin) : max(0, stop - begin)], state


def _identity(frames: Tensor) -> Tensor:
    return frames
