"""Adapters: merged equals attached, unmerging restores bits, files of other models are refused."""

import pytest
import torch
from torch import nn

from skyloom.core.errors import CheckpointError, RequestError
from skyloom.models.diorama.config import UNetConfig
from skyloom.models.diorama.transformer import UNet
from skyloom.models.lora import (
    LoraAdapter,
    LoraStack,
    adaptable_layers,
    load_lora,
    save_lora,
    with_adapters,
)

BASE = "0" * 64  # digest of the weights of a model
CONVOLUTIONS = {
    "plain": nn.Conv2d(8, 12, 3, padding=1),
    "strided": nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(8, 12, 3, dilation=2),
    "same": nn.Conv2d(8, 12, 3, padding="same"),
    "grouped": nn.Conv2d(8, 12, 3, groups=4),
    "depthwise": nn.Conv2d(8, 8, 3, groups=8, bias=False),
    "grouped and strided": nn.Conv2d(8, 12, (3, 1), stride=(2, 1), groups=2),
}


def adapter_of(network: nn.Module, seed: int, rank: int = 2) -> LoraAdapter:
    """An adapter of every layer, with random values in both matrices."""
    torch.manual_seed(seed)
    adapter = LoraAdapter.start(network, adaptable_layers(network), rank, alpha=3.0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.3)
    adapter.family = "diorama"
    adapter.base = BASE
    return adapter


def bits(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("layer", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_merged_convolution_equals_an_attached_one(layer):
    network = nn.Sequential(layer)
    x = torch.randn(2, 8, 9, 10)
    plain = network(x)
    stack = LoraStack(network)
    adapter = adapter_of(network, 0)
    stack.attach([(adapter, 0.7)])
    attached = network(x)
    stack.detach()
    assert torch.equal(network(x), plain)
    stack.merge([(adapter, 0.7)])
    torch.testing.assert_close(network(x), attached, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(attached, plain, atol=0.1)
    stack.unmerge()


@torch.no_grad()
def test_several_adapters_with_weights_in_a_whole_network():
    torch.manual_seed(0)
    network = UNet(UNetConfig(channels=4, widths=(8, 16), blocks=(1, 1, 1, 1), heads=2)).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    latent = torch.randn(1, 4, 3, 4, 4)
    sigma = torch.full((1, 3), 0.5)
    context = torch.randn(1, 5, 768)

    def predict() -> torch.Tensor:
        text = network.prepare_text(context, None, torch.randn(1, 1024, generator=rng(1)))
        return network(latent, sigma, text)

    plain = predict()
    before = bits(network)
    pair = [(adapter_of(network, 1), 0.5), (adapter_of(network, 2, rank=3), -0.2)]
    stack = LoraStack(network)
    stack.attach(pair)
    attached = predict()
    stack.detach()
    stack.merge(pair[:1])
    stack.merge(pair[1:])
    scale = attached.abs().max()
    assert (predict() - attached).abs().max() <= 1e-5 * scale
    assert (attached - plain).abs().max() > 0.01 * scale
    stack.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(predict(), plain)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def test_unmerging_restores_bits_in_bf16():
    network = nn.Sequential(nn.Linear(16, 8)).to(torch.bfloat16)
    before = bits(network)
    stack = LoraStack(network)
    stack.merge([(adapter_of(network, 0), 1.0)])
    assert not torch.equal(network[0].weight, before["0.weight"])
    stack.unmerge()
    assert torch.equal(network[0].weight, before["0.weight"])


def test_an_untrained_adapter_has_no_effect_and_gradients_reach_it():
    network = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    x = torch.randn(3, 6)
    plain = network(x)
    adapter = LoraAdapter.start(network, adaptable_layers(network), 2, alpha=2.0)
    stack = LoraStack(network)
    stack.attach([(adapter, 1.0)])
    assert torch.equal(network(x), plain)
    network(x).square().sum().backward()
    assert all(change.up.grad.any() for change in adapter.by_name.values())


def test_a_saved_adapter_comes_back_whole(tmp_path):
    network = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(4, 4, 3, groups=2))
    network.add_module("up", nn.Linear(3, 2))
    network.add_module("down", nn.Linear(2, 3))
    adapter = adapter_of(network, 0)
    save_lora(tmp_path / "a.safetensors", adapter)
    loaded = load_lora(tmp_path / "a.safetensors", network, family="diorama", base=BASE)
    assert (loaded.rank, loaded.alpha, set(loaded.names)) == (2, 3.0, set(adapter.names))
    for name, change in adapter.by_name.items():
        assert torch.equal(loaded.by_name[name].delta(), change.delta())


def test_files_of_other_models_and_damaged_ones_are_refused(tmp_path):
    network = nn.Sequential(nn.Linear(6, 5))
    path = tmp_path / "a.safetensors"
    adapter = adapter_of(network, 0)
    save_lora(path, adapter)
    with pytest.raises(CheckpointError, match=r"family of .* must be wan, got diorama"):
        load_lora(path, network, family="wan", base=BASE)
    with pytest.raises(CheckpointError, match="base of"):
        load_lora(path, network, family="diorama", base="1" * 64)
    with pytest.raises(CheckpointError, match=r"0\.down of .* must be \(2, 7\), got \(2, 6\)"):
        load_lora(path, nn.Sequential(nn.Linear(7, 5)), family="diorama", base=BASE)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_lora(path, nn.Sequential(nn.ReLU()), family="diorama", base=BASE)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="is damaged"):
        load_lora(path, network, family="diorama", base=BASE)


def test_layers_that_cannot_be_adapted_are_refused():
    network = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), nn.ReLU())
    assert adaptable_layers(network) == []
    for name in ("0", "1", "2"):
        with pytest.raises(RequestError):
            LoraAdapter.start(network, [name], 1, alpha=1.0)
    with pytest.raises(RequestError, match=r"rank must be >= 1, got 0"):
        LoraAdapter.start(nn.Sequential(nn.Linear(2, 2)), ["0"], 0, alpha=1.0)


@torch.no_grad()
def test_a_network_with_adapters_shares_the_weights_and_leaves_the_other_as_it_is():
    shared = nn.Linear(6, 6)
    network = nn.Sequential(shared, nn.Sequential(nn.ReLU(), shared), nn.BatchNorm1d(6)).eval()
    x = torch.randn(3, 6)
    plain = network(x)
    adapter = LoraAdapter.start(network, ["0"], 2, alpha=2.0)
    nn.init.normal_(adapter.by_name["0"].up)
    view = with_adapters(network, [(adapter, 0.5)])
    other = with_adapters(view, [(adapter, -0.5)])
    assert not torch.equal(view(x), plain)
    torch.testing.assert_close(other(x), plain)
    assert torch.equal(network(x), plain)
    assert view[0] is view[1][1]
    network.to(torch.float64)
    assert {value.dtype for value in view.state_dict().values()} == {torch.float64, torch.int64}
    assert view[0].weight is network[0].weight
