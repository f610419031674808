"""Videos of any length, window by window, at constant memory.

The first window is as long as the clips that the model was trained on and is made in one go. Every later one sees
the keys and values of the video's first latent frames and of those right before it (a sink and a recent past:
Xiao et al. 2023, arXiv 2309.17453; keys are kept un-rotated and get window-local positions). Noise is drawn per
window, so that second 40 is the same however long the video becomes. While one window is being made, the one before
is decoded.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.seeds import noise
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
    """Latent frames `start` to `stop` of a video, made together; the ones from `wanted` on are not shown."""

    index: int
    start: int
    stop: int
    wanted: int


def make_windows(frames: int, native: int, rollout: Rollout | None) -> tuple[Window, ...]:
    """The windows of a video of that many latent frames, when a model makes `native` in one go."""
    if rollout is None or frames <= native:
        return (Window(0, 0, frames, frames),)
    count = -(-(frames - native) // rollout.window)
    edges = [0, *(native + rollout.window * index for index in range(count + 1))]
    return tuple(Window(index, start, stop, min(stop, frames)) for index, (start, stop) in enumerate(pairwise(edges)))


@dataclass(frozen=True, eq=False)
class WindowStep:
    """A step of a window's sampling; after the last one, `finished` holds the window's clean latent."""

    window: Window
    step: SampleStep
    finished: Float[Tensor, "1 c t h w"] | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """What a rollout makes: the windows, a canvas for each, the noise levels to go through, the seed.

    Windows that a `store` has from an earlier run are not made again, new ones are kept in it.
    """

    windows: tuple[Window, ...]
    canvas_at: Callable[[Window], Canvas]
    sigmas: Float[Tensor, " n"]
    seed: int
    rollout: Rollout | None
    store: WindowStore | None = None


def roll_out(job: Job, denoiser: Denoiser) -> Iterator[WindowStep]:
    """Sample all windows in order; may be left after any step."""
    for window in job.windows:
        for step in _make(job, window, denoiser):
            done = step.index == step.total - 1
            if done and job.store is not None:
                job.store.save(window.index, step.latent)
            if done and window is not job.windows[-1]:
                assert job.rollout is not None
                denoiser.remember(_remembered(step.latent, job, window), job.rollout, job.rollout.context_sigma)
            yield WindowStep(window, step, step.latent if done else None)


def _make(job: Job, window: Window, denoiser: Denoiser) -> Iterator[SampleStep]:
    """The steps of one window; only the last one, if it was finished before."""
    steps = len(job.sigmas) - 1
    kept = None if job.store is None else job.store.load(window.index)
    if kept is not None:
        yield SampleStep(steps - 1, steps, kept, kept)
        return
    canvas = job.canvas_at(window)
    start = noise(job.seed, (1, *canvas.latent.shape), "window", window.index)
    yield from sample_euler(denoiser.velocity, start, job.sigmas, canvas)


def _remembered(latent: Float[Tensor, "1 c t h w"], job: Job, window: Window) -> Float[Tensor, "1 c t h w"]:
    """A finished window as later ones see it: with a little noise of its own, if the model likes that better."""
    level = job.rollout.context_sigma if job.rollout else 0.0
    if not level:
        return latent
    own = noise(job.seed, tuple(latent.shape), "window", window.index, "context")
    return add_noise(latent, own, torch.full((1, latent.shape[2]), level))


@dataclass
class Projector:
    """Decodes latents to frames in their order, a few at a time, on a lane of its own; `ready` hands frames out."""

    vae: Vae
    lanes: Lanes
    device: torch.device
    _cache: DecoderCache | None = None
    _parts: list[Future[Tensor]] = field(default_factory=list)

    def put(self, latent: Float[Tensor, "1 c t h w"]) -> None:
        """Hand in the next latent frames."""
        self._parts += [self.lanes.submit(partial(self._decode, part)) for part in latent.split(DECODE_FRAMES, dim=2)]

    def ready(self, *, most_waiting: int | None = None) -> Iterator[UInt8[Tensor, "t h w c"]]:
        """The frames that are done; waits for some while more than `most_waiting` parts are not."""
        while self._parts and (self._parts[0].done() or (most_waiting is not None and len(self._parts) > most_waiting)):
            yield self._parts.pop(0).result()

    def _decode(self, latent: Tensor) -> Tensor:
        pixels, self._cache = self.vae.decode_step(latent.to(self.device), self._cache)
        return to_frames(pixels[0]).cpu()
