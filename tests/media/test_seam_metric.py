"""Seams: 1 for a join like any other step, far more for a cut; however the frames are handed in."""

import pytest
import torch

from skyloom.media.seam_metric import SeamMetric


def ramp(count, start=0, step=2):
    """Grey frames that brighten by `step`."""
    values = torch.arange(count) * step + start
    return values.reshape(-1, 1, 1, 1).expand(count, 4, 4, 3).to(torch.uint8)


def test_a_join_like_any_other_step_is_one():
    meter = SeamMetric((10, 17))
    meter.take(ramp(30))
    assert meter.ratios() == {10: pytest.approx(1), 17: pytest.approx(1)}


@pytest.mark.parametrize("run", [1, 7, 40])
def test_a_cut_is_far_above_and_is_held_against_what_is_around_it(run):
    frames = torch.cat([ramp(20), ramp(20, start=100)])
    meter = SeamMetric((20,))
    for part in frames.split(run):
        meter.take(part)
    change = 100 - 19 * 2
    assert meter.ratios() == {20: pytest.approx(change / 2, rel=1e-3)}


def test_how_a_loop_closes():
    there_and_back = torch.cat([ramp(8), ramp(8).flip(0)])
    meter = SeamMetric(())
    meter.take(there_and_back)
    assert meter.closure() < 1
    meter = SeamMetric(())
    meter.take(ramp(16))
    assert meter.closure() == pytest.approx(15, rel=1e-2)


def test_a_still_video_has_no_seams():
    meter = SeamMetric((3,))
    meter.take(ramp(10, step=0))
    assert meter.ratios() == {3: pytest.approx(1)}
