"""Rollouts: independent of length, cached equals uncached, frames stream in order."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import skyloom
from skyloom.core.errors import RequestError
from skyloom.core.types import LatentShape, ScaleFactors
from skyloom.diffusion.canvas import Canvas
from skyloom.diffusion.schedule import make_sigmas
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.executor import DeterministicExecutor
from skyloom.generate.request import Request
from skyloom.generate.sampling import SamplingSpec, generate_windows
from skyloom.generate.timeline import Generate
from skyloom.generate.windows import MAX_KNOWN, shot_windows
from skyloom.models.attention import KvCache
from skyloom.models.diorama.v1.transformer import Dit, DitConfig
from skyloom.models.registry import Rollout

LONG = Request("a red cat on the beach", seed=7, seconds=2.5)
THREES = Rollout(sink=3, recent=3, window=3)


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), dtype="bfloat16")


def make_windows(frames, native, rollout):
    """The windows of a prompt whose video has a number of latent frames."""
    scale = ScaleFactors(4, 16)
    return shot_windows((Generate(scale.video_frames(frames), "a cat"),), scale, native, rollout)


@given(st.integers(1, 200), st.integers(1, 21), st.integers(1, 7))
def test_windows_follow_one_another_and_show_every_frame_once(frames, native, size):
    windows = make_windows(frames, native, Rollout(1, 2, size))
    shown = [frame for window in windows for frame in range(window.start, window.decode_until)]
    assert shown == list(range(frames))
    assert [window.index for window in windows] == list(range(len(windows)))
    assert all(window.stop - window.start == size for window in windows[1:])


@given(st.integers(1, 200), st.integers(3, 21))
def test_windows_without_a_rollout_see_the_latent_frames_before_them(frames, native):
    windows = make_windows(frames, native, None)
    shown = [frame for window in windows for frame in range(window.generated[0], window.stop)]
    assert shown == list(range(frames))
    assert all(window.stop - window.start <= native for window in windows)
    seen = [window.generated[0] - window.start for window in windows]
    assert seen == [0] + [min(MAX_KNOWN, (native - 1) // 2)] * (len(windows) - 1)


def test_a_window_must_hold_known_frames_and_new_ones():
    with pytest.raises(RequestError, match="must be >= 9 frames for videos of several windows"):
        make_windows(50, 2, None)
    assert len(make_windows(2, 2, None)) == 1


@pytest.mark.parametrize("quality", ["fast", "best"])
def test_a_longer_video_begins_like_a_shorter_one(pipeline, quality):
    short = pipeline.generate(replace(LONG, quality=quality)).frames
    long = pipeline.generate(replace(LONG, quality=quality, seconds=4)).frames
    assert (len(short), len(long)) == (41, 65)
    assert torch.equal(long[: len(short)], short)


def test_two_threads_make_the_same_bits(pipeline):
    first = pipeline.generate(LONG).frames
    torch.set_num_threads(2)
    assert torch.equal(pipeline.generate(LONG).frames, first)


def test_frames_come_in_order_while_the_rest_is_made_and_need_not_be_kept(pipeline):
    steps = list(pipeline.stream(LONG, collect=False))
    whole = pipeline.generate(LONG)
    parts = [step.frames for step in steps if step.frames is not None]
    assert torch.equal(torch.cat(parts), whole.frames)
    assert steps[-1].video is None
    assert steps[-1].receipt == whole.receipt
    phases = [step.phase for step in steps]
    assert phases.index("decode") < len(phases) - 1 - phases[::-1].index("denoise")
    decoded = [(step.index, step.total) for step in steps if step.phase == "decode"]
    ends = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
    assert decoded == [(end, len(whole.frames)) for end in ends]


def test_frames_left_out_are_left_out_across_windows(pipeline):
    every = pipeline.generate(LONG).frames
    assert torch.equal(pipeline.generate(replace(LONG, fps=4)).frames, every[::4])


def test_a_picture_starts_a_long_video(pipeline, tmp_path):
    Image.new("RGB", (32, 32), (200, 30, 60)).save(tmp_path / "red.png")
    short = pipeline.generate(replace(LONG, seconds=0.25, image=str(tmp_path / "red.png"))).frames
    long = pipeline.generate(replace(LONG, image=str(tmp_path / "red.png"))).frames
    assert torch.equal(short[0], long[0])


def test_a_stream_can_be_left_after_any_step(pipeline):
    total = len(list(pipeline.stream(LONG)))
    for count in (1, total // 2, total - 1):
        stream = pipeline.stream(LONG)
        for _ in range(count):
            next(stream)
        stream.close()
    assert len(list(pipeline.stream(LONG))) == total


def _tiny_dit(horizon):
    torch.manual_seed(1)
    config = DitConfig(
        4, 4, 32, 2, 2, 64, 16, pooled_text=True, span=True, places=True, sketch=4, horizon=horizon
    )
    dit = Dit(config)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return dit


@pytest.mark.parametrize("horizon", [0, 6])
@torch.no_grad()
def test_the_memory_equals_the_whole(horizon):
    """Window by window with a cache, and all at once under the block-causal mask, to 1e-5."""
    dit = _tiny_dit(horizon)
    text = dit.prepare_text(torch.randn(1, 5, 16), None, torch.randn(1, 16))
    latent = torch.randn(1, 4, 9, 4, 4)
    denoiser = Denoiser(dit, DeterministicExecutor(torch.device("cpu")), [text], 1.0, student=True)
    denoiser.cache_frames(latent[:, :, :6], THREES, 0.0)
    sigma = torch.full((1, 3), 0.6)
    made = denoiser.velocity(latent[:, :, 6:], sigma, torch.full((1, 3), 0.2))
    levels, spans = (
        torch.cat([torch.zeros(1, 6), torch.full((1, 3), level)], 1) for level in (0.6, 0.2)
    )
    whole = dit(latent, levels, text, attention_mode="causal", span=spans)
    assert (made - whole[:, :, 6:]).abs().max() < 1e-5 * whole.abs().max()


class Uncached:
    """A denoiser without a cache: every step reads all frames under the block-causal mask."""

    def __init__(self, dit, text):
        self.dit, self.text = dit, text
        self.past, self.levels = torch.zeros(1, 4, 0, 4, 4), torch.zeros(1, 0)

    def velocity(self, latent, sigma, span):
        if not self.past.shape[2]:
            return self.dit(latent, sigma, self.text, span=span)
        seen, levels = torch.cat([self.past, latent], 2), torch.cat([self.levels, sigma], 1)
        spans = torch.cat([torch.zeros_like(self.levels), span], 1)
        return self.dit(seen, levels, self.text, attention_mode="causal", span=spans)[
            :, :, self.past.shape[2] :
        ]

    def cache_frames(self, latent, rollout, level):
        self.past = torch.cat([self.past, latent], 2)
        self.levels = torch.cat([self.levels, torch.full((1, latent.shape[2]), level)], 1)


@pytest.mark.parametrize(("native", "context_sigma"), [(3, 0.0), (6, 0.0), (6, 0.1)])
@torch.no_grad()
def test_a_rollout_with_a_memory_equals_one_without(native, context_sigma):
    """Five windows of three steps, each continued from the one before, to 1e-5 in fp32."""
    dit = _tiny_dit(6)
    text = dit.prepare_text(torch.randn(1, 5, 16), None, torch.randn(1, 16))
    rollout = Rollout(sink=9, recent=9, window=3, context_sigma=context_sigma)
    windows = make_windows(native + 12, native, rollout)
    assert len(windows) == 5
    blank = LatentShape(0, 4, 4)
    spec = SamplingSpec(
        windows,
        lambda window: Canvas.text_to_video(4, replace(blank, frames=window.stop - window.start)),
        make_sigmas(3, 2.0),
        5,
        rollout,
    )
    cached = Denoiser(dit, DeterministicExecutor(torch.device("cpu")), [text], 1.0, student=True)
    made, whole = (
        [step.finished for step in generate_windows(spec, one) if step.finished is not None]
        for one in (cached, Uncached(dit, text))
    )
    for ours, theirs in zip(made, whole, strict=True):
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    forgetful = SamplingSpec(
        windows, spec.canvas_at, spec.sigmas, 5, replace(rollout, sink=1, recent=1)
    )
    fresh = Denoiser(dit, DeterministicExecutor(torch.device("cpu")), [text], 1.0, student=True)
    other = [
        step.finished for step in generate_windows(forgetful, fresh) if step.finished is not None
    ][-1]
    assert (other - whole[-1]).abs().max() > 1e-3 * whole[-1].abs().max()


@torch.no_grad()
def test_the_memory_of_a_late_window_is_what_training_shows():
    """A late window sees the first latent frames and the last ones at absolute positions."""
    dit = _tiny_dit(9)
    text = dit.prepare_text(torch.randn(1, 5, 16), None, torch.randn(1, 16))
    seen = torch.randn(1, 4, 9, 4, 4)
    numbers = torch.tensor([0, 1, 2, 27, 28, 29, 30, 31, 32])
    levels = torch.cat([torch.zeros(1, 6), torch.full((1, 3), 0.6)], 1)
    whole = dit(seen, levels, text, attention_mode="causal", frame_indices=numbers)[:, :, 6:]
    cache = dit.extend_cache(seen[:, :, :3], levels[:, :3], text, KvCache(sink=3, recent=3))
    cache = replace(cache, seen=27)
    cache = dit.extend_cache(seen[:, :, 3:6], levels[:, 3:6], text, cache)
    made = dit(seen[:, :, 6:], levels[:, 6:], text, cache=cache)
    assert (made - whole).abs().max() < 1e-5 * whole.abs().max()
    assert not torch.equal(whole, dit(seen, levels, text, attention_mode="causal")[:, :, 6:])


def test_chained_noise_runs_on_from_window_to_window(pipeline, tmp_path):
    """The start does not depend on the length, and a stopped video resumes to the same frames."""
    chained = copy.copy(pipeline)
    chained.info = replace(
        pipeline.info, manifest={**pipeline.info.manifest, "noise_correlation": 0.8}
    )
    whole = chained.generate(LONG).frames
    assert not torch.equal(whole, pipeline.generate(LONG).frames)
    assert torch.equal(chained.generate(replace(LONG, seconds=4)).frames[: len(whole)], whole)
    stream = chained.stream(LONG, resume=tmp_path / "kept")
    for step in stream:
        if step.phase == "decode":
            break
    stream.close()
    again = chained.stream(LONG, resume=tmp_path / "kept")
    assert torch.equal(torch.cat([step.frames for step in again if step.frames is not None]), whole)
