"""Videos of any length, window by window, at constant memory.

The first window is as long as the clips that the model was trained on and is made in one go. Every later one sees
the keys and values of the video's first latent frames and of those right before it (a sink and a recent past:
Xiao et al. 2023, arXiv 2309.17453; keys are kept un-rotated and get window-local positions). Noise is drawn per
window, so that second 40 is the same however long the video becomes. While one window is being made, the one before
is decoded.
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
from skyloom.generate.executor import Lanes
from skyloom.generate.resume import Kept, WindowStore
from skyloom.generate.temporal_smoothing import steady
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
        Window(index, start, stop, min(stop, frames), stop)
        for index, (start, stop) in enumerate(pairwise(edges))
    )


@dataclass(frozen=True)
class Verdict:
    """What a critic says of a window's frames: how far its worst measure is towards its bound (1: at it, more: beyond
    it), and every measure."""

    score: float
    measures: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {"score": self.score, "measures": dict(self.measures)}


class Critic(Protocol):
    """Judges a window by its frames. The same frames must always get the same verdict."""

    @property
    def bounds(self) -> Mapping[str, float]:
        """What is allowed, by measure."""
        ...

    def __call__(
        self,
        frames: UInt8[Tensor, "t h w c"],
        first: UInt8[Tensor, "u h w c"] | None,
        before: UInt8[Tensor, "v h w c"],
    ) -> Verdict:
        """Hold frames against those that the card began with (None: these are they) and those right before them in
        the shot, of which there may be none."""
        ...


@dataclass(frozen=True, eq=False)
class WindowStep:
    """A step of a window's sampling; after the last one, `finished` holds the window's clean latent, and `kept` which
    take of it that is and what was said of all."""

    window: Window
    step: SampleStep
    kept: Kept | None = None

    @property
    def finished(self) -> Float[Tensor, "1 c t h w"] | None:
        """The window's clean latent, after its last step."""
        return None if self.kept is None else self.kept.latent


@dataclass(frozen=True, eq=False)
class Job:
    """What a rollout makes: the windows, a canvas for each, the noise levels to go through, the seed.

    `speak` tells the denoiser what a window is to show, where that changes; `seeds` are cards' own, by card. Windows
    and steps that a `store` has from an earlier run are not made again, new ones are kept in it. `correlation` is that
    of the noise of neighbouring latent frames that the model was trained with. `judge` says how good a window became:
    one that is beyond a bound is made again with other noise, up to `retakes` times, and the best take is kept.
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
    judge: Callable[[Window, Tensor], Verdict] | None = None
    retakes: int = 0

    @property
    def steps(self) -> int:
        """Of a window."""
        return len(self.sigmas) - 1

    def noise_for(
        self, window: Window, shape: tuple[int, ...], *purpose: str | int
    ) -> Float[Tensor, "..."]:
        """Noise of a window. That of a card with a seed of its own hangs on nothing but this card."""
        own = self.seeds.get(window.card)
        if own is None:
            return noise(self.seed, shape, "window", window.index, *purpose)
        number = sum(one.card == window.card for one in self.windows[: window.index])
        return noise(own, shape, "card", number, *purpose)

    def take_noise(
        self, window: Window, canvas: Canvas, take: int, last: Float[Tensor, "1 c h w"] | None
    ) -> Float[Tensor, "1 c t h w"]:
        """The noise that a take of a window starts from, going on from the noise before it."""
        purpose = ("take", take) if take else ()
        fresh = self.noise_for(window, (1, *canvas.latent.shape), *purpose)
        return chain_frames(fresh, self.correlation, last)

    def alone(self, window: Window, before: Window | None) -> bool:
        """Whether a window's noise does not go on from that of the window before."""
        return (
            before is None
            or before.shot != window.shot
            or (before.card != window.card and window.card in self.seeds)
        )


def roll_out(job: Job, denoiser: Denoiser) -> Iterator[WindowStep]:
    """Sample all windows in order; may be left after any step."""
    before: Window | None = None
    last: Tensor | None = None  # noise of the latent frame before the window
    for window, following in zip(job.windows, (*job.windows[1:], None), strict=True):
        if job.speak is not None:
            job.speak(window)
        canvas = job.canvas_at(window)
        last = None if job.alone(window, before) else last
        for made in _make(job, window, denoiser, canvas, last):
            if made.kept is not None and following is not None and following.shot != window.shot:
                denoiser.forget()
            elif made.kept is not None and following is not None and window.kept > window.start:
                assert job.rollout is not None
                remembered = _remembered(made.kept.latent, job, window)
                denoiser.remember(remembered, job.rollout, job.rollout.context_sigma)
            if made.kept is not None and window.kept > window.start:
                last = job.take_noise(window, canvas, made.kept.take, last)[
                    :, :, window.kept - window.start - 1
                ]
            yield made
        before = window


def _make(
    job: Job,
    window: Window,
    denoiser: Denoiser,
    canvas: Canvas,
    last: Float[Tensor, "1 c h w"] | None,
) -> Iterator[WindowStep]:
    """The steps of one window, of every take that it needs; only the last one, if it was finished before."""
    kept = None if job.store is None else job.store.load(window.index)
    if kept is not None:
        yield WindowStep(
            window, SampleStep(job.steps - 1, job.steps, kept.latent, kept.latent), kept
        )
        return
    takes: list[tuple[SampleStep, Verdict | None]] = []
    while True:
        start = job.take_noise(window, canvas, len(takes), last)
        for step in _take(job, window, denoiser, canvas, start, len(takes)):
            end = step
            if step.index < job.steps - 1:
                yield WindowStep(window, step)
        verdict = None if job.judge is None else job.judge(window, end.latent)
        takes.append((end, verdict))
        if verdict is None or verdict.score <= 1 or len(takes) > job.retakes:
            break
        yield WindowStep(window, end)
    kept, end = _best(takes)
    if job.store is not None:
        job.store.save(window.index, kept)
    yield WindowStep(window, end, kept)


def _take(
    job: Job,
    window: Window,
    denoiser: Denoiser,
    canvas: Canvas,
    start: Float[Tensor, "1 c t h w"],
    number: int,
) -> Iterator[SampleStep]:
    """The steps of one take that are not done yet; the last one always."""
    begun = None if job.store is None else job.store.load_step(window.index, number)
    if begun is not None and begun[0] == job.steps:
        yield SampleStep(job.steps - 1, job.steps, begun[1], begun[1])
        return
    for step in sample_euler(denoiser.velocity, start, job.sigmas, canvas, begun):
        if job.store is not None and (step.index < job.steps - 1 or job.judge is not None):
            job.store.save_step(window.index, number, step.index + 1, step.latent)
        yield step


def _best(takes: Sequence[tuple[SampleStep, Verdict | None]]) -> tuple[Kept, SampleStep]:
    """The take that is least far beyond a bound, of equal ones the first."""
    scores = [0.0 if verdict is None else verdict.score for _, verdict in takes]
    best = scores.index(min(scores))
    end = takes[best][0]
    return Kept(
        end.latent, best, [verdict.to_dict() for _, verdict in takes if verdict is not None]
    ), end


def _remembered(
    latent: Float[Tensor, "1 c t h w"], job: Job, window: Window
) -> Float[Tensor, "1 c t h w"]:
    """What is kept of a finished window, as later ones see it: with a little noise of its own, if the model likes that
    better."""
    latent = latent[:, :, : window.kept - window.start]
    level = job.rollout.context_sigma if job.rollout else 0.0
    if not level:
        return latent
    own = job.noise_for(window, tuple(latent.shape), "context")
    return add_noise(latent, own, torch.full((1, latent.shape[2]), level))


@dataclass(frozen=True, eq=False)
class _Memory:
    """What decoding goes on from: the decoder's cache, and the latent frame that was decoded last."""

    cache: DecoderCache
    last: Tensor


@dataclass(frozen=True, eq=False)
class _Trial:
    """A window decoded on trial: the frames of its parts, and the decoder's memory after it."""

    latent: Tensor
    parts: list[Tensor]
    after: _Memory | None


@dataclass
class Projector:
    """Decodes windows to the frames that they show, a few at a time, on a lane of its own; `ready` hands frames out.

    Latent frames are held steady by the model's `steadiness` on the way (generate/temporal_smoothing.py), but for those that are
    `pinned`: (shot, latent frame) pairs.
    """

    vae: Vae
    lanes: Lanes
    device: torch.device
    steadiness: float = 0.0
    pinned: Collection[tuple[int, int]] = frozenset()
    _memory: _Memory | None = None
    _parts: list[Future[Tensor]] = field(default_factory=list)
    _trials: list[_Trial] = field(default_factory=list)

    def put(self, latent: Float[Tensor, "1 c t h w"], window: Window) -> None:
        """Hand in the next window; one that was tried out is not decoded again."""
        trial = next((one for one in self._trials if one.latent is latent), None)
        self._trials.clear()
        if trial is not None:
            self._memory = trial.after
            self._parts += [self.lanes.submit(partial(_itself, part)) for part in trial.parts]
            return
        for first, end in window.parts:
            part = latent[:, :, first - window.start : end - window.start]
            self._parts.append(self.lanes.submit(partial(self._decode, part, window, first)))

    def try_out(
        self, latent: Float[Tensor, "1 c t h w"], window: Window
    ) -> UInt8[Tensor, "t h w c"]:
        """The frames that a window would show if it were handed in next. It leaves no trace in the decoder's memory:
        that of the trial becomes the decoder's own when this very latent is handed in."""
        for one in self._trials:
            if one.latent is latent:
                return torch.cat(one.parts)
        # the lane has decoded all that was handed in before it comes to this, and is idle when it is done
        self._trials.append(self.lanes.submit(partial(self._try, latent, window)).result())
        return torch.cat(self._trials[-1].parts)

    def ready(self, *, most_waiting: int | None = None) -> Iterator[UInt8[Tensor, "t h w c"]]:
        """The frames that are done; waits for some while more than `most_waiting` parts are not."""
        while self._parts and (
            self._parts[0].done() or (most_waiting is not None and len(self._parts) > most_waiting)
        ):
            yield self._parts.pop(0).result()

    def _try(self, latent: Tensor, window: Window) -> _Trial:
        memory, parts = self._memory, list[Tensor]()
        for first, end in window.parts:
            part = latent[:, :, first - window.start : end - window.start]
            frames, memory = self._shown(part, window, first, memory)
            parts.append(frames)
        return _Trial(latent, parts, memory)

    def _decode(self, latent: Tensor, window: Window, first: int) -> Tensor:
        frames, self._memory = self._shown(latent, window, first, self._memory)
        return frames

    def _shown(
        self, latent: Tensor, window: Window, first: int, memory: _Memory | None
    ) -> tuple[Tensor, _Memory | None]:
        """The shown frames of a part, and the decoder's memory after it: what is not kept leaves no trace in it."""
        before = memory if first else None
        known = [
            number
            for number in range(latent.shape[2])
            if (window.shot, first + number) in self.pinned
        ]
        held = steady(latent, None if before is None else before.last, self.steadiness, known)
        pixels, after = self.vae.decode_step(
            held.to(self.device), None if before is None else before.cache
        )
        memory = _Memory(after, held[:, :, -1]) if first < window.kept else memory
        frames = to_frames(pixels[0]).cpu()
        if window.shown is None:
            return frames, memory
        begin = self.vae.config.scale.video_frames(first) if first else 0
        return frames[max(0, window.shown[0] - begin) : max(0, window.shown[1] - begin)], memory


def _itself(frames: Tensor) -> Tensor:
    return frames
