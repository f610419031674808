"""Sound in memory: cut and joined at rational times without drift."""

from fractions import Fraction

import pytest
import torch

from skyloom.core.audio import Audio, samples_at
from skyloom.core.errors import MediaError


@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
@pytest.mark.parametrize("fps", [Fraction(16), Fraction(24_000, 1001), Fraction(30_000, 1001)])
def test_consecutive_pieces_add_up(rate, fps):
    whole = Audio(torch.rand(2, samples_at(40 / fps, rate)), rate)
    pieces = [whole.slice(number / fps, (number + 1) / fps) for number in range(40)]
    assert len({piece.samples.shape[1] for piece in pieces}) <= 2
    assert torch.equal(Audio.concatenate(pieces).samples, whole.samples)


def test_a_time_is_the_sample_at_or_before_it():
    assert samples_at(Fraction(1, 3), 44_100) == 14_700
    assert samples_at(Fraction(1, 7), 48_000) == 6_857
    assert Audio.silence(Fraction(1, 7), 48_000).samples.shape == (2, 6_857)
    assert Audio.silence(Fraction(1, 7), 48_000, 1).seconds == Fraction(6_857, 48_000)


def test_a_slice_ends_with_the_sound():
    sound = Audio.silence(Fraction(1), 16_000, 1)
    assert sound.slice(Fraction(3, 4), Fraction(5)).seconds == Fraction(1, 4)
    assert sound.slice(Fraction(2), Fraction(5)).seconds == 0
    with pytest.raises(MediaError, match="0 <= start <= stop, got 1 to 0"):
        sound.slice(Fraction(1), Fraction(0))


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (torch.zeros(2, 9).double(), 48_000, r"float32 \[channels n\], got torch.float64"),
        (torch.zeros(48_000, 2), 48_000, "1, 2 or 6 channels, got 48000"),
        (torch.zeros(2, 9), 50, "rate must be 8000 to 192000 Hz, got 50"),
        (torch.full((1, 9), float("nan")), 48_000, "must be finite"),
    ],
)
def test_invalid_sound_is_refused(samples, rate, message):
    with pytest.raises(MediaError, match=message):
        Audio(samples, rate)


def test_pieces_of_several_formats_are_not_joined():
    second = Fraction(1)
    with pytest.raises(MediaError, match="one rate and number of channels"):
        Audio.concatenate([Audio.silence(second, 48_000), Audio.silence(second, 44_100)])
    with pytest.raises(MediaError, match="got none"):
        Audio.concatenate([])
