"""Larger and smoother: what stays the very same, and that what is between lies between."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from skyloom.core.errors import RequestError
from skyloom.media.filters import interpolate, upscale


def walk(count: int) -> torch.Tensor:
    """A white square on grey that goes 4 pixels to the right with every frame."""
    frames = torch.full((count, 64, 128, 3), 90, dtype=torch.uint8)
    for number in range(count):
        frames[number, 24:40, 16 + 4 * number : 32 + 4 * number] = 240
    return frames


def centre(frame: torch.Tensor) -> float:
    """The column of the square's middle."""
    weight = (frame.float().mean(-1) - 90).clamp(min=0).sum(0)
    return float((weight * torch.arange(len(weight))).sum() / weight.sum())


@pytest.mark.parametrize("target", [48, 60])
def test_old_frames_stay_and_new_ones_move_on(target):
    frames, step = walk(9), Fraction(24, target)
    made = torch.cat(list(interpolate(frames.split(2), Fraction(24), Fraction(target))))
    assert len(made) == 9 * target // 24 + (9 * target % 24 > 0)
    for number, frame in enumerate(made):
        place = number * step
        if place.denominator == 1 or place >= 8:
            assert torch.equal(frame, frames[int(place)])
        elif place >= 1:
            assert centre(frame) == pytest.approx(23.5 + 4 * float(place), abs=0.8)


def test_runs_do_not_matter():
    frames = walk(7)
    by_one, at_once = (
        torch.cat(list(interpolate(runs, Fraction(16), Fraction(24))))
        for runs in (frames.split(1), [frames])
    )
    assert torch.equal(by_one, at_once)
    assert len(list(interpolate([], Fraction(16), Fraction(24)))) == 0
    assert torch.equal(
        torch.cat(list(interpolate([frames[:1]], Fraction(16), Fraction(32)))), frames[[0, 0]]
    )


def test_upscaling_is_lanczos_and_streams():
    frames = walk(5)
    runs = list(upscale(frames.split(2), (128, 256)))
    assert [len(run) for run in runs] == [2, 2, 1]
    there = np.asarray(
        Image.fromarray(frames[0].numpy()).resize((256, 128), Image.Resampling.LANCZOS)
    )
    apart = np.abs(runs[0][0].numpy().astype(int) - there)
    assert apart.mean() < 1
    assert torch.equal(next(upscale([frames], (64, 128))), frames)


def test_invalid_sizes_and_rates_are_refused():
    for fps, target in ((24, 24), (24, 12), (24, 10_000)):
        with pytest.raises(RequestError, match="fps must be above"):
            next(interpolate([walk(2)], Fraction(fps), Fraction(target)))
    with pytest.raises(RequestError, match="at least 32 pixels"):
        next(interpolate([walk(2)[:, :16]], Fraction(24), Fraction(48)))
    with pytest.raises(RequestError, match="0x64"):
        next(upscale([walk(1)], (64, 0)))


def test_interpolation_gives_the_same_bits_every_time():
    """FFmpeg's scene change detection did not: 43 of 150 runs differed on these frames."""
    generator = torch.Generator().manual_seed(1)
    small = torch.rand(9, 3, 6, 6, generator=generator)
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bicubic").clamp(0, 1)
    frames = (255 * large).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    first = torch.cat(list(interpolate([frames], Fraction(16), Fraction(32))))
    for size in range(40):
        torch.rand(1_000 + 37 * size)  # moves the next allocations
        again = torch.cat(list(interpolate([frames], Fraction(16), Fraction(32))))
        assert torch.equal(again, first)


def test_the_frame_before_a_cut_is_repeated():
    frames = torch.zeros(8, 48, 48, 3, dtype=torch.uint8)
    frames[4:] = 255
    made = torch.cat(list(interpolate([frames], Fraction(8), Fraction(32))))
    assert not made[: 4 * 4].any()
    assert (made[4 * 4 :] == 255).all()
