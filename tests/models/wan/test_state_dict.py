"""Parity with diffusers' WanTransformer3DModel on the same random weights."""

import pytest
import torch

from skyloom.core.errors import CheckpointError
from skyloom.models.attention import KvCache
from skyloom.models.base import Transformer
from skyloom.models.checkpoint import load_into
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.state_dict import wan_from_diffusers
from skyloom.models.wan.transformer import Wan

CONFIG = WanConfig(
    in_channels=6, out_channels=6, width=48, heads=4, layers=3, ffn=80, text_width=20
)


@pytest.fixture(scope="module")
def theirs():
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=CONFIG.patch,
        num_attention_heads=CONFIG.heads,
        attention_head_dim=CONFIG.head_width,
        in_channels=CONFIG.in_channels,
        out_channels=CONFIG.out_channels,
        text_dim=CONFIG.text_width,
        freq_dim=CONFIG.frequency_width,
        ffn_dim=CONFIG.ffn,
        num_layers=CONFIG.layers,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="module")
def ours(theirs) -> Wan:
    wan = Wan(CONFIG).eval()
    load_into(wan, wan_from_diffusers(theirs.state_dict(), CONFIG))
    return wan


@pytest.mark.parametrize("size", [(1, 4, 4), (3, 4, 6), (5, 6, 2)])
def test_parity_with_one_timestep(theirs, ours, size):
    latent, context = torch.randn(2, 6, *size), torch.randn(2, 7, 20)
    sigma = torch.tensor([0.3, 0.95])
    with torch.no_grad():
        expected = theirs(latent, sigma * 1000, context, return_dict=False)[0]
        made = ours(latent, sigma[:, None].expand(-1, size[0]), ours.prepare_text(context))
    assert expected.std() > 0.1
    assert (made - expected).abs().max() <= 1e-4


def test_parity_with_a_timestep_per_latent_frame(theirs, ours):
    """Wan 2.2's 5 B model gives every token its own timestep; here tokens of a frame share one."""
    latent, context = torch.randn(1, 6, 3, 4, 4), torch.randn(1, 5, 20)
    sigma = torch.tensor([[0.0, 0.5, 1.0]])
    with torch.no_grad():
        expected = theirs(
            latent, (1000 * sigma).repeat_interleave(4, 1), context, return_dict=False
        )[0]
        made = ours(latent, sigma, ours.prepare_text(context))
    assert (made - expected).abs().max() <= 1e-4


def test_weights_of_another_shape_of_model_are_refused(theirs):
    state = {**theirs.state_dict(), "blocks.0.attn2.add_k_proj.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="add_k_proj"):
        wan_from_diffusers(state, CONFIG)


@torch.no_grad()
def test_cached_windows_equal_whole_causal_attention(ours):
    latent, sigma = torch.randn(1, 6, 6, 4, 4), torch.rand(1, 6)
    text = ours.prepare_text(torch.randn(1, 5, 20))
    whole = ours(latent, sigma, text, attention_mode="causal")
    cache, parts = KvCache(sink=3, recent=6), []
    for start in (0, 3):
        window, level = latent[:, :, start : start + 3], sigma[:, start : start + 3]
        parts.append(ours(window, level, text, cache=cache))
        cache = ours.extend_cache(window, level, text, cache)
    assert isinstance(ours, Transformer)
    assert (torch.cat(parts, dim=2) - whole).abs().max() <= 1e-5 * whole.abs().max()
