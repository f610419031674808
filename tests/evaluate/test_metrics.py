"""Distances and shares against closed forms."""

import math

import pytest
import torch

from skyloom.evaluate.metrics import frechet_distance, psnr, ratio_with_interval, share_of, ssim


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


def test_a_ratio_comes_with_an_interval_around_it():
    generator = torch.Generator().manual_seed(1)
    truth = torch.ones(400)
    hits = (torch.rand(400, generator=generator) < 0.7).float()
    value, low, high = ratio_with_interval(torch.stack([hits, truth], 1))
    assert value == pytest.approx(float(hits.mean()))
    assert value - low == pytest.approx(1.96 * (0.7 * 0.3 / 400) ** 0.5, rel=0.15)
    assert high - value == pytest.approx(1.96 * (0.7 * 0.3 / 400) ** 0.5, rel=0.15)
    assert ratio_with_interval(torch.ones(5, 2)) == (1, 1, 1)
    assert all(math.isnan(number) for number in ratio_with_interval(torch.tensor([[1.0, 0.0]] * 3)))
