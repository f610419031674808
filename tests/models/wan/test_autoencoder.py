"""The Wan autoencoders against the original code and diffusers, at random weights."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import wan_reference
from torch import Tensor

from skyloom.models.base import Autoencoder, Previewer
from skyloom.models.checkpoint import build
from skyloom.models.wan.autoencoder import (
    WAN_2_1,
    WAN_2_2,
    Tiling,
    WanAutoencoder,
    WanAutoencoderConfig,
)
from skyloom.models.wan.autoencoder_state_dict import WanAutoencoderState, read_autoencoder_config

CPU = torch.device("cpu")
SIZES = [(1, 32, 48), (5, 64, 64), (9, 32, 48), (13, 64, 64)]
WIDTHS = {"2.1": (16, 16), "2.2": (16, 24)}


class Tensors:
    """A source of weights in memory."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self._state = state
        self.shapes = {name: tuple(value.shape) for name, value in state.items()}

    def read(self, name: str) -> Tensor:
        return self._state[name]


@dataclass
class Pair:
    """A reference and ours with the same weights."""

    reference: Any
    ours: WanAutoencoder

    @property
    def config(self) -> WanAutoencoderConfig:
        return self.ours.config

    def encode(self, video: Tensor) -> Tensor:
        """Encode with the reference, normalised as its pipeline does."""
        if hasattr(self.reference, "config"):
            mean, std = statistics(self.config)
            return (self.reference.encode(video).latent_dist.mode() - mean) / std
        return self.reference.encode(video, self._scale)

    def decode(self, latent: Tensor) -> Tensor:
        """Decode with the reference, clamped as its pipeline does."""
        if hasattr(self.reference, "config"):
            mean, std = statistics(self.config)
            dtype = self.reference.dtype
            return self.reference.decode((latent * std + mean).to(dtype)).sample.float()
        return self.reference.decode(latent, self._scale).clamp(-1, 1)

    @property
    def _scale(self) -> list[Tensor]:
        return [torch.tensor(self.config.mean), 1 / torch.tensor(self.config.std)]


def statistics(config: WanAutoencoderConfig) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(one)[:, None, None, None] for one in (config.mean, config.std))
    return mean, std


def diffusers_model(kind: str, widths: tuple[int, int]) -> torch.nn.Module:
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    if kind == "2.1":
        return diffusers.AutoencoderKLWan(base_dim=widths[0])
    return diffusers.AutoencoderKLWan(
        base_dim=widths[0],
        decoder_base_dim=widths[1],
        z_dim=48,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[0.0] * 48,  # the caller applies them
        latents_std=[1.0] * 48,
    )


def original_model(kind: str, widths: tuple[int, int]) -> torch.nn.Module:
    sizes = {"dim": widths[0], "temperal_downsample": [False, True, True]}
    if kind == "2.1":
        return wan_reference.load("wan.modules.vae2_1").WanVAE_(**sizes, z_dim=16)
    return wan_reference.load("wan.modules.vae2_2").WanVAE_(**sizes, dec_dim=widths[1], z_dim=48)


MAKERS = {"diffusers": diffusers_model, "original": original_model}


@torch.no_grad()
def make_pair(layout: str, kind: str) -> Pair:
    torch.manual_seed(0)
    reference = MAKERS[layout](kind, WIDTHS[kind]).eval()
    for name, parameter in reference.named_parameters():
        if name.endswith("gamma"):
            parameter.normal_(1.0, 0.1)
        elif parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(std=0.1)
    source = Tensors(reference.state_dict())
    config = read_autoencoder_config(source.shapes)
    ours = build(lambda: WanAutoencoder(config), WanAutoencoderState(source), CPU, torch.float32)
    return Pair(reference, ours)


@pytest.fixture(
    scope="module", params=["diffusers 2.1", "diffusers 2.2", "original 2.1", "original 2.2"]
)
def pair(request) -> Pair:
    return make_pair(*request.param.split())


@pytest.fixture(scope="module", params=["2.1", "2.2"])
def diffusers_pair(request) -> Pair:
    return make_pair("diffusers", request.param)


def latent_of(config: WanAutoencoderConfig, frames: int, height: int, width: int) -> Tensor:
    space = config.scale.space
    return torch.randn(1, config.channels, frames, height // space, width // space)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_parity(pair: Pair, size):
    frames, height, width = size
    video = torch.rand(1, 3, frames, height, width) * 2 - 1
    expected = pair.encode(video)
    made = pair.ours.encode(video)
    assert expected.std() > 0.1
    assert (made - expected).abs().max() <= 1e-5

    latent = torch.randn_like(made)
    expected = pair.decode(latent)
    made = pair.ours.decode(latent)
    assert made.shape == video.shape
    assert expected.std() > 0.1
    assert (made - expected).abs().max() <= 1e-5


def test_protocols(diffusers_pair: Pair):
    assert isinstance(diffusers_pair.ours, Autoencoder)
    assert isinstance(diffusers_pair.ours, Previewer)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_windows_equal_the_whole_and_trials_change_nothing(diffusers_pair: Pair, window):
    ours = diffusers_pair.ours
    latent = latent_of(ours.config, 4, 32, 48)
    whole = ours.decode(latent)
    cache = None
    parts: list[Tensor] = []
    for start in range(0, 4, window):
        ours.decode_step(torch.randn_like(latent[:, :, :2]), cache)  # on trial
        part, cache = ours.decode_step(latent[:, :, start : start + window], cache)
        parts.append(part)
    assert (torch.cat(parts, dim=2) - whole).abs().max() <= 1e-6


def test_a_video_does_not_depend_on_its_batch(diffusers_pair: Pair):
    ours = diffusers_pair.ours
    latents = torch.cat([latent_of(ours.config, 2, 32, 48) for _ in range(2)])
    together = ours.decode(latents)
    assert torch.equal(together[1:], ours.decode(latents[1:]))
    assert torch.equal(ours.encode(together)[1:], ours.encode(together[1:]))


@pytest.fixture
def tiled(diffusers_pair: Pair):
    """Tiles of 64 pixels, 48 apart, on both sides."""
    diffusers_pair.reference.enable_tiling(64, 64, 48, 48)
    diffusers_pair.ours.tiling = Tiling(64, 48)
    yield diffusers_pair
    diffusers_pair.reference.use_tiling = False
    diffusers_pair.ours.tiling = None


@torch.no_grad()
def test_tiles_equal_those_of_diffusers_and_stream(tiled: Pair):
    latent = latent_of(tiled.config, 2, 96, 112)
    expected = tiled.decode(latent)
    whole = tiled.ours.decode(latent)
    assert (whole - expected).abs().max() <= 1e-5

    first, cache = tiled.ours.decode_step(latent[:, :, :1], None)
    rest, _ = tiled.ours.decode_step(latent[:, :, 1:], cache)
    assert (torch.cat([first, rest], dim=2) - whole).abs().max() <= 1e-6


def test_tiles_may_start_in_the_middle_of_a_video(diffusers_pair: Pair):
    """The first tile of a step has the memory that whole frames had there."""
    ours = diffusers_pair.ours
    latent = latent_of(ours.config, 2, 96, 96)
    whole = ours.decode(latent)
    _, cache = ours.decode_step(latent[:, :, :1], None)
    ours.tiling = Tiling(64, 48)
    made, after = ours.decode_step(latent[:, :, 1:], cache)
    ours.tiling = None
    assert [len(video) for video in after.features] == [4]
    forgetful = torch.cat([ours.decode(latent[:, :, 1:])] * 4, dim=2)
    error = (made - whole[:, :, 1:]).abs().mean()
    assert error < 0.5 * (forgetful - whole[:, :, 1:]).abs().mean()
    with pytest.raises(ValueError, match=r"must be of 1 tiles, got 4"):
        ours.decode_step(latent[:, :, 1:], after)


def test_only_the_decoder_runs_in_bf16_and_nothing_in_fp16(diffusers_pair: Pair):
    ours = diffusers_pair.ours
    latent = latent_of(ours.config, 2, 32, 48)
    video = ours.decode(latent)
    encoded = ours.encode(video)
    ours.place(CPU, torch.float16)
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    theirs = diffusers_pair.reference.to(torch.bfloat16)
    ours.place(CPU, torch.bfloat16)
    try:
        assert torch.equal(ours.encode(video), encoded)
        error = (ours.decode(latent) - video).abs().mean()
        with torch.no_grad():
            expected = diffusers_pair.decode(latent)
        assert 0 < error <= 1.1 * (expected - video).abs().mean()
    finally:  # the weights are rounded now
        del theirs


@pytest.mark.parametrize(
    ("layout", "config"),
    [(layout, config) for layout in MAKERS for config in (WAN_2_1, WAN_2_2)],
)
def test_every_tensor_of_the_real_models_fits(layout, config):
    kind = "2.1" if config is WAN_2_1 else "2.2"
    with torch.device("meta"):
        reference = MAKERS[layout](kind, (config.width, config.decoder_width))
        ours = WanAutoencoder(config)
    source = Tensors(reference.state_dict())
    assert read_autoencoder_config(source.shapes) == config
    expected = {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    assert WanAutoencoderState(source).shapes == expected
    millions = sum(value.numel() for value in ours.parameters()) / 1e6
    assert round(millions) == {"2.1": 127, "2.2": 705}[kind]


def test_statistics_are_those_of_the_original_code(monkeypatch):
    for name, config in (("1", WAN_2_1), ("2", WAN_2_2)):
        module = wan_reference.load(f"wan.modules.vae2_{name}")
        monkeypatch.setattr(module, "_video_vae", lambda **_: torch.nn.Identity())
        mean, inverse = getattr(module, f"Wan2_{name}_VAE")(device="cpu").scale
        assert torch.equal(mean, torch.tensor(config.mean))
        assert torch.equal(inverse, 1 / torch.tensor(config.std))


def test_statistics_of_2_1_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    with torch.device("meta"):
        config = diffusers.AutoencoderKLWan().config
    assert tuple(config.latents_mean) == WAN_2_1.mean
    assert tuple(config.latents_std) == WAN_2_1.std
