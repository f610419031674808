"""Motion metrics: known speeds, flicker and drift."""

import pytest
import torch

from skyloom.evaluate.motion import motion_statistics


def waves(shift: float, frames: int = 9) -> torch.Tensor:
    """Stripes that go to the right by `shift` pixels a frame."""
    columns = torch.arange(64)[None, :] - shift * torch.arange(frames)[:, None]
    grey = 0.5 + 0.4 * torch.sin(columns * 2 * torch.pi / 16)
    return (grey[:, None, :, None].expand(-1, 48, -1, 3) * 255).round().to(torch.uint8)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 1.5])
def test_the_speed_is_the_shift(shift):
    assert motion_statistics(waves(shift)).speed == pytest.approx(shift, rel=0.1, abs=0.02)


def test_flashes_flicker_and_even_light_does_not():
    still = torch.full((12, 48, 64, 3), 100, dtype=torch.uint8)
    flashing = still.clone()
    flashing[::2] += 20
    assert motion_statistics(still).flicker == 0
    assert motion_statistics(flashing).flicker == pytest.approx(2 * 20 / 255, rel=1e-4)
    brighter = still + torch.arange(12, dtype=torch.uint8)[:, None, None, None]
    assert motion_statistics(brighter).flicker < 1e-6  # a steady change is no flicker
    assert motion_statistics(brighter).colour_drift == pytest.approx(9 / 255, rel=1e-4)


def test_contrast_and_sharpness_drift_when_a_picture_fades():
    video = waves(0.0, 8).float()
    fading = ((video - 128) * torch.linspace(1, 0.5, 8)[:, None, None, None] + 128).to(torch.uint8)
    assert motion_statistics(fading).contrast_drift == pytest.approx(
        1 - (0.5357 / 0.9643), abs=0.02
    )
    assert motion_statistics(fading).sharpness_drift > 0.3
    assert motion_statistics(waves(0.0, 8)).contrast_drift == 0
