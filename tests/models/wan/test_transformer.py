"""Parity of the Wan transformer with the original code and with diffusers, on random weights.

Rows 1 to 4 and 30 of the test matrix. Weights have unit gain, so that no branch is negligible.
"""

import math
from types import SimpleNamespace

import pytest
import torch
import wan_reference

from skyloom.core.errors import CheckpointError
from skyloom.models.attention import KvCache
from skyloom.models.base import Transformer
from skyloom.models.checkpoint import load_into
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.state_dict import WanState
from skyloom.models.wan.transformer import Wan, whole_timestep

TEXT_LENGTH = 512
TEXT_WIDTH = 32
SMALL = {"width": 96, "heads": 3, "layers": 2, "ffn": 160}
HEAD_128 = {"width": 256, "heads": 2, "layers": 2, "ffn": 320}


class Source(SimpleNamespace):
    """A state dict as a source of tensors."""

    state: dict[str, torch.Tensor]

    @property
    def shapes(self):
        return {name: tuple(value.shape) for name, value in self.state.items()}

    def read(self, name: str) -> torch.Tensor:
        return self.state[name]


def config_of(sizes, channels=(16, 16)) -> WanConfig:
    return WanConfig(*channels, **sizes, text_width=TEXT_WIDTH)


def theirs(config: WanConfig):
    """The transformer of diffusers, with random weights of unit gain."""
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(
        patch_size=config.patch,
        num_attention_heads=config.heads,
        attention_head_dim=config.head_width,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        text_dim=config.text_width,
        freq_dim=config.frequency_width,
        ffn_dim=config.ffn,
        num_layers=config.layers,
    ).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif name.endswith("scale_shift_table"):
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
    return model


def original(config: WanConfig, state):
    """The original network with the weights of diffusers' one."""
    module = wan_reference.load("wan.modules.model")
    model = module.WanModel(
        model_type="t2v",
        patch_size=config.patch,
        text_len=TEXT_LENGTH,
        in_dim=config.in_channels,
        dim=config.width,
        ffn_dim=config.ffn,
        freq_dim=config.frequency_width,
        text_dim=config.text_width,
        out_dim=config.out_channels,
        num_heads=config.heads,
        num_layers=config.layers,
        qk_norm=True,
        cross_attn_norm=True,
    ).eval()
    convert = pytest.importorskip("diffusers.loaders.single_file_utils")
    names = convert.convert_wan_transformer_to_diffusers(
        {name: torch.empty(0) for name in model.state_dict()}
    )
    pairs = zip(model.state_dict(), names, strict=True)
    model.load_state_dict({name: state[stored] for name, stored in pairs})
    return model


def ours(state, config: WanConfig) -> Wan:
    wan = Wan(config).eval()
    view = WanState(Source(state=state), config)
    load_into(wan, {name: view.read(name) for name in view.shapes})
    return wan


@pytest.fixture(scope="module")
def three():
    """The three networks on the same weights, by sizes."""
    made = {}
    for name, sizes in (("small", SMALL), ("head 128", HEAD_128)):
        config = config_of(sizes)
        reference = theirs(config)
        state = reference.state_dict()
        made[name] = (reference, original(config, state), ours(state, config))
    return made


def padded(context):
    return torch.nn.functional.pad(context, (0, 0, 0, TEXT_LENGTH - context.shape[1]))


def distance(one, other) -> float:
    return float((one - other).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("sizes", ["small", "head 128"])
@pytest.mark.parametrize(
    "grid, tokens", [((1, 4, 4), 1), ((3, 6, 4), 11), ((5, 8, 6), 512)], ids=str
)
def test_equals_the_original_code_and_diffusers(three, sizes, grid, tokens):
    reference, first, wan = three[sizes]
    torch.manual_seed(1)
    latent = torch.randn(1, 16, *grid)
    context = torch.randn(1, tokens, TEXT_WIDTH)
    timestep = torch.tensor([417])
    expected = reference(latent, timestep, padded(context), return_dict=False)[0]
    count = math.prod(grid) // 4
    by_original = first([latent[0]], timestep, [context[0]], seq_len=count)[0][None]
    sigma = torch.full((1, grid[0]), 0.417)
    made = wan(latent, sigma, wan.prepare_text(context))
    assert expected.std() > 0.1
    assert distance(by_original, expected) <= 5e-5
    assert distance(made, expected) <= 5e-5


@torch.no_grad()
def test_text_without_its_padding_gives_another_result(three):
    """What the padding is for: cut text changes the output by tens of per cent."""
    reference, _, wan = three["small"]
    latent = torch.randn(1, 16, 3, 6, 4)
    context = torch.randn(1, 11, TEXT_WIDTH)
    cut = reference(latent, torch.tensor([417]), context, return_dict=False)[0]
    made = wan(latent, torch.full((1, 3), 0.417), wan.prepare_text(context))
    assert float((made - cut).std() / cut.std()) > 0.1


@torch.no_grad()
def test_masked_tokens_count_as_padding(three):
    wan = three["small"][2]
    context = torch.randn(1, 7, TEXT_WIDTH)
    mask = torch.tensor([[True] * 4 + [False] * 3])
    latent = torch.randn(1, 16, 1, 4, 4)
    sigma = torch.full((1, 1), 0.5)
    short = wan(latent, sigma, wan.prepare_text(context[:, :4]))
    assert distance(wan(latent, sigma, wan.prepare_text(context, mask)), short) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("channels", [(36, 16), (48, 48), (96, 48)], ids=str)
def test_other_numbers_of_channels(channels):
    config = config_of(SMALL, channels)
    reference = theirs(config)
    wan = ours(reference.state_dict(), config)
    latent = torch.randn(1, channels[0], 3, 4, 4)
    context = torch.randn(1, 9, TEXT_WIDTH)
    expected = reference(latent, torch.tensor([800]), padded(context), return_dict=False)[0]
    made = wan(latent, torch.full((1, 3), 0.8), wan.prepare_text(context))
    assert expected.std() > 0.1
    assert distance(made, expected) <= 5e-5


@torch.no_grad()
@pytest.mark.parametrize("levels", [(0, 500, 999), (0, 999, 999)], ids=str)
def test_a_timestep_per_latent_frame(three, levels):
    """TI2V-5B gives every token a timestep; here tokens of a latent frame share it."""
    reference, first, wan = three["small"]
    latent = torch.randn(1, 16, 3, 4, 6)
    context = torch.randn(1, 5, TEXT_WIDTH)
    tokens = torch.tensor([levels]).repeat_interleave(6, 1)
    expected = reference(latent, tokens, padded(context), return_dict=False)[0]
    by_original = first([latent[0]], tokens, [context[0]], seq_len=18)[0][None]
    made = wan(latent, torch.tensor([levels]) / 1000, wan.prepare_text(context))
    assert distance(by_original, expected) <= 5e-5
    assert distance(made, expected) <= 5e-5


def test_timesteps_are_whole_numbers():
    for whole in range(1001):
        level = torch.tensor([[whole / 1000]])
        assert float(whole_timestep(level)) == pytest.approx(whole / 1000, abs=1e-7)
    assert float(whole_timestep(torch.tensor([[0.8329]]))) == pytest.approx(0.832)
    assert float(whole_timestep(torch.tensor([[0.99991]]))) == pytest.approx(0.999)


@torch.no_grad()
def test_original_layout_gives_the_same_network(three):
    reference, first, wan = three["small"]
    again = ours(first.state_dict(), config_of(SMALL))
    for name, value in wan.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert reference.state_dict().keys() != first.state_dict().keys()


@torch.no_grad()
def test_error_in_bf16_is_that_of_diffusers():
    """Distance to fp32, relative to diffusers' own mixture of bf16 and fp32."""
    config = config_of({"width": 768, "heads": 6, "layers": 4, "ffn": 2048})
    reference = theirs(config)
    state = {name: value.clone() for name, value in reference.state_dict().items()}
    wan = ours(state, config)
    wan.place(torch.device("cpu"), torch.bfloat16)
    latent = torch.randn(1, 16, 3, 12, 12)
    context = torch.randn(1, TEXT_LENGTH, TEXT_WIDTH) * 0.5
    levels = (999, 500, 50)
    exact = [reference(latent, torch.tensor([t]), context, return_dict=False)[0] for t in levels]
    mixed = reference.bfloat16()
    for name, parameter in mixed.named_parameters():
        if set(name.split(".")) & set(mixed._keep_in_fp32_modules):
            parameter.data = state[name].clone()
    for name, buffer in mixed.named_buffers():
        buffer.data = dict(theirs(config).named_buffers())[name]
    errors = {"ours": 0.0, "diffusers": 0.0}
    text = wan.prepare_text(context.bfloat16())
    for timestep, expected in zip(levels, exact, strict=True):
        noisy = latent.bfloat16()
        by_diffusers = mixed(
            noisy, torch.tensor([timestep]), context.bfloat16(), return_dict=False
        )[0]
        made = wan(noisy, torch.full((1, 3), timestep / 1000), text)
        errors["diffusers"] += float((by_diffusers - expected).std() / expected.std())
        errors["ours"] += float((made - expected).std() / expected.std())
    assert errors["diffusers"] > 0
    assert errors["ours"] <= 1.1 * errors["diffusers"], errors


def test_weights_of_another_model_are_refused(three):
    config = config_of(SMALL)
    state = dict(three["small"][0].state_dict())
    state["blocks.0.attn2.add_k_proj.weight"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match="add_k_proj"):
        WanState(Source(state=state), config)
    del state["blocks.0.attn2.add_k_proj.weight"]
    del state["blocks.1.attn1.to_q.weight"]
    with pytest.raises(CheckpointError, match=r"attn1\.to_q"):
        WanState(Source(state=state), config)


@torch.no_grad()
def test_cached_windows_equal_whole_causal_attention(three):
    wan = three["small"][2]
    latent = torch.randn(1, 16, 6, 4, 4)
    sigma = torch.rand(1, 6)
    text = wan.prepare_text(torch.randn(1, 5, TEXT_WIDTH))
    whole = wan(latent, sigma, text, attention_mode="causal")
    cache = KvCache(sink=3, recent=6)
    parts = []
    for start in (0, 3):
        window = latent[:, :, start : start + 3]
        level = sigma[:, start : start + 3]
        parts.append(wan(window, level, text, cache=cache))
        cache = wan.extend_cache(window, level, text, cache)
    assert isinstance(wan, Transformer)
    assert distance(torch.cat(parts, dim=2), whole) <= 1e-5 * float(whole.abs().max())
