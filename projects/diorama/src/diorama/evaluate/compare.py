"""Compare generated videos with real renders of the same scenes: motion, drift, windows.

Drift: later segments of a long video against its first one; real renders show how much a scene
changes by itself. Windows: the measures of the critic of `--retake`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diorama.evaluate.prompts import Prompt
from diorama.evaluate.suite import VideoGenerator
from diorama.world.assets import Atlas
from diorama.world.render import render
from skyloom.core.types import VideoShape
from skyloom.evaluate.metrics import frechet_distance, share_of
from skyloom.evaluate.motion import (
    MOTION_METRICS,
    MotionStatistics,
    VideoStatistics,
    colour_change,
    motion_statistics,
    seam_ratio,
    video_statistics,
)
from skyloom.evaluate.report import Report, Strip
from skyloom.evaluate.window_quality import WindowCritic, WindowScore
from skyloom.models.diorama.probe import Probe, predict

Frames = UInt8[Tensor, "t h w c"]
_MOTION_STRIP = 8  # frames per strip
_DRIFT_STRIP = 12
_QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
_PROBE_FRAMES = 33  # frames of a segment that the probe reads, as in its training


def render_prompt(prompt: Prompt, frames: int, atlas: Atlas) -> Frames:
    """Render the scene of a prompt, `frames` frames long."""
    shape = VideoShape(frames, prompt.scene.shape.height, prompt.scene.shape.width)
    return render(replace(prompt.scene, shape=shape), atlas).frames


def compare_motion(
    pipeline: VideoGenerator,
    prompts: Sequence[Prompt],
    atlas: Atlas,
    frames: int,
    on_video: Callable[[int], None] | None = None,
) -> Report:
    """Generate every prompt (seed 0), render its scene at the same length, and measure both."""
    made: list[MotionStatistics] = []
    real: list[MotionStatistics] = []
    strips: list[Strip] = []
    for number, prompt in enumerate(prompts):
        video = pipeline.generate(prompt.text, seed=0).frames
        truth = render_prompt(prompt, frames, atlas)
        made.append(motion_statistics(video))
        real.append(motion_statistics(truth))
        shown = torch.linspace(0, len(video) - 1, _MOTION_STRIP).long()
        strips += [Strip(video[shown], (prompt.text,)), Strip(truth[shown], ("real render",))]
        if on_video:
            on_video(number)
    numbers: dict[str, float] = {}
    for name in MOTION_METRICS:
        values = [[getattr(one, name) for one in each] for each in (made, real)]
        shares = [share_of([[value] for value in each]) for each in values]
        for source, share in zip(("made", "real"), shares, strict=True):
            numbers[f"{name}, {source}"] = share.value
            numbers[f"{name}, {source}, standard error"] = share.error
        numbers[f"{name}, ratio"] = shares[0].value / max(shares[1].value, 1e-9)
    return Report(
        "Motion", {"prompts": len(prompts), "frames": frames}, numbers=numbers, strips=tuple(strips)
    )


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
        rendered = render_prompt(prompt, 2 * part, atlas)
        made.append(split_segments(video, part, probe, prompt.facts.noun))
        real.append(split_segments(rendered, part, probe, prompt.facts.noun))
        seam_ratios.append(seam_ratio(video, seams))
        shown = torch.linspace(0, len(video) - 1, _DRIFT_STRIP).long()
        strips.append(Strip(video[shown], (prompt.text,)))
        if on_video:
            on_video(number)
    about = {"prompts": len(prompts), "parts": len(made[0]), "frames of a part": part}
    truth = torch.cat([one.features for each in real for one in each])
    numbers = dict(_drift_numbers(made, truth))
    numbers["seams"] = share_of([[ratio] for ratio in seam_ratios]).value
    for name, value in _drift_numbers(real, truth):
        numbers[f"real renders, {name}"] = value
    return Report("Drift", about, numbers=numbers, strips=tuple(strips))


def _drift_numbers(
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


def compare_windows(
    pipeline: VideoGenerator,
    prompts: Sequence[Prompt],
    critic: WindowCritic,
    atlas: Atlas,
    edges: Sequence[int],
    on_video: Callable[[int], None] | None = None,
) -> Report:
    """Measure the windows of generated videos and of real renders of the same scenes.

    The index of a prompt is its seed; windows start at the frames `edges`. Reports quantiles of
    every measure and the share of windows beyond a bound.
    """
    found: dict[str, list[WindowScore]] = {"made": [], "real": []}
    for number, prompt in enumerate(prompts):
        video = pipeline.generate(prompt.text, seed=number).frames
        rendered = render_prompt(prompt, len(video), atlas)
        for name, frames in (("made", video), ("real", rendered)):
            windows = [frames[start:end] for start, end in pairwise([0, *edges, len(frames)])]
            found[name] += [critic(here, windows[0], last) for last, here in pairwise(windows)]
        if on_video:
            on_video(number)
    numbers: dict[str, float] = {}
    for name, verdicts in found.items():
        beyond = sum(one.score > 1 for one in verdicts)
        numbers[f"{name}, share beyond a bound"] = beyond / len(verdicts)
        for measure in critic.bounds:
            values = torch.tensor(
                [one.measures[measure] for one in verdicts if measure in one.measures]
            )
            for share in _QUANTILES:
                numbers[f"{measure}, {name}, {share:.0%}"] = float(values.quantile(share))
    about = {"prompts": len(prompts), "windows": len(found["made"]), "bounds": dict(critic.bounds)}
    return Report("Windows against the first of their video", about, numbers=numbers)
