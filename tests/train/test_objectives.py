"""Losses: 0 for a perfect student and for known frames; rollouts are windows of videos."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from skyloom.core.seeds import generator
from skyloom.data.loader import CaptionTable, LatentBatch
from skyloom.diffusion.timesteps import NoiseConfig
from skyloom.models.diorama.v1.transformer import Dit, DitConfig
from skyloom.train.objectives import (
    DistillConfig,
    FlowConfig,
    distill_losses,
    flow_losses,
    squared_error,
    temporal_error,
)

SMALL = DitConfig(4, 4, 16, 2, 2, 32, 6, pooled_text=True, span=True, prediction="velocity")
ONE_STEP = DistillConfig(guidance_scale=1.0, substeps=1, halved=0.0)


@pytest.fixture
def batch(tmp_path) -> LatentBatch:
    """Three latents of nine frames with two captions."""
    torch.manual_seed(0)
    tensors = {
        "tokens": torch.randn(5, 6),
        "lengths": torch.tensor([2, 3]),
        "pooled": torch.randn(2, 6),
    }
    save_file(
        tensors, tmp_path / "captions.safetensors", metadata={"captions": json.dumps(["", "a cat"])}
    )
    table = CaptionTable(tmp_path / "captions.safetensors")
    return LatentBatch(torch.randn(3, 4, 9, 4, 4), (1, 1, 1), table)


def rollout(batch: LatentBatch) -> LatentBatch:
    return replace(batch, frame_indices=torch.tensor([0, 1, 2, 12, 13, 14, 15, 16, 17]), past=6)


def dit_of(config: DitConfig, seed: int = 0) -> Dit:
    torch.manual_seed(seed)
    dit = Dit(config)
    for name, parameter in dit.named_parameters():
        if "outer" not in name or not name.startswith("span"):
            torch.nn.init.normal_(parameter, std=0.2)
    return dit.eval()


@pytest.mark.parametrize("seed", range(4))
def test_a_student_that_is_its_unguided_teacher_has_no_error(batch, seed):
    """One teacher step per student step, no guidance, step size without effect."""
    dit = dit_of(SMALL)
    torch.nn.init.zeros_(dit.span.outer.bias)
    for each in (batch, rollout(batch)):
        assert distill_losses(dit, dit, each, generator(seed), ONE_STEP).total.item() < 1e-9
    guided = distill_losses(dit, dit, batch, generator(seed), replace(ONE_STEP, guidance_scale=3.0))
    assert guided.total.item() > 1e-4


@pytest.mark.parametrize("seed", range(6))
def test_a_straight_path_is_the_same_in_one_step_or_two(batch, seed):
    """A model with a constant velocity agrees with its own two half steps."""
    dit = dit_of(SMALL)
    torch.nn.init.zeros_(dit.head.weight)
    losses = distill_losses(dit, dit, batch, generator(seed), replace(ONE_STEP, halved=1.0))
    assert losses.total.item() < 1e-9
    assert next(iter(losses.parts)) in ("2 steps", "1 steps")


def test_only_the_student_learns(batch):
    student, teacher = dit_of(SMALL), dit_of(SMALL, seed=1)
    distill_losses(
        student, teacher, batch, generator(0), DistillConfig(halved=0.0)
    ).total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    grads = {
        name
        for name, value in student.named_parameters()
        if value.grad is not None and value.grad.any()
    }
    assert "span.outer.weight" in grads


def test_known_frames_carry_no_error(batch):
    """The loss of a rollout counts its window alone."""
    dit = dit_of(SMALL)
    losses = flow_losses(
        dit, rollout(batch), generator(3), FlowConfig(NoiseConfig(context_noise=0.0))
    )
    assert set(losses.parts) == {"rollout"}
    plain = flow_losses(dit, batch, generator(3), FlowConfig(causal_share=1.0))
    assert set(plain.parts) == {"causal"}


def test_frames_of_a_rollout_are_numbered_in_their_video(batch):
    dit = dit_of(replace(SMALL, places=True, horizon=9))
    with torch.no_grad():
        late = flow_losses(dit, rollout(batch), generator(3), FlowConfig()).total.item()
        later = replace(
            rollout(batch), frame_indices=torch.tensor([0, 1, 2, 30, 31, 32, 33, 34, 35])
        )
        early = replace(rollout(batch), frame_indices=torch.arange(9))
        assert flow_losses(dit, later, generator(3), FlowConfig()).total.item() == pytest.approx(
            late
        )
        assert flow_losses(dit, early, generator(3), FlowConfig()).total.item() != pytest.approx(
            late
        )


def test_excerpts_use_bidirectional_attention(batch):
    dit = dit_of(replace(SMALL, places=True, horizon=9))
    middle = replace(batch, frame_indices=torch.arange(12, 21))
    losses = flow_losses(dit, middle, generator(3), FlowConfig(causal_share=1.0))
    assert set(losses.parts) == {"middle"}
    made = distill_losses(
        dit, dit, middle, generator(3), replace(ONE_STEP, causal_share=1.0, halved=0.0)
    )
    assert set(made.parts) == {"middle"}


def test_constant_errors_have_no_temporal_error():
    gap, weight = torch.randn(4, 8, 5, 6, 6, generator=generator(0)), torch.ones(4, 5)
    assert temporal_error(gap[:, :, :1].expand_as(gap), weight).item() == 0
    assert temporal_error(gap, weight).item() == pytest.approx(
        squared_error(gap, weight).item(), rel=0.1
    )
    known = torch.tensor([[0.0, 0.0, 1.0, 1.0, 1.0]]).expand(4, -1)
    moved = gap.clone()
    moved[:, :, :2] += 7
    assert torch.equal(temporal_error(moved, known), temporal_error(gap, known))
    at_the_seam = torch.zeros_like(gap)
    at_the_seam[:, :, 2:] = 1
    assert temporal_error(at_the_seam, known).item() == pytest.approx(1 / 6)
