"""The mean-latent predictor and weights that grow: a larger model computes the same function."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from diorama.train.setups import (
    expand_weights,
    sketch_error,
    sketch_losses,
    weighted_sketch_losses,
)
from skyloom.core.seeds import generator
from skyloom.data.loader import CaptionTable, LatentBatch
from skyloom.models.diorama.v1.transformer import Dit, DitConfig
from skyloom.train.objectives import FlowConfig, flow_losses

SMALL = DitConfig(4, 4, 16, 2, 2, 32, 6, pooled_text=True, span=True, prediction="velocity")


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


def dit_of(config: DitConfig, seed: int = 0) -> Dit:
    torch.manual_seed(seed)
    dit = Dit(config)
    for name, parameter in dit.named_parameters():
        if "outer" not in name or not name.startswith("span"):
            torch.nn.init.normal_(parameter, std=0.2)
    return dit.eval()


def test_the_mean_latent_is_compared_with_the_videos(batch):
    dit = dit_of(replace(SMALL, sketch=3))
    attributes = batch.captions(torch.zeros(3, dtype=torch.bool))[2][:, -3:]
    drawn = dit.draw_sketch(attributes, 9, 4, 4).detach()
    assert sketch_error(dit, drawn, attributes).item() == 0
    assert sketch_error(dit, drawn + 2, attributes).item() == pytest.approx(4, rel=1e-4)
    sketch_losses(dit, batch).total.backward()
    moved = {name.split(".")[0] for name, value in dit.named_parameters() if value.grad is not None}
    assert moved == {"sketch"}


def test_a_larger_model_computes_the_same_function(batch):
    old = dit_of(SMALL)
    wide = replace(SMALL, text_width=10, pooled_width=12, places=True, sketch=4, detail=8)
    torch.manual_seed(3)
    new = Dit(wide).eval()
    state = {
        name: value for name, value in old.state_dict().items() if not name.startswith("span.")
    }
    new.load_state_dict(expand_weights(state, new.state_dict()))
    latent, sigma = batch.latent, torch.full((3, 9), 0.5)
    context, pooled = torch.randn(3, 5, 10), torch.randn(3, 12)
    with torch.no_grad():
        before = old(latent, sigma, old.prepare_text(context[..., :6], None, pooled[:, :6]))
        after = new(latent, sigma, new.prepare_text(context, None, pooled))
    assert (before - after).abs().max() < 1e-5 * before.abs().max()


def test_new_refiner_blocks_have_no_effect(batch):
    old = dit_of(replace(SMALL, detail=8))
    assert old.detail is not None
    torch.nn.init.normal_(old.detail.leave.weight)
    new = dit_of(replace(SMALL, detail=8, detail_blocks=4), seed=5)
    new.load_state_dict(expand_weights(old.state_dict(), new.state_dict()))
    latent, sigma = batch.latent, torch.full((3, 9), 0.5)
    context, pooled = torch.randn(3, 5, 6), torch.randn(3, 6)
    with torch.no_grad():
        before, after = (
            dit(latent, sigma, dit.prepare_text(context, None, pooled)) for dit in (old, new)
        )
    assert torch.equal(before, after)


def test_the_weighted_sketch_error_is_added_to_the_velocity_error(batch):
    dit = dit_of(replace(SMALL, sketch=3))

    def auxiliary(network, batch, text):
        return weighted_sketch_losses(network, batch, text, 0.5)

    plain = flow_losses(dit, batch, generator(3), FlowConfig())
    both = flow_losses(dit, batch, generator(3), FlowConfig(), auxiliary)
    assert set(both.parts) == {*plain.parts, "sketch"}
    assert torch.equal(both.total, plain.total + 0.5 * both.parts["sketch"])
    middle = replace(batch, frame_indices=torch.arange(12, 21))
    assert "sketch" not in flow_losses(dit, middle, generator(3), FlowConfig(), auxiliary).parts
