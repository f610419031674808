"""The transformer: both attention modes, exact caching, independent samples."""

from dataclasses import replace

import pytest
import torch

from skyloom.models.attention import KvCache
from skyloom.models.base import TextCondition
from skyloom.models.diorama.v1.refiner import Detail
from skyloom.models.diorama.v1.transformer import Dit, DitConfig

FRAMES = 9
WINDOW = 3
TINY = DitConfig(
    in_channels=8,
    out_channels=8,
    width=48,
    heads=4,
    layers=2,
    ffn=96,
    text_width=16,
    pooled_text=True,
)


@pytest.fixture(scope="module")
def dit() -> Dit:
    torch.manual_seed(0)
    module = Dit(TINY).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def inputs(batch: int = 2, frames: int = FRAMES) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 8, frames, 4, 6), torch.rand(batch, frames)


def text(dit: Dit, batch: int = 2) -> TextCondition:
    mask = torch.arange(5)[None] < torch.arange(3, 3 + batch)[:, None]
    return dit.prepare_text(torch.randn(batch, 5, 16), mask, torch.randn(batch, 16))


@torch.no_grad()
def test_shape_is_kept(dit):
    latent, sigma = inputs()
    assert dit(latent, sigma, text(dit)).shape == latent.shape


@torch.no_grad()
@pytest.mark.parametrize("changed", [3, 5, 8])
def test_causal_windows_never_see_later_ones(dit, changed):
    latent, sigma = inputs()
    condition = text(dit)
    before = dit(latent, sigma, condition, attention_mode="causal")
    latent, sigma = latent.clone(), sigma.clone()
    latent[:, :, changed] += 1
    sigma[:, changed] = 1 - sigma[:, changed]
    after = dit(latent, sigma, condition, attention_mode="causal")
    kept = changed // WINDOW * WINDOW
    assert torch.equal(before[:, :, :kept], after[:, :, :kept])
    assert not torch.equal(before[:, :, kept : kept + WINDOW], after[:, :, kept : kept + WINDOW])


@torch.no_grad()
def test_bidirectional_frames_see_every_frame(dit):
    latent, sigma = inputs()
    condition = text(dit)
    before = dit(latent, sigma, condition)
    latent = latent.clone()
    latent[:, :, -1] += 1
    assert (dit(latent, sigma, condition)[:, :, 0] != before[:, :, 0]).any()


@torch.no_grad()
def test_one_window_is_equal_in_both_attention_modes(dit):
    latent, sigma = inputs(frames=WINDOW)
    condition = text(dit)
    both = [
        dit(latent, sigma, condition, attention_mode=mode) for mode in ("bidirectional", "causal")
    ]
    torch.testing.assert_close(*both)


@torch.no_grad()
def test_cached_windows_equal_whole_causal_attention(dit):
    latent, sigma = inputs()
    condition = text(dit)
    whole = dit(latent, sigma, condition, attention_mode="causal")
    cache, parts = KvCache(sink=3, recent=6), []
    for start in range(0, FRAMES, WINDOW):
        window, level = latent[:, :, start : start + WINDOW], sigma[:, start : start + WINDOW]
        parts.append(dit(window, level, condition, cache=cache))
        cache = dit.extend_cache(window, level, condition, cache)
    assert (torch.cat(parts, dim=2) - whole).abs().max() <= 1e-5 * whole.abs().max()


@torch.no_grad()
def test_cache_keeps_its_size_and_its_first_frames(dit):
    cache, sinks = KvCache(sink=1, recent=4), []
    condition = text(dit)
    for _ in range(5):
        latent, sigma = inputs(frames=WINDOW)
        cache = dit.extend_cache(latent, sigma, condition, cache)
        sinks.append(cache.keys[0][:, :, :6])
    assert cache.frames == 5
    assert cache.keys[0].shape[2] == 5 * 6
    assert all(torch.equal(sink, sinks[0]) for sink in sinks)


@torch.no_grad()
def test_batch_equals_singles(dit):
    latent, sigma = inputs(3)
    condition = text(dit, 3)
    whole = dit(latent, sigma, condition)
    for index in range(3):
        one = slice(index, index + 1)
        alone = TextCondition(
            tuple(key[one] for key in condition.keys),
            tuple(value[one] for value in condition.values),
            condition.bias[one],
            condition.pooled[one],
        )
        torch.testing.assert_close(
            dit(latent[one], sigma[one], alone), whole[one], atol=5e-5, rtol=1e-5
        )


@torch.no_grad()
def test_masked_text_is_not_read(dit):
    latent, sigma = inputs(1)
    context, mask, pooled = (
        torch.randn(1, 5, 16),
        torch.tensor([[True, True, False, False, False]]),
        torch.randn(1, 16),
    )
    longer = context.clone()
    longer[:, 2:] = 7.0
    first, second = (
        dit(latent, sigma, dit.prepare_text(c, mask, pooled)) for c in (context, longer)
    )
    assert torch.equal(first, second)


def test_a_gradient_reaches_every_parameter(dit):
    latent, sigma = inputs()
    dit(latent, sigma, text(dit), attention_mode="causal").square().mean().backward()
    silent = [name for name, parameter in dit.named_parameters() if not parameter.grad.any()]
    assert not silent


@torch.no_grad()
def test_an_untrained_step_size_embedding_has_no_effect():
    torch.manual_seed(0)
    module = Dit(replace(TINY, span=True)).eval()
    torch.nn.init.normal_(module.head.weight, std=0.2)
    latent, sigma = inputs()
    condition = text(module)
    plain = module(latent, sigma, condition)
    assert torch.equal(module(latent, sigma, condition, span=sigma / 2), plain)
    assert module.span is not None
    torch.nn.init.normal_(module.span.outer.weight)
    assert not torch.equal(module(latent, sigma, condition, span=sigma / 2), plain)
    assert torch.equal(module(latent, sigma, condition), plain)


@torch.no_grad()
def test_places_break_the_symmetry_of_identical_tokens_and_windows_agree_with_the_whole():
    torch.manual_seed(0)
    plain, placed = (
        Dit(replace(TINY, places=True)).eval(),
        Dit(replace(TINY, places=True)).eval(),
    )
    placed.load_state_dict(plain.state_dict())
    assert placed.places is not None
    torch.nn.init.normal_(placed.places.outer.weight)
    for module in (plain, placed):
        torch.nn.init.normal_(module.head.weight, std=0.2)
    latent, sigma = torch.ones(1, 8, 6, 4, 6), torch.full((1, 6), 0.5)
    condition = text(plain, 1)
    lone = torch.ones(1, 8, 1, 2, 2)
    assert plain(lone, sigma[:, :1], condition).shape == lone.shape
    whole = placed(latent, sigma, condition, attention_mode="causal")
    cache = KvCache(sink=0, recent=6)
    parts = []
    for start in (0, 3):
        part, levels = latent[:, :, start : start + 3], sigma[:, start : start + 3]
        parts.append(placed(part, levels, condition, cache=cache, attention_mode="causal"))
        cache = placed.extend_cache(part, levels, condition, cache)
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-5, rtol=0)
    assert (whole[..., 0] != whole[..., -1]).any()


@torch.no_grad()
def test_the_refiner_is_independent_per_frame():
    """Latent frames refined alone equal frames refined together."""
    torch.manual_seed(0)
    detail = Detail(4, 16, 8, (1, 2, 2))
    torch.nn.init.normal_(detail.leave.weight)
    predicted, noisy, tokens, level = (
        torch.randn(2, *shape) for shape in ((4, 3, 4, 6), (4, 3, 4, 6), (18, 16), (3, 16))
    )
    made = detail(predicted, noisy, tokens, level)
    alone = detail(predicted[:, :, 1:2], noisy[:, :, 1:2], tokens[:, 6:12], level[:, 1:2])
    assert (made[:, :, 1:2] - alone).abs().max() < 1e-5
    torch.nn.init.zeros_(detail.leave.weight)
    torch.nn.init.zeros_(detail.leave.bias)
    assert torch.equal(detail(predicted, noisy, tokens, level), predicted)
