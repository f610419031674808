"""Previews of steps: the autoencoder's own, or a decoded picture."""

import torch

from skyloom.generate.output import Step
from skyloom.models.wan.autoencoder import WanAutoencoder, WanAutoencoderConfig

CONFIG = WanAutoencoderConfig(width=8, decoder_width=8)


def test_a_preview_that_is_not_known_yet_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("SKYLOOM_CACHE", str(tmp_path))
    torch.manual_seed(0)
    autoencoder = WanAutoencoder(CONFIG).eval()
    latent = torch.randn(1, 16, 3, 4, 6)
    step = Step("denoise", 1, 2, latent[0], autoencoder=autoencoder)
    assert step.preview() is None
    autoencoder.decode(latent)
    picture = step.preview()
    assert picture is not None
    assert picture.shape == (32, 48, 3)
    assert picture.dtype == torch.uint8
