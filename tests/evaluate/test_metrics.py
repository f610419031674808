"""Distances and shares against closed forms."""

import math

import pytest
import torch

from skyloom.evaluate.metrics import frechet_distance, psnr, share_of, ssim


def test_psnr_of_a_known_error_and_of_none():
    black = torch.zeros(2, 3, 8, 8)
    grey = torch.stack([black[0] + 0.1, black[1]])
    assert psnr(black, grey).tolist() == pytest.approx([20.0, 100.0], abs=1e-4)


def test_ssim_is_one_for_equal_and_less_for_noise():
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert ssim(picture, picture).item() == pytest.approx(1, abs=1e-5)
    assert ssim(picture, 1 - picture).item() < 0


def test_frechet_distance_of_a_shift_is_its_square():
    cloud = torch.randn(200, 5, generator=torch.Generator().manual_seed(2))
    shift = torch.tensor([1.0, 0, -2, 0, 0])
    assert frechet_distance(cloud, cloud) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(cloud, cloud + shift) == pytest.approx(5, rel=1e-6)


def test_frechet_distance_of_a_stretch_is_the_square_of_the_difference_of_spreads():
    cloud = torch.randn(500, 1, generator=torch.Generator().manual_seed(3)).double()
    spread = cloud.std()
    expected = float((3 * spread - spread) ** 2 + (3 * cloud.mean() - cloud.mean()) ** 2)
    assert frechet_distance(cloud, 3 * cloud) == pytest.approx(expected, rel=1e-9)


def test_share_counts_a_case_once_however_many_answers_it_has():
    share = share_of([[True, True, True, True], [False], [True, False]])
    assert (share.value, share.cases) == (0.5, 3)
    assert share.error == pytest.approx(math.sqrt(0.25 / 3))
    assert share_of([]).cases == 0
