"""Weights in 8 bits: values, joins and row orders, and the layers that dequantize at every call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skyloom.models import quantized
from skyloom.models.checkpoint import build
from skyloom.models.quantized import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    cat_rows,
    dense,
    hadamard,
    permute_rows,
)

CPU = torch.device("cpu")
CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def drawn(rows, columns, *, blocks=1, codes=torch.int8, rotation=0, seed=0):
    torch.manual_seed(seed)
    values = (40 * torch.randn(rows, columns)).clamp(-127, 127).to(codes)
    return QuantizedWeight(values, 0.01 + torch.rand(rows, blocks), rotation)


def by_hand(weight):
    """Dequantize element by element, in Python's floats."""
    width = weight.shape[1] // weight.scale.shape[1]
    codes = weight.codes.double()
    scale = weight.scale.double()
    return torch.tensor(
        [
            [codes[row, column] * scale[row, column // width] for column in range(weight.shape[1])]
            for row in range(weight.shape[0])
        ],
        dtype=torch.float64,
    )


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("blocks", [1, 4])
def test_values_are_codes_times_scales(codes, blocks):
    weight = drawn(6, 32, blocks=blocks, codes=codes)
    assert torch.equal(weight.dequantize(), by_hand(weight).float())
    assert torch.equal(weight.dequantize(torch.bfloat16), by_hand(weight).float().bfloat16())


def test_values_do_not_depend_on_how_many_rows_are_computed_at_once(monkeypatch):
    weight = drawn(7, 64, blocks=2, rotation=16)
    whole = weight.dequantize()
    monkeypatch.setattr(quantized, "_CHUNK", 130)
    assert torch.equal(weight.dequantize(), whole)


def test_rotated_codes_are_rotated_back():
    """The rotation is the fourfold Kronecker power of one matrix of 4 rows with sums of 2."""
    torch.manual_seed(0)
    base = torch.ones(4, 4) - 2 * torch.eye(4).flip(1)
    rotation = torch.kron(torch.kron(base, base), torch.kron(base, base)) / 16
    assert torch.equal(hadamard(256, CPU), rotation)
    assert torch.equal(rotation @ rotation.T, torch.eye(256))
    original = torch.randn(5, 512)
    rotated = torch.cat([original[:, :256] @ rotation, original[:, 256:] @ rotation], 1)
    scale = rotated.abs().amax(1, keepdim=True) / 127
    weight = QuantizedWeight((rotated / scale).round().to(torch.int8), scale, 256)
    error = (weight.dequantize() - original).abs().max()
    assert error < 0.1
    assert (QuantizedWeight(weight.codes, scale).dequantize() - original).abs().max() > 1


def test_a_rotation_is_a_power_of_4():
    with pytest.raises(ValueError, match="power of 4"):
        hadamard(32, CPU)


@pytest.mark.parametrize("codes", CODES)
def test_joined_and_reordered_rows_stay_quantized(codes):
    parts = [drawn(4, 32, codes=codes, seed=seed) for seed in range(3)]
    joined = cat_rows(parts)
    assert isinstance(joined, QuantizedWeight)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    index = torch.tensor([3, 1, 0, 2])
    reordered = permute_rows(parts[0], index)
    assert isinstance(reordered, QuantizedWeight)
    assert torch.equal(reordered.dequantize(), parts[0].dequantize()[index])


def test_scales_of_rows_and_of_blocks_join():
    parts = [drawn(4, 32, blocks=1), drawn(4, 32, blocks=4, seed=1)]
    joined = cat_rows(parts)
    assert joined.scale.shape == (8, 4)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize(
    "other",
    [
        drawn(2, 16, codes=torch.float8_e4m3fn),
        drawn(2, 16, rotation=16),
        torch.full((2, 16), 3.0),
    ],
)
def test_what_differs_in_kind_is_joined_dequantized(other):
    first = drawn(4, 16)
    joined = cat_rows([first, other])
    assert torch.equal(joined, torch.cat([first.dequantize(), dense(other)]))


def test_tensors_are_joined_and_reordered_alike():
    first = torch.randn(3, dtype=torch.float64)
    assert torch.equal(cat_rows([first, first]), torch.cat([first, first]))
    assert torch.equal(permute_rows(first, torch.tensor([2, 0, 1])), first[[2, 0, 1]])


def test_scales_must_fit():
    with pytest.raises(ValueError, match="do not fit"):
        QuantizedWeight(torch.zeros(4, 10, dtype=torch.int8), torch.ones(4, 3))
    with pytest.raises(ValueError, match="rotation"):
        QuantizedWeight(torch.zeros(4, 10, dtype=torch.int8), torch.ones(4, 1), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_as_with_the_dequantized_weight(dtype):
    weight = drawn(8, 32, blocks=2)
    bias = torch.randn(8)
    layer = QuantizedLinear(weight, bias)
    x = torch.randn(2, 3, 32, dtype=dtype)
    expected = F.linear(x, by_hand(weight).float().to(dtype), bias.to(dtype))
    assert torch.equal(layer(x), expected)
    assert torch.equal(QuantizedLinear(weight, None)(x), F.linear(x, weight.dequantize(dtype)))


@pytest.mark.parametrize("codes", CODES)
def test_a_cast_never_touches_codes_and_scales(codes):
    weight = drawn(8, 32, codes=codes)
    layer = QuantizedLinear(weight, torch.randn(8))
    layer.to(torch.bfloat16).half().double().to(CPU, torch.bfloat16)
    assert torch.equal(layer.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert layer.codes.dtype == codes
    assert torch.equal(layer.scale, weight.scale)
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, weight.dequantize(torch.bfloat16))
    empty = layer.to("meta")
    assert (empty.codes.dtype, empty.scale.dtype) == (codes, torch.float32)
    assert empty.codes.is_meta


def test_a_state_dict_holds_the_codes():
    weight = drawn(8, 32)
    layer = QuantizedLinear(weight, torch.randn(8))
    copy = QuantizedLinear(drawn(8, 32, seed=1), torch.zeros(8))
    copy.load_state_dict(layer.state_dict())
    x = torch.randn(4, 32)
    assert torch.equal(copy(x), layer(x))


def test_a_weight_is_replaced_by_one_of_its_shape():
    layer = QuantizedLinear(drawn(8, 32), None)
    other = drawn(8, 32, seed=1, rotation=16)
    layer.replace_weight(other)
    assert torch.equal(layer.weight, other.dequantize())
    with pytest.raises(ValueError, match="must be"):
        layer.replace_weight(drawn(4, 32))


def test_an_embedding_looks_rows_up():
    weight = drawn(20, 32, blocks=2)
    table = QuantizedEmbedding(weight, torch.float32)
    ids = torch.tensor([[0, 19, 3], [3, 3, 7]])
    assert torch.equal(table(ids), F.embedding(ids, by_hand(weight).float()))
    assert table.bfloat16()(ids).dtype == torch.bfloat16


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32, bias=False)])
        self.conv = nn.Conv1d(32, 4, 1)
        self.head = nn.Parameter(torch.zeros(4, 32))

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return x @ self.head.T

    def place(self, device, dtype):
        self.to(device, dtype)
        self.layers[1].float()


class Source:
    """Weights of `Network`; matrices are quantized."""

    def __init__(self):
        self.weights = {
            "table.weight": drawn(20, 32, blocks=2),
            "layers.0.weight": drawn(32, 32, seed=1),
            "layers.0.bias": torch.randn(32),
            "layers.1.weight": drawn(32, 32, seed=2, codes=torch.float8_e4m3fn),
            "conv.weight": torch.randn(4, 32, 1),
            "conv.bias": torch.randn(4),
            "head": drawn(4, 32, seed=3),
        }
        self.shapes = {name: tuple(value.shape) for name, value in self.weights.items()}

    def read(self, name):
        return self.weights[name]


def test_building_keeps_weights_quantized_where_layers_can():
    torch.manual_seed(0)
    source = Source()
    network = build(Network, source, CPU, torch.bfloat16)
    assert isinstance(network.table, QuantizedEmbedding)
    assert [type(layer) for layer in network.layers] == [QuantizedLinear, QuantizedLinear]
    assert network.layers[0].bias.dtype == torch.bfloat16
    assert network.layers[0].weight.dtype == torch.bfloat16
    assert network.layers[1].weight.dtype == torch.float32
    assert torch.equal(network.head, source.weights["head"].dequantize(torch.bfloat16))


def test_a_built_network_computes_as_with_dequantized_weights():
    torch.manual_seed(0)
    source = Source()
    plain = Network()
    plain.load_state_dict({name: dense(value) for name, value in source.weights.items()})
    ids = torch.arange(20)
    assert torch.equal(build(Network, source, CPU)(ids), plain(ids))
