"""Rejection sampling of windows: decode each take for a critic and record the scores."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from skyloom.generate.decoding import StreamingDecoder
from skyloom.generate.sampling import Critic, WindowScore, WindowStep, generated_part
from skyloom.generate.windows import Window

_FRAMES_BEFORE = 12  # frames before a window that the critic sees


class WindowReviewer:
    """Scores the windows of one video in order.

    A window is compared with the first whole window of its card (of the video, if it has no
    cards); during a prompt crossfade, only with the frames right before it.
    """

    def __init__(self, critic: Critic, decoder: StreamingDecoder) -> None:
        self._critic = critic
        self._decoder = decoder
        self._card: tuple[int, int] | None = None
        self._first: Tensor | None = None
        self._shot = 0
        self._before: Tensor | None = None
        self._windows: list[dict[str, Any]] = []

    def score(self, window: Window, latent: Float[Tensor, "1 c t h w"]) -> WindowScore:
        """Score one take of a window."""
        frames = self._decoder.decode_trial(generated_part(window, latent), window)
        first = self._first if self._card == (window.shot, window.span) else None
        before = frames[:0] if self._before is None or self._shot != window.shot else self._before
        return self._decoder.executor.run_one(partial(self._critic, frames, first, before))

    def accept(self, step: WindowStep) -> None:
        """Record the accepted take of a window. Call it before the decoder gets the window."""
        assert step.result is not None and step.generated is not None, (
            "only finished windows are accepted"
        )
        window = step.window
        frames = self._decoder.decode_trial(step.generated, window)
        if self._card != (window.shot, window.span) and not window.prompt_fade and len(frames):
            self._card = (window.shot, window.span)
            self._first = frames
        if self._before is not None and self._shot == window.shot:
            frames = torch.cat([self._before, frames])
        self._shot = window.shot
        self._before = frames[-_FRAMES_BEFORE:]
        self._windows.append(
            {
                "window": window.index,
                "kept": step.result.take,
                "takes": [dict(scores) for scores in step.result.scores],
            }
        )

    def notes(self) -> Mapping[str, Any]:
        """The bounds and the scores of every window, for the receipt."""
        return {"critic": {"bounds": dict(self._critic.bounds), "windows": self._windows}}
