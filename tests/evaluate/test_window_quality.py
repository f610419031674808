"""The critic: equal windows pass, each fault is found by its own measure."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from skyloom.core.errors import CheckpointError, RequestError
from skyloom.evaluate.window_quality import Bounds, WindowCritic, load_critic
from skyloom.models.base import load_clip_reader
from skyloom.models.diorama.probe import Probe, ProbeConfig
from skyloom.models.registry import DEFAULT_MODEL, find_model

CONFIG = ProbeConfig(
    ("ball", "cube"), ("sea", "sky"), ("day",), ("red",), size=32, widths=(16, 16, 16, 32)
)
ALL = {"colour", "contrast", "sharpness", "flicker", "motion", "seam", "identity"}


@pytest.fixture(scope="module")
def critic() -> WindowCritic:
    torch.manual_seed(0)
    return WindowCritic(Probe(CONFIG).eval())


def moving(
    start: int, count: int, speed: float = 1.0, gain: float = 1.0, lift: float = 0.0
) -> torch.Tensor:
    """Soft stripes that run to the right, as frames `start` to `start + count`."""
    clock = torch.arange(start, start + count)[:, None, None, None]
    across = torch.arange(48.0)[None, None, :, None]
    wave = torch.sin((across - speed * clock) * 2 * math.pi / 16) * torch.tensor([1.0, 0.8, 0.6])
    grey = 0.5 + lift + 0.3 * gain * wave.expand(-1, 32, -1, -1)
    return (255 * grey).clamp(0, 255).round().byte()


def test_a_window_like_the_first_passes(critic):
    verdict = critic(moving(33, 12), moving(0, 33), moving(21, 12))
    assert set(verdict.measures) == ALL == set(critic.bounds)
    assert verdict.score < 1
    assert verdict.measures["motion"] == pytest.approx(1, abs=0.05)
    assert verdict.measures["seam"] == pytest.approx(1, abs=0.05)
    assert critic(moving(33, 12), moving(0, 33), moving(21, 12)) == verdict


@pytest.mark.parametrize(
    ("frames", "measure"),
    [
        (moving(33, 12, lift=0.1), "colour"),
        (moving(33, 12, gain=0.7), "contrast"),
        (moving(33, 12, gain=1.4), "contrast"),
        (moving(33, 12, gain=0.7), "sharpness"),
        (moving(33, 1).repeat(12, 1, 1, 1), "motion"),
        (moving(41, 12), "seam"),
        (
            torch.stack(
                [
                    frame.float() * (0.8 if index % 2 else 1)
                    for index, frame in enumerate(moving(33, 12))
                ]
            ).byte(),
            "flicker",
        ),
    ],
)
def test_every_fault_is_found_by_its_own_measure(critic, frames, measure):
    verdict = critic(frames, moving(0, 33), moving(21, 12))
    assert verdict.score > 1
    only = WindowCritic(
        critic.probe,
        Bounds(
            **{name: 1e6 if name != "motion" else 1e-6 for name in ALL}
            | {measure: asdict(Bounds())[measure]}
        ),
    )
    assert only(frames, moving(0, 33), moving(21, 12)).score > 1


def test_another_subject_is_further_away_than_the_same_later(critic):
    noise = torch.randint(
        0, 256, (12, 32, 48, 3), generator=torch.Generator().manual_seed(0)
    ).byte()
    same, other = (
        critic(frames, moving(0, 33), moving(21, 12)) for frames in (moving(33, 12), noise)
    )
    assert other.measures["identity"] > 2 * same.measures["identity"]


def test_unavailable_measures_are_skipped(critic):
    nothing = moving(0, 0)
    assert critic(moving(0, 33), None, nothing).score == 0
    assert set(critic(moving(33, 12), None, moving(21, 12)).measures) == {"seam"}
    assert set(critic(moving(33, 1), moving(0, 33), moving(21, 12)).measures) == {"seam"}
    assert critic(nothing, moving(0, 33), nothing).measures == {}
    assert critic(nothing, moving(0, 33), moving(21, 12)).score < 1


def test_a_still_scene_may_stay_still(critic):
    still = moving(0, 1).repeat(33, 1, 1, 1)
    assert critic(still[:12], still, still[:12]).score < 1


def test_bounds_are_checked():
    assert load_critic(bounds={"seam": 2.0}).bounds["seam"] == 2.0
    assert load_critic().bounds == asdict(Bounds())
    for wrong in (
        {"seem": 2.0},
        {"seam": 0},
        {"contrast": 1.0},
        {"motion": math.nan},
        {"colour": "much"},
        {"colour": True},
    ):
        with pytest.raises(RequestError, match=next(iter(wrong))):
            load_critic(bounds=wrong)


def test_the_critic_reads_with_the_models_own_reader_else_the_default_ones(monkeypatch, critic):
    info = find_model(DEFAULT_MODEL)
    other = replace(info, folder=Path("other"))
    readers = {info.folder: load_clip_reader(), other.folder: critic.probe}
    loader = "skyloom.models.diorama.load.load_clip_reader"
    monkeypatch.setattr(loader, lambda model: readers[model.folder])
    assert load_critic(other).probe is critic.probe
    readers[other.folder] = None
    assert load_critic(other).probe is readers[info.folder]
    readers[info.folder] = None
    with pytest.raises(CheckpointError, match="must have a clip reader"):
        load_critic(other)
