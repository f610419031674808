"""The transformer at work on one video: guided by its prompts or as a few-step student, with or without a past.

A model is asked with the prompt and, for guidance, without: two branches, side by side, each with its own memory of
the windows that are finished.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from skyloom.diffusion.flow import to_velocity
from skyloom.diffusion.guidance import cfg_delta
from skyloom.generate.executor import Lanes
from skyloom.models.attention import KvCache
from skyloom.models.dit import Dit, TextCondition
from skyloom.models.registry import Rollout

T = TypeVar("T")


@dataclass
class _Branch:
    """One way of asking, and what it remembers."""

    text: TextCondition
    cache: KvCache | None = None
    before: TextCondition | None = None


class Denoiser:
    """Velocities of one video, window by window. Latents go in and come out in fp32 on the CPU."""

    def __init__(
        self,
        dit: Dit,
        lanes: Lanes,
        conditions: Sequence[TextCondition],
        guidance_scale: float,
        *,
        student: bool,
    ) -> None:
        assert len(conditions) == (1 if guidance_scale == 1.0 else 2), (
            "guidance needs a second prompt, and only that"
        )
        self._dit, self._lanes, self._student = dit, lanes, student
        self._branches = [_Branch(text) for text in conditions]
        self._guidance_scale, self._fade = guidance_scale, torch.zeros(0)
        self._first: int | None = None
        self._device, self._dtype = dit.head.weight.device, dit.head.weight.dtype

    def velocity(
        self,
        latent: Float[Tensor, "b c t h w"],
        sigma: Float[Tensor, "b t"],
        span: Float[Tensor, "b t"],
    ) -> Float[Tensor, "b c t h w"]:
        """What carries a window on; all branches at once. The first window is read bidirectionally."""
        noisy, levels = latent.to(self._device), sigma.to(self._device)
        steps = span.to(self._device) if self._student else None

        def ask(text: TextCondition, cache: KvCache | None) -> Tensor:
            numbers = None
            if self._first is not None and cache is None:
                numbers = torch.arange(noisy.shape[2], device=self._device) + self._first
            made = self._dit(
                noisy.to(self._dtype), levels, text, cache=cache, span=steps, frame_indices=numbers
            ).float()
            return to_velocity(self._dit.config.prediction, made, noisy, levels)

        def predict(branch: _Branch) -> Tensor:
            made = ask(branch.text, branch.cache)
            if branch.before is None:
                return made
            return torch.lerp(made, ask(branch.before, branch.cache), self._fade)

        made = self._run(predict)
        return (made[0] + cfg_delta(made[0], made[-1], self._guidance_scale)).cpu()

    def remember(self, latent: Float[Tensor, "b c t h w"], rollout: Rollout, level: float) -> None:
        """Take finished latent frames into every branch's memory, a window at a time, as noisy as `level` says."""
        for window in latent.split(rollout.window, dim=2):
            clean = window.to(self._device, self._dtype)
            sigma = torch.full((len(window), window.shape[2]), level, device=self._device)
            span = torch.zeros_like(sigma) if self._student else None

            def extend(
                branch: _Branch,
                clean: Tensor = clean,
                sigma: Tensor = sigma,
                span: Tensor | None = span,
            ) -> None:
                cache = branch.cache or KvCache(rollout.sink, rollout.recent)
                branch.cache = self._dit.extend_cache(clean, sigma, branch.text, cache, span)

            self._run(extend)

    def say(
        self,
        conditions: Sequence[TextCondition],
        before: Sequence[TextCondition] | None = None,
        fade: Sequence[float] = (),
    ) -> None:
        """Go on with other prompts; what is remembered stays.

        With a `fade`, the prompts from `before` still say that much of each latent frame of the next window.
        """
        fading = before is not None and len(fade) > 0
        for index, branch in enumerate(self._branches):
            branch.text = conditions[index]
            branch.before = before[index] if before is not None and fading else None
        if fading:
            self._fade = rearrange(torch.tensor(fade, device=self._device), "t -> 1 1 t 1 1")

    def stand(self, first: int | None) -> None:
        """Where in its video the next window without a memory begins, in latent frames (None: at its beginning)."""
        self._first = first

    def pass_by(self, frames: int, rollout: Rollout) -> None:
        """Latent frames went by that nothing is remembered of."""
        for branch in self._branches:
            cache = branch.cache or KvCache(rollout.sink, rollout.recent)
            branch.cache = replace(cache, seen=cache.seen + frames)

    def forget(self) -> None:
        """Remember nothing: a new shot begins."""
        for branch in self._branches:
            branch.cache = None

    def _run(self, call: Callable[[_Branch], T]) -> list[T]:
        return self._lanes.run([partial(call, branch) for branch in self._branches])
