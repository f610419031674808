"""Drift of long videos: later segments against the first, and the seams between windows.

Numbers are ratios or distances to the video's own first segment; real renders of the same scenes
show how much a scene changes by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from skyloom.core.types import VideoShape
from skyloom.evaluate.metrics import frechet_distance, share_of
from skyloom.evaluate.motion import VideoStatistics, colour_change, seam_ratio, video_statistics
from skyloom.evaluate.prompts import Prompt
from skyloom.evaluate.report import Report, Strip
from skyloom.evaluate.suite import VideoGenerator
from skyloom.models.diorama.probe import Probe, predict
from skyloom.world.assets import Atlas
from skyloom.world.render import render

Frames = UInt8[Tensor, "t h w c"]
_SHOWN = 12  # frames per strip
_PROBE_FRAMES = 33  # frames of a segment that the probe reads, as in its training


@dataclass(frozen=True)
class VideoSegment:
    """A few seconds of a video: statistics, whether the probe finds the subject, its features."""

    statistics: VideoStatistics
    correct: bool
    features: Float[Tensor, "t d"]


def split_segments(frames: Frames, length: int, probe: Probe, noun: str) -> list[VideoSegment]:
    """Split a video into segments of `length` frames; an incomplete last one is dropped."""
    segments: list[VideoSegment] = []
    for part in frames.split(length):
        if len(part) == length:
            predicted = predict(probe, part[:_PROBE_FRAMES])
            correct = predicted.noun == noun
            segments.append(VideoSegment(video_statistics(part), correct, predicted.features))
    return segments


def compare_drift(
    pipeline: VideoGenerator,
    prompts: Sequence[Prompt],
    probe: Probe,
    atlas: Atlas,
    *,
    part: int,
    seams: Sequence[int],
    on_video: Callable[[int], None] | None = None,
) -> Report:
    """Generate every prompt (seed 0); compare segments of `part` frames with the first one.

    `seams` are the first frames of the windows after the first one.
    """
    made: list[list[VideoSegment]] = []
    real: list[list[VideoSegment]] = []
    seam_ratios: list[float] = []
    strips: list[Strip] = []
    for number, prompt in enumerate(prompts):
        video = pipeline.generate(prompt.text, seed=0).frames
        rendered = _render(prompt, 2 * part, atlas)
        made.append(split_segments(video, part, probe, prompt.facts.noun))
        real.append(split_segments(rendered, part, probe, prompt.facts.noun))
        seam_ratios.append(seam_ratio(video, seams))
        shown = torch.linspace(0, len(video) - 1, _SHOWN).long()
        strips.append(Strip(video[shown], (prompt.text,)))
        if on_video:
            on_video(number)
    about = {"prompts": len(prompts), "parts": len(made[0]), "frames of a part": part}
    truth = torch.cat([one.features for each in real for one in each])
    numbers = dict(_numbers(made, truth))
    numbers["seams"] = share_of([[ratio] for ratio in seam_ratios]).value
    for name, value in _numbers(real, truth):
        numbers[f"real renders, {name}"] = value
    return Report("Drift", about, numbers=numbers, strips=tuple(strips))


def _render(prompt: Prompt, frames: int, atlas: Atlas) -> Frames:
    shape = VideoShape(frames, prompt.scene.shape.height, prompt.scene.shape.width)
    return render(replace(prompt.scene, shape=shape), atlas).frames


def _numbers(
    videos: Sequence[Sequence[VideoSegment]], truth: Float[Tensor, "n d"]
) -> Iterator[tuple[str, float]]:
    """Yield ratios of means over videos and Fréchet distances of each segment to the first."""
    first = [video[0] for video in videos]
    base = frechet_distance(torch.cat([one.features for one in first]), truth)
    yield "part 1, subject read", sum(one.correct for one in first) / len(first)
    yield "part 1, Fréchet distance", base
    for index in range(1, len(videos[0])):
        here = [video[index] for video in videos]
        name = f"part {index + 1}"
        pairs = zip(first, here, strict=True)
        changes = [colour_change(a.statistics, b.statistics) for a, b in pairs]
        yield f"{name}, colour change", sum(changes) / len(changes)
        for measure in ("contrast", "sharpness", "speed", "flicker"):
            before = sum(getattr(one.statistics, measure) for one in first)
            after = sum(getattr(one.statistics, measure) for one in here)
            yield f"{name}, {measure}", after / max(before, 1e-9)
        yield f"{name}, subject read", sum(one.correct for one in here) / len(here)
        distance = frechet_distance(torch.cat([one.features for one in here]), truth)
        yield f"{name}, Fréchet distance", distance
