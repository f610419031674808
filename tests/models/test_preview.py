"""Previews by a fitted linear map."""

import pytest
import torch
from einops import repeat

from skyloom.core.types import ScaleFactors
from skyloom.models.preview import ENOUGH_FRAMES, PreviewMap

SCALE = ScaleFactors(time=4, space=8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYLOOM_CACHE", str(tmp_path))
    return tmp_path


def clip(frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A latent, and a video whose colours are linear in it."""
    torch.manual_seed(0)
    latent = torch.randn(6, frames, 5, 7)
    weights = torch.linspace(-0.2, 0.2, 18).view(3, 6)
    colours = torch.einsum("oc,cuyx->ouyx", weights, latent) + 0.1
    video = repeat(colours, "o u y x -> o (u n) (y p) (x q)", n=4, p=8, q=8)
    return latent, video[:, 3:]


def test_a_linear_decoder_is_learned_and_kept():
    latent, video = clip(5)
    learner = PreviewMap("model", 6, SCALE)
    assert learner.picture(latent[:, 0]) is None
    learner.observe(latent, video, start=True)
    for preview in (learner, PreviewMap("model", 6, SCALE)):
        picture = preview.picture(latent[:, 2])
        assert picture is not None
        assert picture.shape == (3, 40, 56)
        for row, column in ((0, 0), (2, 3), (4, 6)):
            cell = preview.picture(latent[:, 2, row : row + 1, column : column + 1])
            assert cell is not None
            expected = video[:, 6, 8 * row, 8 * column]
            assert (cell - expected[:, None, None]).abs().max() < 1e-2
    assert PreviewMap("other", 6, SCALE).picture(latent[:, 0]) is None


def test_later_windows_and_frames_that_are_not_finite():
    latent, video = clip(3)
    preview = PreviewMap("model", 6, SCALE)
    preview.observe(latent * torch.nan, video, start=True)
    assert preview.picture(latent[:, 0]) is None
    preview.observe(latent[:, 1:], video[:, 1:], start=False)
    cell = preview.picture(latent[:, 0, :1, :1])
    assert (cell[:, 0, 0] - video[:, 0, 0, 0]).abs().max() < 1e-2


def test_it_stops_when_it_has_seen_enough(cache):
    latent, video = clip(ENOUGH_FRAMES)
    preview = PreviewMap("model", 6, SCALE)
    preview.observe(latent, video, start=True)
    before = preview.picture(latent[:, 0])
    preview.observe(latent, -video, start=True)
    assert torch.equal(preview.picture(latent[:, 0]), before)


def test_a_damaged_or_forbidden_cache_is_no_error(cache, monkeypatch):
    latent, video = clip(2)
    (cache / "preview-model.safetensors").write_bytes(b"damaged")
    preview = PreviewMap("model", 6, SCALE)
    preview.observe(latent, video, start=True)
    assert preview.picture(latent[:, 0]) is not None
    monkeypatch.setenv("SKYLOOM_CACHE", "off")
    assert PreviewMap("model", 6, SCALE).picture(latent[:, 0]) is None
