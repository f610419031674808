# pyright: basic
"""Denoiser of one video: the transformer with guidance or as a student, and its cache.

The cache holds keys and values of finished windows.
With guidance the model runs with the prompt and with the negative prompt: two branches in parallel,
each with its own key-value cache.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from skyloom.diffusion.flow import to_velocity
from skyloom.diffusion.guidance import cfg_delta
from skyloom.generate.executor import DeterministicExecutor
from skyloom.models.attention import KvCache
from skyloom.models.base import TextCondition, Transformer
from skyloom.models.registry import Rollout

T = TypeVar("T")


@dataclass
class _Branch:
    """A guidance branch: its text condition, cache and, during a crossfade, the previous text."""

    text: TextCondition
    cache: KvCache | None = None
    previous_text: TextCondition | None = None


class Denoiser:
    """Velocities of one video, window by window. Latents enter and leave in fp32 on the CPU."""

    def __init__(
        self,
        transformer: Transformer,
        executor: DeterministicExecutor,
        conditions: Sequence[TextCondition],
        guidance_scale: float,
        *,
        student: bool,
        model_levels: Mapping[float, float] | None = None,
    ) -> None:
        """`model_levels`: levels of the solver, and those that the transformer is told instead."""
        assert len(conditions) == (1 if guidance_scale == 1.0 else 2), (
            "guidance needs exactly one further condition, the negative prompt"
        )
        self._transformer = transformer
        self._executor = executor
        self._student = student
        self._branches = [_Branch(text) for text in conditions]
        self._guidance_scale = guidance_scale
        self._previous_weight = torch.zeros(0)
        self._frame_offset: int | None = None
        self._model_levels = model_levels or {}
        self._device = transformer.device
        self.dtype = transformer.dtype

    def velocity(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        span: Float[Tensor, "b t"],
    ) -> Float[Tensor, "b c t h w"]:
        """The guided velocity at noise level `sigma`. `span` is the step size for a student.

        Without a cache, all latent frames attend to one another.
        """
        noisy = latent.to(self._device)
        levels = sigma.to(self._device)
        steps = span.to(self._device) if self._student else None
        told = levels
        for level, model_level in self._model_levels.items():
            told = torch.where(levels == level, model_level, told)

        def predict(text: TextCondition, cache: KvCache | None) -> Tensor:
            numbers = None
            if self._frame_offset is not None and cache is None:
                numbers = torch.arange(noisy.shape[2], device=self._device) + self._frame_offset
            output = self._transformer(
                noisy.to(self.dtype), told, text, cache=cache, span=steps, frame_indices=numbers
            ).float()
            return to_velocity(self._transformer.prediction, output, noisy, levels)

        def predict_branch(branch: _Branch) -> Tensor:
            current = predict(branch.text, branch.cache)
            if branch.previous_text is None:
                return current
            previous = predict(branch.previous_text, branch.cache)
            return torch.lerp(current, previous, self._previous_weight)

        outputs = self._run(predict_branch)
        return (outputs[0] + cfg_delta(outputs[0], outputs[-1], self._guidance_scale)).cpu()

    def cache_frames(
        self, latent: Float[Tensor, "b c t h w"], rollout: Rollout, level: float
    ) -> None:
        """Add finished latent frames, at noise level `level`, to the cache of every branch."""
        for window in latent.split(rollout.window, dim=2):
            clean = window.to(self._device, self.dtype)
            sigma = torch.full((len(window), window.shape[2]), level, device=self._device)
            span = torch.zeros_like(sigma) if self._student else None

            def extend(
                branch: _Branch,
                clean: Tensor = clean,
                sigma: Tensor = sigma,
                span: Tensor | None = span,
            ) -> KvCache:
                cache = branch.cache or KvCache(rollout.sink, rollout.recent)
                return self._transformer.extend_cache(clean, sigma, branch.text, cache, span)

            for branch, cache in zip(self._branches, self._run(extend), strict=True):
                branch.cache = cache

    def set_prompt(
        self,
        conditions: Sequence[TextCondition],
        previous: Sequence[TextCondition] | None = None,
        previous_weights: Sequence[float] = (),
    ) -> None:
        """Change the prompts and keep the cache.

        `previous_weights` crossfades: the weight of `previous` per latent frame of the next window.
        """
        crossfade = previous is not None and len(previous_weights) > 0
        for index, branch in enumerate(self._branches):
            branch.text = conditions[index]
            branch.previous_text = previous[index] if previous is not None and crossfade else None
        if crossfade:
            weights = torch.tensor(previous_weights, device=self._device)
            self._previous_weight = rearrange(weights, "t -> 1 1 t 1 1")

    def set_frame_offset(self, first: int | None) -> None:
        """Set the index of the next uncached window's first latent frame (None: 0)."""
        self._frame_offset = first

    def skip_frames(self, frames: int, rollout: Rollout) -> None:
        """Advance the frame counter without caching keys and values."""
        for branch in self._branches:
            cache = branch.cache or KvCache(rollout.sink, rollout.recent)
            branch.cache = replace(cache, seen=cache.seen + frames)

    def reset_cache(self) -> None:
        """Drop all cached frames, at the start of a new shot."""
        for branch in self._branches:
            branch.cache = None

    def _run(self, call: Callable[[_Branch], T]) -> list[T]:
        return self._executor.run([partial(call, branch) for branch in self._branches])
