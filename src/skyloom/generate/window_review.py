"""The jury of one video: decodes a window for its critic, and keeps the frames that later windows are held against."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from skyloom.generate.rollout import Critic, Projector, Verdict, Window, WindowStep

_BEFORE = 12  # frames before a window that are kept for its critic


class Jury:
    """Asks a critic about windows in their order. A window is held against the first whole window of its card, which
    in a video without cards is the video's first; while a morph lasts, only against the frames right before it."""

    def __init__(self, critic: Critic, projector: Projector) -> None:
        self._critic, self._projector = critic, projector
        self._card: tuple[int, int] | None = None
        self._first: Tensor | None = None
        self._shot = 0
        self._before: Tensor | None = None
        self._told: list[dict[str, Any]] = []

    def judge(self, window: Window, latent: Float[Tensor, "1 c t h w"]) -> Verdict:
        """What the critic says of a take."""
        frames = self._projector.try_out(latent, window)
        first = self._first if self._card == (window.shot, window.card) else None
        before = frames[:0] if self._before is None or self._shot != window.shot else self._before
        return self._projector.lanes.run_one(partial(self._critic, frames, first, before))

    def keep(self, made: WindowStep) -> None:
        """Take note of the window that was kept, before it is handed to the projector."""
        assert made.kept is not None, "only finished windows are kept"
        window, frames = made.window, self._projector.try_out(made.kept.latent, made.window)
        if self._card != (window.shot, window.card) and not window.fade and len(frames):
            self._card, self._first = (window.shot, window.card), frames
        if self._before is not None and self._shot == window.shot:
            frames = torch.cat([self._before, frames])
        self._shot, self._before = window.shot, frames[-_BEFORE:]
        self._told.append(
            {
                "window": window.index,
                "kept": made.kept.take,
                "takes": [dict(one) for one in made.kept.said],
            }
        )

    def notes(self) -> Mapping[str, Any]:
        """What was allowed and what was found, for the receipt."""
        return {"critic": {"bounds": dict(self._critic.bounds), "windows": self._told}}
