"""The family loads whichever networks its folder holds, and the pipeline runs both."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import skyloom
from skyloom.core.errors import CheckpointError
from skyloom.models.base import ModelBundle, Transformer, find_loader
from skyloom.models.checkpoint import save_part, to_int8, write_manifest
from skyloom.models.diorama.autoencoder import DioramaAutoencoder
from skyloom.models.diorama.config import AutoencoderConfig, TextConfig, UNetConfig
from skyloom.models.diorama.transformer import UNet
from skyloom.models.diorama.v1.transformer import Dit
from skyloom.models.registry import read_model

CPU = torch.device("cpu")
TEXT = TextConfig(width=16, lexical=True)
UNET = UNetConfig(
    channels=4,
    widths=(8, 16),
    blocks=(1, 1, 1, 1),
    attentions=1,
    heads=2,
    embedding=16,
    frequencies=16,
    text_width=TEXT.context_width,
    pooled_width=TEXT.pooled_width,
    grid=4,
    horizon=5,
)


@pytest.fixture(scope="module")
def unet_model(tmp_path_factory, tiny_model) -> Path:
    """A folder with a U-Net (int8), its autoencoder and the tiny model's text encoder."""
    folder = tmp_path_factory.mktemp("unet")
    torch.manual_seed(0)
    autoencoder_config = AutoencoderConfig(channels=4, widths=(8, 8), blocks=(1, 1))
    unet = UNet(UNET)
    autoencoder = DioramaAutoencoder(autoencoder_config)
    for module in (unet, autoencoder):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    save_part(folder, "unet", UNET, to_int8(unet.state_dict()))
    save_part(folder, "autoencoder", autoencoder_config, autoencoder.state_dict())
    shutil.copy2(tiny_model / "text.safetensors", folder)
    info = json.loads((tiny_model / "manifest.json").read_text())
    write_manifest(folder, {**info, "name": "unet", "sizes": ["64x64", "64x32"]})
    return folder


def test_a_folder_is_loaded_by_the_parts_it_holds(tiny_model, unet_model):
    first, second = (
        ModelBundle.load(read_model(folder), CPU, torch.float32)
        for folder in (tiny_model, unet_model)
    )
    assert isinstance(first.transformer, Dit)
    assert isinstance(second.transformer, UNet)
    assert isinstance(second.autoencoder, DioramaAutoencoder)
    assert isinstance(second.transformer, Transformer)
    assert second.transformer.uncached_frame_offset == 5


def test_a_folder_without_networks_is_an_error(unet_model, tmp_path):
    shutil.copy2(unet_model / "manifest.json", tmp_path)
    shutil.copy2(unet_model / "text.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="no weights for 'autoencoder'"):
        ModelBundle.load(read_model(tmp_path), CPU, torch.float32)


def test_the_pipeline_generates_cached_windows_by_the_unet(unet_model, monkeypatch):
    """A second window is sampled after the cached first one, which it does not change."""
    caches = []
    real = UNet.extend_cache

    def extend(self, *args, **more):
        caches.append(real(self, *args, **more))
        return caches[-1]

    monkeypatch.setattr(UNet, "extend_cache", extend)
    pipeline = skyloom.load(str(unet_model), dtype="float32")
    short = list(pipeline.stream("a cat", seconds=1, seed=1))
    assert not caches
    steps = list(pipeline.stream("a cat", seconds=1.75, seed=1))
    assert [cache.seen for cache in caches] == [3, 5]
    assert caches[-1].frames == 5
    assert caches[-1].last
    for one, other in zip(latents(short), latents(steps), strict=False):
        assert torch.equal(one, other)
    video = steps[-1].video
    assert video.frames.shape == (29, 64, 64, 3)
    assert torch.equal(pipeline.generate("a cat", seconds=1.75, seed=1).frames, video.frames)
    other = pipeline.generate("a dog", seconds=1.75, seed=1)
    assert not torch.equal(other.frames[17:], video.frames[17:])


def latents(steps) -> list[torch.Tensor]:
    """The estimates of the sampler's steps."""
    found = [step.latent for step in steps if step.phase == "denoise"]
    assert len(found) >= 2
    return found


def test_costs_grow_with_the_networks(tiny_model, unet_model):
    first = find_loader(read_model(tiny_model)).read_network_cost(read_model(tiny_model))
    assert (first.scale.space, first.latent_channels, first.patch) == (16, 4, (1, 2, 2))
    assert first.token_flops == 2 * 2 * (6 * 32**2 + 2 * 32 * 64)
    assert first.key_flops == 4 * 2 * 32
    second = find_loader(read_model(unet_model)).read_network_cost(read_model(unet_model))
    assert (second.scale.space, second.latent_channels) == (16, 4)
    fine = 4 * (9 * 4 * 8 + 2 * (2 * 9 * 8 * 8) + 8 * 8 + 9 * 8 * 4)
    coarse = 2 * (4 * 8 * 16) + 2 * (2 * 9 * 16 * 16)
    attention = 16 * (3 * 16 + 48) + (16 + 48) * 16 + 16 * 32
    assert second.token_flops == 2 * (fine + coarse + attention)
