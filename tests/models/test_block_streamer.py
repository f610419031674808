"""Streamed blocks equal resident ones bit for bit, and at most two of them are on the device."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from skyloom.models.block_streamer import BlockStreamer
from skyloom.models.quantized import QuantizedLinear, QuantizedWeight
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.transformer import Wan

CPU = torch.device("cpu")
CONFIG = WanConfig(4, 4, width=48, heads=4, layers=3, ffn=80, text_width=20, text_length=8)
TIME = torch.full((1, 2), 0.6)


def quantize(network: nn.Module) -> None:
    """Replace the linear layers of the blocks by ones in int8 and fp8."""
    names = [name for name, one in network.named_modules() if type(one) is nn.Linear]
    for index, name in enumerate(name for name in names if name.startswith("blocks.")):
        layer = network.get_submodule(name)
        scale = layer.weight.abs().amax(dim=1, keepdim=True) / 100
        kind = torch.int8 if index % 2 else torch.float8_e4m3fn
        weight = QuantizedWeight((layer.weight / scale).round().to(kind), scale)
        network.set_submodule(name, QuantizedLinear(weight, layer.bias.data, layer.weight.dtype))


@torch.no_grad()
def make(dtype: torch.dtype, *, quantized: bool) -> Wan:
    torch.manual_seed(5)
    network = Wan(CONFIG)
    for name, weight in network.named_parameters():
        weight.normal_(std=weight.shape[-1] ** -0.5 if "weight" in name else 0.1)
    if quantized:
        quantize(network)
    network.place(CPU, dtype)
    return network


@torch.no_grad()
def run(network: Wan) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    dtype = network.dtype
    text = network.prepare_text(torch.randn(1, 5, 20, generator=generator).to(dtype))
    latent = torch.randn(1, 4, 2, 4, 6, generator=generator).to(dtype)
    return network(network(latent, TIME, text), TIME, text)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_equals_resident(dtype, quantized):
    network = make(dtype, quantized=quantized)
    kept = {name: value.clone() for name, value in network.state_dict().items()}
    resident = run(network)
    assert resident.float().std() > 0.1
    network.stream_blocks(CPU)
    assert torch.equal(run(network), resident)
    assert torch.equal(run(network), resident)
    network.stream_blocks(None)
    assert torch.equal(run(network), resident)
    after = network.state_dict()
    assert all(torch.equal(after[name].float(), value.float()) for name, value in kept.items())


def test_a_block_runs_in_a_buffer_and_the_next_one_lies_in_the_other():
    blocks = [nn.Linear(3, 3) for _ in range(3)]
    values = [block.weight.detach().clone() for block in blocks]
    streamer = BlockStreamer(blocks, CPU)
    homes = [block.weight.data_ptr() for block in blocks]
    places: list[int] = []
    for _ in range(2):
        for index, block in enumerate(streamer):
            places.append(block.weight.data_ptr())
            assert torch.equal(block.weight, values[index])
            assert block.weight.data_ptr() not in homes
            others = [one for one in range(3) if one != index]
            assert [blocks[one].weight.data_ptr() for one in others] == [homes[i] for i in others]
    assert len(set(places)) == 2
    assert all(one != other for one, other in pairwise(places))
    assert [block.weight.data_ptr() for block in blocks] == homes
    assert streamer.device_bytes == 2 * 2 * 256


def test_a_pass_that_was_given_up_does_not_disturb_the_next_one():
    blocks = [nn.Linear(2, 2) for _ in range(3)]
    values = [block.weight.detach().clone() for block in blocks]
    streamer = BlockStreamer(blocks, CPU)
    abandoned = iter(streamer)
    next(abandoned)
    next(abandoned)
    for block, value in zip(streamer, values, strict=True):
        assert torch.equal(block.weight, value)
    streamer.close()
    assert all(torch.equal(a.weight, b) for a, b in zip(blocks, values, strict=True))


def test_blocks_of_different_sizes_strides_and_a_single_block():
    wide = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    blocks = [wide, nn.Linear(40, 40), nn.Linear(1, 1)]
    expected = [block.weight.detach().clone() for block in blocks]
    for chosen in (blocks, blocks[:1]):
        for _ in range(2):
            for block, value in zip(BlockStreamer(chosen, CPU), expected, strict=False):
                assert torch.equal(block.weight, value)
                assert block.weight.stride() == value.stride()
