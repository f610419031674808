"""Generation of a labelled clip from a seed: sample a scene, render it, write its captions."""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from diorama.world.assets import Atlas
from diorama.world.caption import Captions, Facts, captions, facts
from diorama.world.motion import Curve
from diorama.world.render import render
from diorama.world.scene import Scene, sample_scene
from diorama.world.subject import Split
from diorama.world.vocabulary import Vocabulary


@dataclass(frozen=True)
class RenderedClip:
    """A short video with captions, labels, and mask and bounding box of each subject per frame."""

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
) -> RenderedClip:
    """Generate a clip. The same arguments give the same bytes with any number of threads.

    A clip of one frame shows the middle of a two-second scene. `times` (seconds) selects other
    moments: `make_clip(seed, ..., times=[k / fps])` equals frame k of `make_clip(seed, ...)`.
    """
    scene = sample_scene(seed, vocabulary, frames, height, width, fps, split, atlas.nouns)
    painted = render(
        scene, atlas, times=None if times is None else np.asarray(times, dtype=np.float64)
    )
    return RenderedClip(
        painted.frames, captions(scene), facts(scene), scene, painted.masks, painted.tracks
    )


def contact_sheet(clips: list[RenderedClip], columns: int = 6) -> UInt8[Tensor, "h w c"]:
    """Tile clips into a picture: one row per clip, `columns` evenly spaced frames each."""
    rows = []
    for clip in clips:
        moments = torch.linspace(0, len(clip.frames) - 1, columns).round().long()
        rows.append(rearrange(clip.frames[moments], "t h w c -> h (t w) c"))
    return rearrange(torch.stack(rows), "n h w c -> (n h) w c")
