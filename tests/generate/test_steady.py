"""Jitter is held still, movement passes, and it is the same window by window."""

import copy
from dataclasses import replace

import pytest
import torch

from skyloom.generate.request import Request
from skyloom.generate.steady import steady

LEVEL = 0.5


def clip(jitter: float) -> torch.Tensor:
    """A still latent of 12 frames with so much jitter, root mean square over channels."""
    random = torch.Generator().manual_seed(0)
    still = torch.randn(1, 48, 1, 4, 4, generator=random)
    return still + jitter * torch.randn(1, 48, 12, 4, 4, generator=random)


def change(latent: torch.Tensor) -> float:
    return float(latent.diff(dim=2).square().mean().sqrt())


def test_small_changes_nearly_vanish_and_large_ones_stay():
    assert change(steady(clip(0.1), None, LEVEL)) < 0.1 * change(clip(0.1))
    assert change(steady(clip(2.0), None, LEVEL)) > 0.95 * change(clip(2.0))
    one = torch.zeros(1, 48, 2, 1, 1)
    one[:, :, 1] = LEVEL
    assert steady(one, None, LEVEL)[0, 0, 1, 0, 0] == pytest.approx(LEVEL / 2)


def test_the_first_frame_stays_and_no_level_changes_nothing():
    latent = clip(0.1)
    assert torch.equal(steady(latent, None, LEVEL)[:, :, 0], latent[:, :, 0])
    assert steady(latent, None, 0.0) is latent


def test_parts_one_after_another_equal_the_whole():
    latent = clip(0.3)
    whole = steady(latent, None, LEVEL)
    first = steady(latent[:, :, :5], None, LEVEL)
    assert torch.equal(torch.cat([first, steady(latent[:, :, 5:], first[:, :, -1], LEVEL)], dim=2), whole)


def test_a_steady_video_begins_the_same_however_long_it_is(tiny_model):
    import skyloom

    pipeline = copy.copy(skyloom.load(str(tiny_model)))
    ask = Request("a cat", seed=3, seconds=2)
    plain = pipeline.generate(ask).frames
    pipeline.info = replace(pipeline.info, manifest={**pipeline.info.manifest, "steadiness": 2.0})
    made = pipeline.generate(ask).frames
    assert torch.equal(made[:1], plain[:1])
    assert not torch.equal(made, plain)
    assert torch.equal(pipeline.generate(replace(ask, seconds=3)).frames[: len(made)], made)
