"""Frames and pixels are inverse; covering keeps the middle and the aspect."""

import pytest
import torch

from skyloom.media.frames import cover, to_frames, to_pixels


def test_every_byte_survives_the_way_to_pixels_and_back():
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    pixels = to_pixels(frames)
    assert pixels.min() == -1
    assert pixels.max() == 1
    assert torch.equal(to_frames(pixels), frames)


def test_pixels_out_of_range_are_clamped():
    assert to_frames(torch.tensor([-9.0, 9.0]).reshape(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_the_right_size_is_left_as_it_is():
    frames = torch.randint(0, 256, (2, 8, 6, 3), dtype=torch.uint8)
    assert torch.equal(cover(frames, 8, 6), frames)


def test_a_wide_picture_loses_its_sides_alike():
    frames = torch.zeros(1, 10, 30, 3, dtype=torch.uint8)
    frames[:, :, 10:20] = 200
    assert (cover(frames, 20, 20) == 200).all()


@pytest.mark.parametrize("shape", [(1, 20_000), (20_000, 1), (1, 1), (7, 301)])
def test_no_aspect_costs_more_than_its_own_pixels(shape):
    frames = torch.full((1, *shape, 3), 90, dtype=torch.uint8)
    made = cover(frames, 16, 32)
    assert made.shape == (1, 16, 32, 3)
    assert (made == 90).all()
