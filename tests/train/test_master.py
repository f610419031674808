"""bf16 training with fp32 master weights: small updates add up, clipping equals torch's."""

import torch
from torch import nn

from skyloom.train.master import MasterWeights


def test_updates_smaller_than_bf16_can_hold_add_up():
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    weights = MasterWeights(layer, torch.bfloat16)
    optimizer = torch.optim.SGD(weights.master.parameters(), lr=1e-4)
    for _ in range(200):
        layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        weights.clip_gradients(10.0)
        optimizer.step()
        weights.publish()
    assert abs(float(weights.master.weight.detach()) - 0.98) < 1e-5
    assert layer.weight.dtype == torch.bfloat16
    assert abs(float(layer.weight.detach()) - 0.98) < 4e-3


def test_gradients_are_clipped_as_torch_does():
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).bfloat16().float()  # weights that bf16 holds exactly
    weights, twin = MasterWeights(nn.Linear(4, 4), torch.bfloat16), layer
    weights.master.load_state_dict(layer.state_dict())
    weights.publish()
    x = torch.randn(3, 4).bfloat16()
    weights.module(x).float().square().sum().backward()
    twin(x.float()).square().sum().backward()
    norm = weights.clip_gradients(0.5)
    expected = float(nn.utils.clip_grad_norm_(twin.parameters(), 0.5))
    assert abs(norm - expected) < 0.02 * expected
    assert weights.master.weight.grad is not None
    torch.testing.assert_close(weights.master.weight.grad, twin.weight.grad, rtol=0.05, atol=5e-3)
    assert weights.module.weight.grad is None


def test_fp32_needs_no_copy():
    layer = nn.Linear(2, 2)
    weights = MasterWeights(layer, torch.float32)
    assert weights.master is layer
