"""Jitter is held still, movement passes, and it is the same window by window."""

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image

from skyloom.generate.cards import Card
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.memory import MemoryGuard
from skyloom.generate.request import Request
from skyloom.generate.temporal_smoothing import smooth_latent

LEVEL = 0.5


def clip(jitter: float) -> torch.Tensor:
    """A still latent of 12 frames with so much jitter, root mean square over channels."""
    random = torch.Generator().manual_seed(0)
    still = torch.randn(1, 48, 1, 4, 4, generator=random)
    return still + jitter * torch.randn(1, 48, 12, 4, 4, generator=random)


def change(latent: torch.Tensor) -> float:
    return float(latent.diff(dim=2).square().mean().sqrt())


def test_small_changes_nearly_vanish_and_large_ones_stay():
    assert change(smooth_latent(clip(0.1), None, LEVEL)) < 0.1 * change(clip(0.1))
    assert change(smooth_latent(clip(2.0), None, LEVEL)) > 0.95 * change(clip(2.0))
    one = torch.zeros(1, 48, 2, 1, 1)
    one[:, :, 1] = LEVEL
    assert smooth_latent(one, None, LEVEL)[0, 0, 1, 0, 0] == pytest.approx(LEVEL / 2)


def test_the_first_frame_stays_and_no_level_changes_nothing():
    latent = clip(0.1)
    assert torch.equal(smooth_latent(latent, None, LEVEL)[:, :, 0], latent[:, :, 0])
    assert smooth_latent(latent, None, 0.0) is latent


def test_parts_one_after_another_equal_the_whole():
    latent = clip(0.3)
    whole = smooth_latent(latent, None, LEVEL)
    first = smooth_latent(latent[:, :, :5], None, LEVEL)
    assert torch.equal(
        torch.cat([first, smooth_latent(latent[:, :, 5:], first[:, :, -1], LEVEL)], dim=2), whole
    )


def test_a_steady_video_begins_the_same_however_long_it_is(tiny_model):
    import skyloom

    pipeline = copy.copy(skyloom.load(str(tiny_model)))
    ask = Request("a cat", seed=3, seconds=2)
    plain = pipeline.generate(ask).frames
    pipeline.info = replace(pipeline.info, manifest={**pipeline.info.manifest, "steadiness": 2.0})
    made = pipeline.generate(ask).frames
    assert torch.equal(made[:1], plain[:1])
    assert not torch.equal(made, plain)
    assert torch.equal(pipeline.generate(replace(ask, seconds=3)).frames[: len(made)], made)


def test_known_frames_stay_and_the_next_goes_on_from_them():
    latent = clip(0.1)
    held = smooth_latent(latent, None, LEVEL, known=(4, 5))
    assert torch.equal(held[:, :, 4:6], latent[:, :, 4:6])
    assert torch.equal(held[:, :, :4], smooth_latent(latent, None, LEVEL)[:, :, :4])
    assert torch.equal(held[:, :, 6:], smooth_latent(latent[:, :, 6:], latent[:, :, 5], LEVEL))


def test_pinned_pictures_are_decoded_from_their_own_latents_and_the_network_sees_the_same(
    tiny_model, tmp_path, monkeypatch
):
    """Fixed pictures at the start and inside a shot are not smoothed; others are."""
    import skyloom

    monkeypatch.setenv("SKYLOOM_CACHE", "off")

    for number, name in enumerate(("first", "middle")):
        Image.effect_noise((32, 32), 40 + 40 * number).convert("RGB").save(tmp_path / f"{name}.png")
    pipeline = copy.copy(skyloom.load(str(tiny_model), dtype="float32"))
    steps = {"seed": 3, "seconds": 3.0, "num_steps": 1}
    middle = {"at": "1.5", "prompt": "a dog", "image": str(tmp_path / "middle.png")}
    request = Request(
        "", cards=(Card("0", "a cat", image=str(tmp_path / "first.png")), Card(**middle)), **steps
    )
    decode, velocity = pipeline.autoencoder.decode_step, Denoiser.velocity
    decoded, seen = [], []
    monkeypatch.setattr(
        pipeline.autoencoder,
        "decode_step",
        lambda part, memory: decoded.append(part) or decode(part, memory),
    )
    monkeypatch.setattr(
        Denoiser, "velocity", lambda self, *given: seen.append(given[0]) or velocity(self, *given)
    )

    def shown(request, level):
        decoded.clear()
        seen.clear()
        pipeline.info = replace(
            pipeline.info, manifest={**pipeline.info.manifest, "steadiness": level}
        )
        pipeline.generate(request)
        return torch.cat(decoded, dim=2)[0].unbind(1), list(seen)

    (plain, network), (held, same) = shown(request, 0.0), shown(request, 2.0)
    assert all(torch.equal(one, other) for one, other in zip(network, same, strict=True))
    plan = pipeline.plan(request)
    conditioning = pipeline._conditioning(
        plan, plan.runs[0], MemoryGuard(pipeline.bundle, pipeline.executor)
    )
    first, second = (conditioning.known[at].latent for at in sorted(conditioning.fixed))
    for latent in (first, second):
        assert any(torch.equal(cell, latent) for cell in plain)
        assert any(torch.equal(cell, latent) for cell in held)
    assert torch.equal(held[0], first)
    picture = replace(request, prompt="a cat", cards=(), image=str(tmp_path / "first.png"))
    assert torch.equal(shown(picture, 2.0)[0][0], first)
    moving = replace(request, cards=(request.cards[0], Card(**middle, strength=0.01)))
    assert not any(torch.equal(cell, second) for cell in shown(moving, 2.0)[0])
