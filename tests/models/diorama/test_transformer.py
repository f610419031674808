"""The diorama's U-Net: exact caching, masked tokens, magnitudes at low noise."""

import pytest
import torch

from skyloom.models.attention import KvCache
from skyloom.models.base import TextCondition
from skyloom.models.diorama.config import UNetConfig
from skyloom.models.diorama.transformer import UNet

CONFIG = UNetConfig(
    channels=8,
    widths=(16, 32),
    blocks=(1, 1, 1, 1),
    heads=2,
    embedding=32,
    frequencies=32,
    text_width=16,
    pooled_width=16,
    grid=8,
)


@pytest.fixture
def unet() -> UNet:
    torch.manual_seed(0)
    unet = UNet(CONFIG).eval()
    for parameter in unet.parameters():  # many layers start at zero, which would hide mistakes
        torch.nn.init.normal_(parameter, std=0.1)
    return unet


def inputs(frames: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(2, 8, frames, size, size, generator=generator), torch.rand(
        2, frames, generator=generator
    )


def prompt(unet: UNet, words: int = 5) -> TextCondition:
    generator = torch.Generator().manual_seed(9)
    context = torch.randn(2, words, 16, generator=generator)
    return unet.prepare_text(context, None, torch.randn(2, 16, generator=generator))


@torch.no_grad()
def test_cached_windows_equal_whole_causal_attention(unet: UNet):
    latent, sigma = inputs(9)
    text = prompt(unet)
    whole = unet(latent, sigma, text, attention_mode="causal")
    cache, parts = KvCache(9, 9), []
    for start in range(0, 9, 3):
        window = slice(start, start + 3)
        parts.append(unet(latent[:, :, window], sigma[:, window], text, cache=cache))
        cache = unet.extend_cache(latent[:, :, window], sigma[:, window], text, cache)
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-4, atol=1e-4)
    assert cache.seen == 9


@torch.no_grad()
def test_cache_has_a_fixed_size(unet: UNet):
    latent, sigma = inputs(3)
    text = prompt(unet)
    cache, sizes = KvCache(1, 2), set()
    for _ in range(5):
        cache = unet.extend_cache(latent, sigma, text, cache)
        sizes.add((cache.keys[0].shape, len(cache.last), cache.last[0].shape))
    assert len(sizes) == 1


@torch.no_grad()
def test_causal_attention_does_not_see_the_future(unet: UNet):
    latent, sigma = inputs(9)
    text = prompt(unet)
    changed = latent.clone()
    changed[:, :, 6:] += 1
    first, second = (unet(x, sigma, text, attention_mode="causal") for x in (latent, changed))
    torch.testing.assert_close(first[:, :, :6], second[:, :, :6])
    assert not torch.equal(first[:, :, 6:], second[:, :, 6:])
    both = unet(changed, sigma, text)
    assert not torch.allclose(unet(latent, sigma, text)[:, :, :6], both[:, :, :6])


@torch.no_grad()
def test_masked_tokens_have_no_effect(unet: UNet):
    latent, sigma = inputs(2)
    context, pooled = torch.randn(2, 6, 16), torch.randn(2, 16)
    mask = torch.arange(6)[None] < torch.tensor([[4], [4]])
    masked = unet(latent, sigma, unet.prepare_text(context, mask, pooled))
    short = unet(latent, sigma, unet.prepare_text(context[:, :4], None, pooled))
    torch.testing.assert_close(masked, short, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_frames_that_do_not_follow_each_other_are_not_mixed(unet: UNet):
    """Of a rollout's sink and recent frames, the first recent one has no neighbour in the sink."""
    unet.attentions = torch.nn.ModuleList()
    latent, sigma = inputs(4)
    text, changed = prompt(unet), latent.clone()
    changed[:, :, 1] += 1
    apart = torch.tensor([0, 1, 7, 8])
    first, second = (unet(x, sigma, text, frame_indices=apart) for x in (latent, changed))
    torch.testing.assert_close(first[:, :, 2:], second[:, :, 2:])
    together = [unet(x, sigma, text)[:, :, 2:] for x in (latent, changed)]
    assert not torch.equal(*together)


@torch.no_grad()
def test_other_sizes_are_accepted(unet: UNet):
    latent, sigma = inputs(1, size=12)
    assert unet(latent, sigma, prompt(unet)).shape == latent.shape


@torch.no_grad()
def test_a_new_network_predicts_zero_for_every_input():
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    latent, sigma = inputs(3)
    assert unet(latent, sigma, prompt(unet)).abs().max() == 0


def test_a_new_network_learns_to_pass_its_input_through():
    """It learns to predict a multiple of the input in few steps, at any magnitude."""
    torch.manual_seed(0)
    unet = UNet(CONFIG)
    optimizer = torch.optim.Adam(unet.parameters(), lr=3e-3)
    latent, sigma = inputs(1)
    errors = []
    for step in range(120):
        scale = 0.1 + 3 * torch.rand((), generator=torch.Generator().manual_seed(step))
        text = prompt(unet)
        error = (unet(latent * scale, sigma, text) + latent * scale).square().mean() / scale**2
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.1 * errors[0]
