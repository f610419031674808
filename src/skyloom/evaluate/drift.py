"""Does a long video hold together? Its last seconds against its first: look, motion, subject, and the joins of windows.

Every number is a ratio or a distance to the video's own first part; real renders of the same scenes say what a scene
that goes there and back does by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.types import VideoShape
from skyloom.evaluate.metrics import frechet_distance, share_of
from skyloom.evaluate.motion import Look, colour_change, look_of, seam_ratio
from skyloom.evaluate.probe import Probe, read
from skyloom.evaluate.prompts import Prompt
from skyloom.evaluate.report import Report, Strip
from skyloom.evaluate.suite import Generator
from skyloom.world.assets import Atlas
from skyloom.world.render import render

Frames = UInt8[Tensor, "t h w c"]
_SHOWN = 12
_READ = 33  # frames of a part that the probe reads: what it was trained on


@dataclass(frozen=True)
class Part:
    """A few seconds of a video: how they look, whether the probe names the subject, and its features."""

    look: Look
    right: bool
    features: Float[Tensor, "t d"]


def parts_of(frames: Frames, length: int, probe: Probe, noun: str) -> list[Part]:
    """A video in whole parts of so many frames; what is over is left out."""
    return [
        Part(look_of(part), (said := read(probe, part[:_READ])).noun == noun, said.features)
        for part in frames.split(length)
        if len(part) == length
    ]


def compare_drift(
    pipeline: Generator,
    prompts: Sequence[Prompt],
    probe: Probe,
    atlas: Atlas,
    *,
    part: int,
    joins: Sequence[int],
    on_video: Callable[[int], None] | None = None,
) -> Report:
    """Make every prompt (seed 0) and hold each part of `part` frames against the first; real renders beside it."""
    made, real, seams, strips = [], [], [], []
    for number, prompt in enumerate(prompts):
        video = pipeline.generate(prompt.text, seed=0).frames
        made.append(parts_of(video, part, probe, prompt.facts.noun))
        real.append(parts_of(_rendered(prompt, 2 * part, atlas), part, probe, prompt.facts.noun))
        seams.append(seam_ratio(video, joins))
        shown = torch.linspace(0, len(video) - 1, _SHOWN).long()
        strips.append(Strip(video[shown], (prompt.text,)))
        if on_video:
            on_video(number)
    about = {"prompts": len(prompts), "parts": len(made[0]), "frames of a part": part}
    truth = torch.cat([one.features for each in real for one in each])
    numbers = {**dict(_numbers(made, truth)), "seams": share_of([[seam] for seam in seams]).value}
    numbers |= {f"real renders, {name}": value for name, value in _numbers(real, truth)}
    return Report("Drift", about, numbers=numbers, strips=tuple(strips))


def _rendered(prompt: Prompt, frames: int, atlas: Atlas) -> Frames:
    shape = VideoShape(frames, prompt.scene.shape.height, prompt.scene.shape.width)
    return render(replace(prompt.scene, shape=shape), atlas).frames


def _numbers(
    videos: Sequence[Sequence[Part]], truth: Float[Tensor, "n d"]
) -> Iterator[tuple[str, float]]:
    """For each part after the first, against the first: ratios of means over videos, and Fréchet distances."""
    first = [video[0] for video in videos]
    base = frechet_distance(torch.cat([one.features for one in first]), truth)
    yield "part 1, subject read", sum(one.right for one in first) / len(first)
    yield "part 1, Fréchet distance", base
    for index in range(1, len(videos[0])):
        here, name = [video[index] for video in videos], f"part {index + 1}"
        yield (
            f"{name}, colour change",
            sum(colour_change(a.look, b.look) for a, b in zip(first, here, strict=True))
            / len(here),
        )
        for what in ("contrast", "sharpness", "speed", "flicker"):
            before, after = (sum(getattr(one.look, what) for one in each) for each in (first, here))
            yield f"{name}, {what}", after / max(before, 1e-9)
        yield f"{name}, subject read", sum(one.right for one in here) / len(here)
        distance = frechet_distance(torch.cat([one.features for one in here]), truth)
        yield f"{name}, Fréchet distance", distance
