"""Frame arithmetic holds for every length and size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.errors import RequestError
from skyloom.core.types import LatentShape, ScaleFactors, VideoShape

SCALES = st.builds(ScaleFactors, time=st.integers(1, 8), space=st.integers(1, 32))
COUNTS = st.integers(1, 500)


@given(SCALES, COUNTS)
def test_latent_frames_and_frames_are_inverse(scale: ScaleFactors, latent_frames: int):
    assert scale.latent_frames(scale.video_frames(latent_frames)) == latent_frames


@given(SCALES, st.integers(-3, 500))
def test_only_one_plus_a_multiple_fits(scale: ScaleFactors, frames: int):
    if frames in range(1, frames + 1, scale.time):
        assert scale.video_frames(scale.latent_frames(frames)) == frames
    else:
        with pytest.raises(RequestError, match="whole latent frames") as caught:
            scale.latent_frames(frames)
        assert f"Use {scale.round_frames(max(frames, 1))} frames" in str(caught.value)


@given(SCALES, st.floats(-100, 1000))
def test_rounding_gives_the_nearest_count_that_fits(scale: ScaleFactors, frames: float):
    rounded = scale.round_frames(frames)
    scale.latent_frames(rounded)
    assert scale.round_frames(rounded) == rounded
    assert abs(rounded - max(frames, 1)) <= scale.time / 2


@given(SCALES, st.floats(0, 100), st.integers(1, 60))
def test_seconds_become_the_nearest_count_that_fits(scale: ScaleFactors, seconds: float, fps: int):
    frames = scale.frames_for(seconds, fps)
    scale.latent_frames(frames)
    assert abs((frames - 1) / fps - seconds) <= scale.time / 2 / fps + 1e-9


@given(SCALES, COUNTS, st.integers(1, 50), st.integers(1, 50))
def test_shapes_are_inverse(scale: ScaleFactors, frames: int, height: int, width: int):
    latent = LatentShape(frames, height, width)
    assert scale.latent_shape(scale.video_shape(latent)) == latent


def test_five_seconds_of_the_usual_autoencoder():
    scale = ScaleFactors(time=4, space=16)
    assert scale.frames_for(5, 16) == 81
    assert scale.latent_shape(VideoShape(81, 128, 192)) == LatentShape(21, 8, 12)


def test_a_size_that_does_not_fit_names_one_that_does():
    with pytest.raises(RequestError, match="Use 192x128"):
        ScaleFactors(4, 16).latent_shape(VideoShape(1, 130, 190))


@pytest.mark.parametrize("shape", [(0, 16, 16), (1, 0, 16), (1, 16, -1)])
def test_an_empty_video_is_refused(shape: tuple[int, int, int]):
    with pytest.raises(RequestError, match="empty"):
        VideoShape(*shape)


def test_a_size_is_written_width_first():
    assert VideoShape(frames=1, height=2, width=3).size == "3x2"
