"""Known cells stay equal to their source, bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import config

from skyloom.core.errors import RequestError
from skyloom.core.seeds import noise
from skyloom.core.types import LatentShape, ScaleFactors
from skyloom.diffusion.canvas import Canvas, to_latent_mask
from skyloom.diffusion.flow import add_noise

SHAPE = LatentShape(frames=5, height=2, width=3)


def half_known(seed: int = 0) -> Canvas:
    """Frame 0 known, frame 1 half known, the rest to be made; a source everywhere."""
    mask = torch.ones(5, 2, 3, dtype=torch.bool)
    mask[0], mask[1, :, 0] = False, False
    return Canvas(noise(seed, (4, 5, 2, 3), "source"), mask)


@given(st.integers(0, 1000), st.floats(0, 0.3))
def test_at_sigma_zero_known_cells_are_the_source_and_made_cells_are_untouched(
    seed: int, context: float
):
    plain = half_known(seed)
    canvas = Canvas(plain.latent, plain.denoise_mask, context_sigma=context)
    canvas.latent[0, 0, 0, 0] = -0.0
    made = noise(seed, (2, 4, 5, 2, 3), "made")
    result = canvas.apply(made, noise(seed, (2, 4, 5, 2, 3), "noise"), 0.0)
    expected = torch.where(canvas.denoise_mask, made, canvas.latent)
    assert torch.equal(result.view(torch.int32), expected.view(torch.int32))


def test_known_frames_enter_clean_and_made_frames_at_sigma():
    assert half_known().frame_sigma(0.75).tolist() == [0.0, 0.75, 0.75, 0.75, 0.75]


def test_known_frames_never_carry_more_noise_than_made_ones():
    plain = half_known()
    canvas = Canvas(plain.latent, plain.denoise_mask, context_sigma=0.125)
    assert canvas.frame_sigma(0.75)[0] == 0.125
    assert canvas.frame_sigma(0.0625)[0] == 0.0625


def test_known_cells_of_a_made_frame_ride_on_the_path():
    canvas, eps = half_known(), noise(1, (1, 4, 5, 2, 3))
    result = canvas.apply(torch.zeros_like(eps), eps, 0.5)
    path = add_noise(canvas.latent[None], eps, torch.full((1, 5), 0.5))
    assert torch.equal(result[:, :, 1, :, 0], path[:, :, 1, :, 0])
    assert (result[:, :, 1, :, 1:] == 0).all()
    assert torch.equal(result[0, :, 0], canvas.latent[:, 0])


def test_text_to_video_starts_from_noise_alone():
    eps = noise(1, (2, 4, 5, 2, 3))
    canvas = Canvas.text_to_video(4, SHAPE)
    assert torch.equal(canvas.at_sigma(eps, 1.0), eps)
    assert torch.equal(canvas.apply(eps, noise(2, eps.shape), 0.5), eps)


def test_an_edit_starts_between_its_source_and_noise():
    source, eps = noise(1, (4, 5, 2, 3)), noise(2, (1, 4, 5, 2, 3))
    canvas = Canvas(source, torch.ones(5, 2, 3, dtype=torch.bool))
    torch.testing.assert_close(canvas.at_sigma(eps, 0.25), 0.75 * source[None] + 0.25 * eps)


def test_known_frames_count_from_either_end():
    first = noise(1, (4, 1, 2, 3))
    last = noise(2, (4, 2, 2, 3))
    canvas = Canvas.text_to_video(4, SHAPE).set_known(0, first).set_known(-2, last)
    assert canvas.frame_sigma(1.0).tolist() == [0, 1, 1, 0, 0]
    assert torch.equal(canvas.latent[:, :1], first)
    assert torch.equal(canvas.latent[:, 3:], last)


def test_set_known_does_not_modify_the_canvas():
    canvas = Canvas.text_to_video(4, SHAPE)
    canvas.set_known(1, noise(1, (4, 2, 2, 3)))
    assert canvas.denoise_mask.all()
    assert (canvas.latent == 0).all()


@pytest.mark.parametrize(
    ("start", "shape"), [(4, (4, 2, 2, 3)), (-6, (4, 1, 2, 3)), (0, (3, 1, 2, 3))]
)
def test_parts_that_do_not_fit_are_refused(start: int, shape: tuple[int, ...]):
    with pytest.raises(RequestError):
        Canvas.text_to_video(4, SHAPE).set_known(start, torch.zeros(shape))


def test_a_mask_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # the shape checker would be first
    with pytest.raises(RequestError, match="must have shape"):
        Canvas(torch.zeros(4, 5, 2, 3), torch.ones(5, 2, 2, dtype=torch.bool))


def test_a_window_equals_its_part_of_the_canvas():
    plain = half_known()
    canvas = Canvas(
        plain.latent, plain.denoise_mask, prompts=((0, "dawn"), (2, "noon"), (4, "dusk"))
    )
    window = canvas.window(1, 4)
    assert torch.equal(window.latent, canvas.latent[:, 1:4])
    assert torch.equal(window.denoise_mask, canvas.denoise_mask[1:4])
    assert [window.prompt_at(frame) for frame in range(3)] == [
        canvas.prompt_at(1 + frame) for frame in range(3)
    ]
    assert window.prompts == ((0, "dawn"), (1, "noon"))
    assert plain.prompt_at(0) is None


@given(st.integers(0, 8), st.integers(0, 7), st.integers(0, 5))
def test_one_pixel_to_make_marks_exactly_its_cell(frame: int, row: int, column: int):
    scale, mask = ScaleFactors(time=4, space=2), torch.zeros(9, 8, 6, dtype=torch.bool)
    mask[frame, row, column] = True
    cells = to_latent_mask(mask, scale)
    assert cells.shape == (3, 4, 3)
    assert cells.nonzero().tolist() == [[(frame + 3) // 4, row // 2, column // 2]]


def test_a_mask_of_one_frame_has_one_latent_frame():
    assert to_latent_mask(torch.ones(1, 4, 4, dtype=torch.bool), ScaleFactors(4, 2)).shape == (
        1,
        2,
        2,
    )
