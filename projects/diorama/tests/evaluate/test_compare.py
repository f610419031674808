"""Comparisons with real renders: a generator that renders is equal to them."""

from dataclasses import dataclass

import pytest
import torch

from diorama.evaluate.compare import compare_drift, compare_motion, compare_windows
from diorama.evaluate.prompts import prompts_for
from diorama.world.assets import builtin_atlas
from diorama.world.render import render
from diorama.world.vocabulary import TINY
from skyloom.core.types import VideoShape
from skyloom.evaluate.motion import MOTION_METRICS
from skyloom.evaluate.window_quality import WindowCritic
from skyloom.models.diorama.probe import Probe, ProbeConfig

ATLAS = builtin_atlas()
CONFIG = ProbeConfig(TINY.nouns, TINY.places, TINY.times, TINY.colours, 32, widths=(16, 16, 16, 32))


@dataclass
class Video:
    """A video with its frames."""

    frames: torch.Tensor


class Painter:
    """Renders the scene of the prompt."""

    def __init__(self, prompts):
        self.scenes = {one.text: one.scene for one in prompts}

    def generate(self, request, /, *, seed):
        return Video(render(self.scenes[request], ATLAS).frames)


def prompts(frames: int):
    return prompts_for(TINY, 3, shape=VideoShape(frames, 32, 32), nouns=ATLAS.nouns)


@pytest.fixture
def probe() -> Probe:
    torch.manual_seed(0)
    return Probe(CONFIG).eval()


def test_a_perfect_generator_moves_like_the_world():
    asked = prompts(9)
    report = compare_motion(Painter(asked), asked, ATLAS, 9)
    for name in MOTION_METRICS:
        assert report.numbers[f"{name}, ratio"] == pytest.approx(1)
    assert len(report.strips) == 6


def test_a_perfect_generator_drifts_like_the_world(probe):
    asked = prompts(16)
    report = compare_drift(Painter(asked), asked, probe, ATLAS, part=8, seams=[8])
    made = {name: value for name, value in report.numbers.items() if name.startswith("part")}
    assert len(made) == 9
    for name, value in made.items():
        assert report.numbers[f"real renders, {name}"] == pytest.approx(value)


def test_windows_of_a_perfect_generator_measure_as_those_of_the_world(probe):
    asked = prompts(21)
    report = compare_windows(Painter(asked), asked, WindowCritic(probe), ATLAS, [9, 15])
    assert report.about["windows"] == 6
    measured = [name for name in report.numbers if ", made, " in name]
    assert len(measured) == 35
    for name in measured:
        assert report.numbers[name] == report.numbers[name.replace(", made, ", ", real, ")]
