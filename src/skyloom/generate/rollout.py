"""Videos of any length, window by window, at constant memory.

The first window is as long as the clips that the model was trained on and is made in one go. Every later one sees
the keys and values of the video's first latent frames and of those right before it (a sink and a recent past:
Xiao et al. 2023, arXiv 2309.17453; keys are kept un-rotated and get window-local positions). Noise is drawn per
window, so that second 40 is the same however long the video becomes. While one window is being made, the one before
is decoded.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.seeds import chain_frames, noise
from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.flow import add_noise
from skyloom.diffusion.sampling import SampleStep, sample_euler
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.lanes import Lanes
from skyloom.generate.resume import WindowStore
from skyloom.media.frames import to_frames
from skyloom.models.registry import Rollout
from skyloom.models.vae import DecoderCache, Vae

DECODE_FRAMES = 3  # latent frames that are decoded at a time


@dataclass(frozen=True)
class Window:
    """Latent frames `start` to `stop` of a shot, made together: those before `wanted` are decoded, those before `kept`
    are remembered, and of what is decoded the frames `shown` (first, end; None: all) are.

    `card` is the card of a storyboard that it belongs to; `fade` how much the card before still says, per latent frame.
    """

    index: int
    start: int
    stop: int
    wanted: int
    kept: int
    shown: tuple[int, int] | None = None
    shot: int = 0
    card: int = 0
    fade: tuple[float, ...] = ()

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """The runs of latent frames that are decoded at a time; none holds kept ones and others."""
        firm = min(self.kept, self.wanted)
        runs = ((self.start, firm), (firm, self.wanted))
        return tuple(
            (first, min(first + DECODE_FRAMES, end))
            for begin, end in runs
            for first in range(begin, end, DECODE_FRAMES)
        )


def make_windows(frames: int, native: int, rollout: Rollout | None) -> tuple[Window, ...]:
    """The windows of a video of that many latent frames, when a model makes `native` in one go."""
    if rollout is None or frames <= native:
        return (Window(0, 0, frames, frames, frames),)
    count = -(-(frames - native) // rollout.window)
    edges = [0, *(native + rollout.window * index for index in range(count + 1))]
    return tuple(
        Window(index, start, stop, min(stop, frames), stop) for index, (start, stop) in enumerate(pairwise(edges))
    )


@dataclass(frozen=True, eq=False)
class WindowStep:
    """A step of a window's sampling; after the last one, `finished` holds the window's clean latent."""

    window: Window
    step: SampleStep
    finished: Float[Tensor, "1 c t h w"] | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """What a rollout makes: the windows, a canvas for each, the noise levels to go through, the seed.

    `speak` tells the denoiser what a window is to show, where that changes; `seeds` are cards' own, by card. Windows
    that a `store` has from an earlier run are not made again, new ones are kept in it. `correlation` is that of the
    noise of neighbouring latent frames that the model was trained with.
    """

    windows: tuple[Window, ...]
    canvas_at: Callable[[Window], Canvas]
    sigmas: Float[Tensor, " n"]
    seed: int
    rollout: Rollout | None
    store: WindowStore | None = None
    speak: Callable[[Window], None] | None = None
    seeds: Mapping[int, int] = field(default_factory=dict[int, int])
    correlation: float = 0.0

    def noise_for(self, window: Window, shape: tuple[int, ...], *purpose: str | int) -> Float[Tensor, "..."]:
        """Noise of a window. That of a card with a seed of its own hangs on nothing but this card."""
        own = self.seeds.get(window.card)
        if own is None:
            return noise(self.seed, shape, "window", window.index, *purpose)
        number = sum(one.card == window.card for one in self.windows[: window.index])
        return noise(own, shape, "card", number, *purpose)


def roll_out(job: Job, denoiser: Denoiser) -> Iterator[WindowStep]:
    """Sample all windows in order; may be left after any step."""
    before: Window | None = None
    last: Tensor | None = None  # noise of the latent frame before the window
    for window, following in zip(job.windows, (*job.windows[1:], None), strict=True):
        if job.speak is not None:
            job.speak(window)
        canvas = job.canvas_at(window)
        alone = (
            before is None or before.shot != window.shot or (before.card != window.card and window.card in job.seeds)
        )
        fresh = job.noise_for(window, (1, *canvas.latent.shape))
        start = chain_frames(fresh, job.correlation, None if alone else last)
        if window.kept > window.start:
            last = start[:, :, window.kept - window.start - 1]
        before = window
        for step in _make(job, window, denoiser, canvas, start):
            done = step.index == step.total - 1
            if done and job.store is not None:
                job.store.save(window.index, step.latent)
            if done and following is not None and following.shot != window.shot:
                denoiser.forget()
            elif done and following is not None and window.kept > window.start:
                assert job.rollout is not None
                denoiser.remember(_remembered(step.latent, job, window), job.rollout, job.rollout.context_sigma)
            yield WindowStep(window, step, step.latent if done else None)


def _make(
    job: Job, window: Window, denoiser: Denoiser, canvas: Canvas, start: Float[Tensor, "1 c t h w"]
) -> Iterator[SampleStep]:
    """The steps of one window; only the last one, if it was finished before."""
    steps = len(job.sigmas) - 1
    kept = None if job.store is None else job.store.load(window.index)
    if kept is not None:
        yield SampleStep(steps - 1, steps, kept, kept)
        return
    yield from sample_euler(denoiser.velocity, start, job.sigmas, canvas)


def _remembered(latent: Float[Tensor, "1 c t h w"], job: Job, window: Window) -> Float[Tensor, "1 c t h w"]:
    """What is kept of a finished window, as later ones see it: with a little noise of its own, if the model likes that
    better."""
    latent = latent[:, :, : window.kept - window.start]
    level = job.rollout.context_sigma if job.rollout else 0.0
    if not level:
        return latent
    own = job.noise_for(window, tuple(latent.shape), "context")
    return add_noise(latent, own, torch.full((1, latent.shape[2]), level))


@dataclass
class Projector:
    """Decodes windows to the frames that they show, a few at a time, on a lane of its own; `ready` hands frames out."""

    vae: Vae
    lanes: Lanes
    device: torch.device
    _cache: DecoderCache | None = None
    _parts: list[Future[Tensor]] = field(default_factory=list)

    def put(self, latent: Float[Tensor, "1 c t h w"], window: Window) -> None:
        """Hand in the next window."""
        for first, end in window.parts:
            part = latent[:, :, first - window.start : end - window.start]
            self._parts.append(self.lanes.submit(partial(self._decode, part, window, first)))

    def ready(self, *, most_waiting: int | None = None) -> Iterator[UInt8[Tensor, "t h w c"]]:
        """The frames that are done; waits for some while more than `most_waiting` parts are not."""
        while self._parts and (self._parts[0].done() or (most_waiting is not None and len(self._parts) > most_waiting)):
            yield self._parts.pop(0).result()

    def _decode(self, latent: Tensor, window: Window, first: int) -> Tensor:
        """The shown frames of a part; what is not kept leaves no trace in the decoder's memory."""
        pixels, after = self.vae.decode_step(latent.to(self.device), self._cache if first else None)
        if first < window.kept:
            self._cache = after
        frames = to_frames(pixels[0]).cpu()
        if window.shown is None:
            return frames
        begin = self.vae.config.scale.video_frames(first) if first else 0
        return frames[max(0, window.shown[0] - begin) : max(0, window.shown[1] - begin)]
