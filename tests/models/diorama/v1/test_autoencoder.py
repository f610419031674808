"""The autoencoder: causal, exact when decoded in windows, optimal linear path."""

import pytest
import torch
from einops import rearrange

from skyloom.core.errors import RequestError
from skyloom.core.types import VideoShape
from skyloom.models.diorama.v1.autoencoder import (
    SPACE,
    TIME,
    Vae,
    VaeConfig,
    initialise_linear_path,
)

SMALL = VaeConfig(latent_channels=8, decoder_widths=(8, 8, 16, 16))


@pytest.fixture
def vae() -> Vae:
    torch.manual_seed(0)
    module = Vae(SMALL)
    for parameter in module.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    module.mean.normal_()
    module.std.uniform_(0.5, 2.0)
    return module.eval()


def test_shapes_follow_the_scale_factors(vae):
    video = torch.randn(2, 3, 9, 32, 48)
    latent = vae.encode(video)
    shape = SMALL.scale.latent_shape(VideoShape(9, 32, 48))
    assert latent.shape == (2, 8, shape.frames, shape.height, shape.width)
    assert vae.decode(latent).shape == video.shape


def test_sizes_off_the_grid_are_refused():
    with pytest.raises(RequestError, match="multiples of 16"):
        SMALL.scale.latent_shape(VideoShape(9, 40, 48))


@pytest.mark.parametrize("frames", [1, 5, 17])
def test_the_past_never_sees_the_future(vae, frames):
    video = torch.randn(1, 3, frames + 4, 32, 32)
    changed = video.clone()
    changed[:, :, frames:] += 1
    kept = SMALL.scale.latent_frames(frames)
    assert torch.equal(vae.encode(video)[:, :, :kept], vae.encode(changed)[:, :, :kept])
    assert not torch.equal(vae.encode(video), vae.encode(changed))


def test_first_latent_frame_is_a_still_image(vae):
    video = torch.randn(1, 3, 9, 32, 32)
    torch.testing.assert_close(vae.encode(video)[:, :, :1], vae.encode(video[:, :, :1]))


@pytest.mark.parametrize("windows", [(1, 1, 1, 1, 1), (2, 3), (3, 2), (1, 4)])
def test_streamed_decode_equals_whole_decode(vae, windows):
    latent = torch.randn(2, 8, 5, 2, 3)
    cache, parts = None, []
    for window in latent.split(windows, dim=2):
        frames, cache = vae.decode_step(window, cache)
        parts.append(frames)
    torch.testing.assert_close(torch.cat(parts, dim=2), vae.decode(latent), atol=1e-5, rtol=0)


def test_linear_path_is_the_principal_components():
    """Patches that span only as many directions as there are channels come back exactly."""
    torch.manual_seed(1)
    vae = Vae(SMALL)
    basis = torch.randn(8, 3 * TIME * SPACE * SPACE) / 30
    explained = initialise_linear_path(vae, torch.randn(400, 8) @ basis + 0.2)
    assert explained > 0.999
    patches = torch.randn(2 * 2, 8) @ basis + 0.2
    frames = rearrange(
        patches, "(y x) (n c p q) -> 1 c n (y p) (x q)", y=2, n=TIME, c=3, p=SPACE, q=SPACE
    )
    video = torch.cat([frames[:, :, :1], frames], dim=2)
    made = vae.decode(vae.encode(video))
    torch.testing.assert_close(made[:, :, 1:], frames, atol=2e-3, rtol=0)


def test_every_parameter_learns(vae):
    video = torch.randn(1, 3, 9, 32, 32)
    vae.decode(vae.encode(video)).square().mean().backward()
    silent = [name for name, parameter in vae.named_parameters() if not parameter.grad.any()]
    assert not silent
