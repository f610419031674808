"""The diorama's autoencoder: exact windows, invertible components, an independent frame 0."""

import pytest
import torch

from skyloom.models.diorama.autoencoder import DioramaAutoencoder, initialise_components, shrink
from skyloom.models.diorama.config import AutoencoderConfig

CONFIG = AutoencoderConfig(channels=6, widths=(8, 8), blocks=(1, 1))


@pytest.fixture
def autoencoder() -> DioramaAutoencoder:
    torch.manual_seed(0)
    autoencoder = DioramaAutoencoder(CONFIG).eval()
    for parameter in autoencoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return autoencoder


@torch.no_grad()
def test_windows_decoded_one_after_another_equal_the_whole(autoencoder: DioramaAutoencoder):
    latent = torch.randn(2, 6, 5, 3, 4)
    whole, cache, parts = autoencoder.decode(latent), None, []
    for start, stop in ((0, 2), (2, 3), (3, 5)):
        part, cache = autoencoder.decode_step(latent[:, :, start:stop], cache)
        parts.append(part)
    assert whole.shape == (2, 3, 17, 48, 64)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_encoding_averages_pixels(autoencoder: DioramaAutoencoder):
    video = torch.rand(1, 3, 5, 32, 32)
    torch.testing.assert_close(
        autoencoder.encode(video), autoencoder.encode_small(shrink(video, 2))
    )
    assert autoencoder.encode(video).shape == (1, 6, 2, 2, 2)


@torch.no_grad()
def test_the_first_latent_frame_sees_frame_0_alone(autoencoder: DioramaAutoencoder):
    video = torch.rand(1, 3, 5, 16, 16)
    changed = video.clone()
    changed[:, :, 1:] += 1
    first, second = autoencoder.encode(video), autoencoder.encode(changed)
    assert torch.equal(first[:, :, 0], second[:, :, 0])
    assert not torch.equal(first[:, :, 1], second[:, :, 1])


@torch.no_grad()
def test_components_invert_what_they_span_and_have_unit_scale():
    """Patches of six dimensions are restored exactly from latents of unit root mean square."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(6, 4 * 3 * 8 * 8, generator=generator)
    patches = torch.randn(2000, 6, generator=generator) @ directions
    autoencoder = DioramaAutoencoder(CONFIG)
    assert initialise_components(autoencoder, patches) > 0.999
    four = patches[:500].reshape(500, 4, 3, 8, 8).movedim(1, 2)
    video = torch.cat([four[:, :, :1], four], 2)  # the second latent frame holds the patch
    latent = autoencoder.encode_small(video)[:, :, 1:]
    back = autoencoder.decoder.inverse(latent).reshape(500, 4, 3, 8, 8).movedim(1, 2)
    torch.testing.assert_close(back, four, rtol=1e-3, atol=1e-2)
    assert 0.9 < float(latent.square().mean().sqrt()) < 1.1
