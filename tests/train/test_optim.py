"""Muon's orthogonal steps against the singular value decomposition, and which weights take them."""

import copy

import torch
from torch import nn

from skyloom.models.dit import Dit
from skyloom.models.presets import dit_tiny
from skyloom.train.optim import Muon, OptimizerConfig, build_optimizer, orthogonalise


def test_singular_values_come_near_one_and_directions_stay():
    torch.manual_seed(0)
    for shape in ((3, 16, 40), (2, 40, 16), (1, 16, 16)):
        matrices = torch.randn(shape)
        made = orthogonalise(matrices)
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.3
        assert values.max() < 1.3
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        exact = left @ right
        alike = (made * exact).sum((1, 2)) / (made.norm(dim=(1, 2)) * exact.norm(dim=(1, 2)))
        assert alike.min() > 0.95


def test_a_batch_is_orthogonalised_matrix_by_matrix():
    torch.manual_seed(0)
    matrices = torch.randn(3, 8, 12)
    alone = torch.cat([orthogonalise(one[None]) for one in matrices])
    torch.testing.assert_close(orthogonalise(matrices), alone, atol=2e-2, rtol=0)


def test_blocks_take_orthogonal_steps_and_the_rest_takes_adamw_steps():
    torch.manual_seed(0)
    dit = Dit(dit_tiny())
    before = {name: value.detach().clone() for name, value in dit.named_parameters()}
    optimizer = build_optimizer(dit, OptimizerConfig(kind="muon", lr=0.1, weight_decay=0.0))
    assert isinstance(optimizer, Muon)
    for parameter in dit.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, value in dit.named_parameters():
        step = (before[name] - value.detach()) / 0.1
        if name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2:
            values = torch.linalg.svdvals(step) / (0.2 * max(value.shape) ** 0.5)
            assert values.max() < 1.3, name
            assert values.median() > 0.6, name
        else:
            torch.testing.assert_close(
                step.abs(), torch.ones_like(step), atol=1e-3, rtol=0, msg=name
            )


def test_muon_goes_downhill_and_its_state_comes_back():
    torch.manual_seed(0)
    target = torch.randn(8, 8)

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8, bias=False)])

        def loss(self):
            return (self.blocks[0].weight - target).square().mean()

    def steps(module, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            loss = module.loss()
            loss.backward()
            optimizer.step()
        return module.loss().item()

    config = OptimizerConfig(kind="muon", lr=0.1)
    module = Small()
    start = module.loss().item()
    optimizer = build_optimizer(module, config)
    assert steps(module, optimizer, 30) < 0.7 * start
    other = Small()
    other.load_state_dict(module.state_dict())
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(module, optimizer, 5) == steps(other, resumed, 5)
