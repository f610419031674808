"""From a seed to a clip: sample a scene, paint it, say it."""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from skyloom.world.assets import Atlas
from skyloom.world.caption import Captions, Facts, captions, facts
from skyloom.world.motion import Curve
from skyloom.world.render import render
from skyloom.world.scene import Scene, sample_scene
from skyloom.world.subject import Split
from skyloom.world.vocabulary import Vocabulary


@dataclass(frozen=True)
class Clip:
    """A short video, its sentences and facts, and where its subjects are."""

    frames: UInt8[Tensor, "t h w c"]
    captions: Captions
    facts: Facts
    scene: Scene
    masks: Bool[Tensor, "o t h w"]
    tracks: Float[Tensor, "o t 4"]


def make_clip(
    seed: int,
    vocabulary: Vocabulary,
    atlas: Atlas,
    frames: int = 33,
    height: int = 128,
    width: int = 128,
    fps: float = 16,
    split: Split = "train",
    times: Curve | None = None,
) -> Clip:
    """Make a clip. The same seed gives the same bytes, on any number of threads.

    One frame shows the middle of a two-second scene. `times` (seconds) paints other moments of the same
    scene: `make_clip(seed, ..., times=[k / fps])` is exactly frame k of `make_clip(seed, ...)`.
    """
    scene = sample_scene(seed, vocabulary, frames, height, width, fps, split, atlas.nouns)
    painted = render(
        scene, atlas, times=None if times is None else np.asarray(times, dtype=np.float64)
    )
    return Clip(painted.frames, captions(scene), facts(scene), scene, painted.masks, painted.tracks)


def contact_sheet(clips: list[Clip], columns: int = 6) -> UInt8[Tensor, "h w c"]:
    """One row per clip, `columns` moments of each, for looking at many clips at once."""
    rows = []
    for clip in clips:
        moments = torch.linspace(0, len(clip.frames) - 1, columns).round().long()
        rows.append(rearrange(clip.frames[moments], "t h w c -> h (t w) c"))
    return rearrange(torch.stack(rows), "n h w c -> (n h) w c")
