# pyright: basic
"""Sample a video of any length window by window, in constant memory.

The first window has the model's native length and is sampled in one pass. Without a rollout, later
windows see the last latent frames as known ones (generate/windows.py). With it, they attend to
cached keys and values of the first latent frames and of those right before the window (attention
sink and recent frames: Xiao et al. 2023, arXiv 2309.17453; keys are cached without rotary
embedding and get window-local positions). Noise is drawn per window, so a frame does not depend on
the length of the video. While one window is sampled, the previous one is decoded.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.errors import MediaError, NumericsError
from skyloom.core.seeds import chain_frames, noise
from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.flow import add_noise
from skyloom.diffusion.sampling import SampleStep, sample_euler, sample_renoise
from skyloom.diffusion.schedule import (
    TRAINING_TIMESTEPS,
    diffusers_sigmas,
    make_sigmas,
    sigmas_of_timesteps,
    wan_sigmas,
    whole_timesteps,
)
from skyloom.diffusion.unipc import sample_unipc
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.latent_store import FinishedWindow, WindowStore
from skyloom.generate.windows import Window
from skyloom.models.family import Schedule
from skyloom.models.registry import Rollout


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

    @property
    def generated(self) -> Float[Tensor, "1 c t h w"] | None:
        """The clean latent frames that the window generated; without known ones."""
        latent = self.finished
        return None if latent is None else generated_part(self.window, latent)


def generated_part(
    window: Window, latent: Float[Tensor, "1 c t h w"]
) -> Float[Tensor, "1 c u h w"]:
    """The latent frames that a window generated, of all that it saw."""
    first, end = window.generated
    if (first, end) == (window.start, window.stop):
        return latent
    return latent[:, :, first - window.start : end - window.start]


Sampler = Callable[..., Iterator[SampleStep]]
"""One of the samplers of skyloom.diffusion."""


@dataclass(frozen=True, eq=False)
class SamplingSpec:
    """Sampling settings: windows, a canvas per window, noise levels and a seed.

    `set_prompt` is called before each window. `span_seeds` are seeds of single spans, by index.
    `store` holds windows and steps of an interrupted run, which are not sampled again.
    `start_noise` replaces the noise that the first take of each window starts from.
    Without `uses_cache`, no window attends to earlier ones. `solver` is that of the Schedule.
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
    span_seeds: Mapping[int, int] = field(default_factory=dict[int, int])
    noise_correlation: float = 0.0
    score_window: Callable[[Window, Tensor], WindowScore] | None = None
    retakes: int = 0
    uses_cache: bool = True
    start_noise: Float[Tensor, "1 c t h w"] | None = None
    solver: str = "euler"

    @property
    def steps(self) -> int:
        """Sampler steps per window."""
        return len(self.sigmas) - 1

    def window_noise(
        self, window: Window, shape: tuple[int, ...], *purpose: str | int
    ) -> Float[Tensor, "..."]:
        """Noise of a window. For a span with its own seed it depends on that span only."""
        span_seed = self.span_seeds.get(window.span)
        if span_seed is None:
            return noise(self.seed, shape, "window", window.index, *purpose)
        number = sum(one.span == window.span for one in self.windows[: window.index])
        return noise(span_seed, shape, "card", number, *purpose)

    def initial_noise(
        self,
        window: Window,
        shape: tuple[int, ...],
        take: int,
        last: Float[Tensor, "1 c h w"] | None,
    ) -> Float[Tensor, "1 c t h w"]:
        """Noise that a take starts from, correlated with `last`, the noise before the window."""
        if self.start_noise is not None and not take:
            return self.start_noise[:, :, window.start : window.stop]
        purpose = ("take", take) if take else ()
        fresh = self.window_noise(window, shape, *purpose)
        return chain_frames(fresh, self.noise_correlation, last)

    def sampler(self, window: Window, take: int, shape: tuple[int, ...]) -> Sampler:
        """The sampler of a take, whose noise depends on window, take and step alone."""
        if self.solver == "renoise":

            def fresh_noise(step: int) -> Tensor:
                return self.window_noise(window, shape, "take", take, "step", step)

            return partial(sample_renoise, fresh_noise=fresh_noise)
        return sample_unipc if self.solver == "unipc" else sample_euler

    def starts_new_noise_chain(self, window: Window, before: Window | None) -> bool:
        """Whether a window's noise is independent of the previous window's."""
        return (
            before is None
            or before.shot != window.shot
            or (before.span != window.span and window.span in self.span_seeds)
        )


def generate_windows(spec: SamplingSpec, denoiser: Denoiser) -> Iterator[WindowStep]:
    """Sample all windows in order and update the denoiser's cache. May be stopped at any step.

    A window that the store has is one step. The cache is filled when the next window is sampled.
    """
    before: Window | None = None
    last: Tensor | None = None  # noise of the latent frame before the window
    waiting: list[tuple[Window, Tensor | None]] = []  # not cached yet; None is in the store
    for window in spec.windows:
        if before is not None and before.shot != window.shot:
            denoiser.reset_cache()
            waiting.clear()
        if spec.starts_new_noise_chain(window, before):
            last = None
        stored = None if spec.store is None else spec.store.load(window.index)
        if stored is not None:
            finished = WindowStep(window, _last_step(spec, stored.latent), stored)
            latent = None
        else:
            _fill_cache(spec, denoiser, waiting)
            for finished in _sample_window(spec, window, denoiser, last=last):
                if finished.result is None:
                    yield finished
            latent = finished.finished
        assert finished.result is not None
        cached = window.cache_until - window.start if spec.uses_cache else 0
        if cached > 0:
            shape = tuple(finished.result.latent.shape)
            start = spec.initial_noise(window, shape, finished.result.take, last)
            last = start[:, :, cached - 1]
            waiting.append((window, latent))
        yield finished
        before = window


def _last_step(spec: SamplingSpec, latent: Float[Tensor, "1 c t h w"]) -> SampleStep:
    return SampleStep(spec.steps - 1, spec.steps, latent, latent)


def _fill_cache(
    spec: SamplingSpec, denoiser: Denoiser, waiting: list[tuple[Window, Tensor | None]]
) -> None:
    """Cache the finished windows that wait for it, with their own prompts."""
    for window, sampled in waiting:
        latent = _stored_latent(spec, window) if sampled is None else sampled
        if spec.set_prompt is not None:
            spec.set_prompt(window)
        assert spec.rollout is not None
        context = _context_latent(latent, spec, window)
        denoiser.cache_frames(context, spec.rollout, spec.rollout.context_sigma)
    waiting.clear()


def _stored_latent(spec: SamplingSpec, window: Window) -> Float[Tensor, "1 c t h w"]:
    stored = None if spec.store is None else spec.store.load(window.index)
    if stored is None:
        raise MediaError(
            f"Window {window.index} was removed from the cache during the generation.",
            hint="Run the same command again.",
        )
    return stored.latent


def _sample_window(
    spec: SamplingSpec,
    window: Window,
    denoiser: Denoiser,
    *,
    last: Float[Tensor, "1 c h w"] | None,
) -> Iterator[WindowStep]:
    """The steps of every take of a window."""
    if spec.set_prompt is not None:
        spec.set_prompt(window)
    canvas = spec.canvas_at(window)
    takes: list[tuple[SampleStep, WindowScore | None]] = []
    while True:
        start = spec.initial_noise(window, (1, *canvas.latent.shape), len(takes), last)
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
        yield _last_step(spec, resume_from[1][0])
        return
    sampler = spec.sampler(window, take, tuple(start.shape))
    for step in sampler(denoiser.velocity, start, spec.sigmas, canvas, resume_from):
        _check_finite(step, denoiser)
        if spec.store is not None and (
            step.index < spec.steps - 1 or spec.score_window is not None
        ):
            spec.store.save_step(window.index, take, step.index + 1, step.state)
        yield step


def _check_finite(step: SampleStep, denoiser: Denoiser) -> None:
    """Raise NumericsError, with the likely cause, if a clean estimate has other than numbers."""
    if step.denoised.sum().isfinite():
        return
    hint = (
        "The weights may be damaged (skyloom models verify), or the attention backend of this "
        "device gives wrong results."
    )
    if denoiser.dtype == torch.float16:
        hint = "float16 has too small a range for this model: use bfloat16 or float32."
    raise NumericsError(
        f"Step {step.index + 1} of {step.total} gave values that are not finite.", hint=hint
    )


def schedule_sigmas(schedule: Schedule, num_steps: int) -> Float[Tensor, " n"]:
    """The noise levels of a schedule: `num_steps`, and 0."""
    if schedule.levels == "listed":
        return sigmas_of_timesteps(schedule.timesteps, schedule.shift)
    functions = {"linear": make_sigmas, "wan": wan_sigmas, "diffusers": diffusers_sigmas}
    return functions[schedule.levels](num_steps, schedule.shift)


def model_levels(schedule: Schedule, num_steps: int) -> dict[float, float]:
    """The levels of a schedule that the model is told as training timesteps, and these, in [0, 1].

    Models of open checkpoints were trained on whole timesteps; the solver keeps the exact level.
    """
    if schedule.levels == "linear":
        return {}
    sigmas = schedule_sigmas(schedule, num_steps)
    timesteps = schedule.timesteps or whole_timesteps(sigmas).tolist()
    told = (timestep / TRAINING_TIMESTEPS for timestep in timesteps)
    return dict(zip(sigmas.tolist(), told, strict=False))


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
