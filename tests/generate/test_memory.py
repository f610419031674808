"""A video whose memory runs out: it steps down, goes on, and its frames are the same."""

from dataclasses import replace

import pytest
import torch

import skyloom
from skyloom.core.errors import CapacityError
from skyloom.generate import memory as memory_module
from skyloom.generate import pipeline as pipeline_module
from skyloom.generate.memory import make_planner, measure_free_memory
from skyloom.generate.request import Request
from skyloom.models.base import find_loader
from skyloom.models.lora import LoraAdapter, with_adapters
from skyloom.models.memory import FreeMemory, ModelMemory, PartMemory, Weights

ASK = Request("a red cat on the beach", seed=7, seconds=0.5, quality="best", num_steps=3)
GB = 10**9
BIG = ModelMemory(
    parts={
        "text_encoder": PartMemory(Weights(5 * GB), Weights(GB // 5), 24),
        "transformer": PartMemory(Weights(5 * GB), Weights(GB // 8), 40),
        "autoencoder": PartMemory(Weights(GB)),
    },
    text_bytes=GB,
    condition_bytes=1000,
    token_bytes=1000,
    cached_token_bytes=10,
    decode_bytes=1000,
    decoder_cache_bytes=100,
    encode_bytes=1000,
    tile_pixels=64,
)
CPU = torch.device("cpu")


class Failing:
    """Raises out-of-memory errors in place of some calls of a method, counted from 0."""

    def __init__(self, monkeypatch, owner, name, calls):
        self.call = getattr(owner, name)
        self.calls = set(calls)
        self.count = 0
        monkeypatch.setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        self.count += 1
        if self.count - 1 in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return self.call(*args, **kwargs)


@pytest.fixture
def pipe(tiny_model, monkeypatch):
    """A pipeline whose model claims to be large, on a device with memory of its own."""
    pipe = skyloom.load(str(tiny_model), dtype="float32")
    loader = find_loader(pipe.info)
    read = loader.read_network_cost
    monkeypatch.setattr(loader, "read_network_cost", lambda info: replace(read(info), memory=BIG))
    free = FreeMemory(200 * GB, 200 * GB)
    monkeypatch.setattr(pipeline_module, "measure_free_memory", lambda *_: free)
    return pipe


@pytest.fixture
def expected(tiny_model):
    return skyloom.load(str(tiny_model), dtype="float32").generate(ASK).frames


def collect(pipe, request=ASK, **options):
    steps = list(pipe.stream(request, **options))
    return steps, steps[-1].video


def same(video, frames):
    """Whether frames are equal, bit for bit; notes at the end do not change the watermark."""
    return torch.equal(video.frames, frames)


def test_with_room_nothing_changes_and_the_receipt_has_the_plan(pipe, expected):
    steps, video = collect(pipe)
    assert same(video, expected)
    notes = video.receipt["notes"]["memory"]
    assert set(notes["rungs"].values()) == {"resident"}
    assert notes["ran_out"] == []
    assert notes["device_bytes"]["denoise"] > 20 * GB
    assert not any(step.notice for step in steps)


@pytest.mark.parametrize("calls", [[0], [5], [0, 4], [2, 4, 6, 8]])
def test_denoising_goes_on_from_the_last_step_with_the_same_bits(
    pipe, expected, monkeypatch, calls
):
    failing = Failing(monkeypatch, type(pipe.transformer), "forward", [])
    failing.calls = set(calls)
    real = failing.call
    monkeypatch.setattr(
        type(pipe.transformer), "forward", lambda self, *a, **k: _call(failing, real, self, a, k)
    )
    steps, video = collect(pipe)
    assert same(video, expected)
    notes = video.receipt["notes"]["memory"]
    assert notes["ran_out"] == ["denoise"] * len(calls)
    assert (notes["rungs"]["transformer"] == "streamed") == (len(calls) == 4)
    notices = [step.notice for step in steps if step.notice]
    assert len(notices) >= 1
    assert notices[0].startswith("Memory ran out during denoising; going on with ")
    assert [step.index for step in steps if step.phase == "denoise"] == [1, 2, 3]


def _call(failing, real, network, args, kwargs):
    failing.call = lambda *a, **k: real(network, *a, **k)
    return failing(*args, **kwargs)


def test_a_small_device_streams_from_the_start(pipe, expected, monkeypatch):
    free = FreeMemory(200 * GB, 6 * GB)
    monkeypatch.setattr(pipeline_module, "measure_free_memory", lambda *_: free)
    _, video = collect(pipe)
    assert same(video, expected)
    assert video.receipt["notes"]["memory"]["rungs"]["transformer"] == "streamed"
    assert pipe.transformer.running_blocks is not pipe.transformer.blocks
    roomy = FreeMemory(200 * GB, 200 * GB)
    monkeypatch.setattr(pipeline_module, "measure_free_memory", lambda *_: roomy)
    assert same(collect(pipe)[1], expected)
    assert pipe.transformer.running_blocks is pipe.transformer.blocks


def test_decoding_and_text_encoding_step_down_too(pipe, expected, monkeypatch):
    Failing(monkeypatch, pipe.autoencoder, "decode_step", [0])
    Failing(monkeypatch, pipe.text_encoder, "encode", [0])
    steps, video = collect(pipe)
    assert same(video, expected)
    assert video.receipt["notes"]["memory"]["ran_out"] == ["text", "decode"]
    assert sum(step.notice is not None for step in steps) == 2


def test_a_long_video_caches_every_window_once(pipe, tiny_model, monkeypatch):
    ask = replace(ASK, seconds=2.5)
    whole = skyloom.load(str(tiny_model), dtype="float32").generate(ask).frames
    Failing(monkeypatch, pipe.transformer, "extend_cache", [1])
    _, video = collect(pipe, ask)
    assert same(video, whole)
    assert video.receipt["notes"]["memory"]["ran_out"] == ["denoise"]


def test_on_the_last_rung_the_error_says_what_to_do(pipe, monkeypatch):
    Failing(monkeypatch, pipe.autoencoder, "decode_step", range(100))
    with pytest.raises(CapacityError, match=r"ran out during decoding\. Choose a smaller size"):
        collect(pipe)


def test_a_model_without_a_plan_fails_with_the_same_words(tiny_model, monkeypatch):
    pipe = skyloom.load(str(tiny_model), dtype="float32")
    Failing(monkeypatch, pipe.autoencoder, "decode_step", [0])
    with pytest.raises(CapacityError, match="ran out during decoding"):
        collect(pipe)


def test_what_cannot_fit_is_refused_before_any_work(pipe, monkeypatch):
    free = FreeMemory(200 * GB, GB)
    monkeypatch.setattr(pipeline_module, "measure_free_memory", lambda *_: free)
    encode = Failing(monkeypatch, pipe.text_encoder, "encode", [])
    with pytest.raises(CapacityError, match=r"GPU memory must be at least .* got 0\.9 GiB"):
        pipe.stream(ASK)
    assert encode.count == 0
    steps = pipe.stream(ASK, check_memory=False)
    assert next(steps).phase == "text"
    steps.close()


def test_the_demand_follows_the_request(pipe):
    cost = find_loader(pipe.info).read_network_cost(pipe.info)
    plans = {}
    for guidance, seconds in ((1.0, 0.5), (3.0, 0.5), (3.0, 4.0)):
        plan = pipe.plan(replace(ASK, guidance_scale=guidance, seconds=seconds))
        planner = make_planner(
            plan,
            pipe.info,
            cost,
            device=CPU,
            dtype=torch.bfloat16,
            free=FreeMemory(200 * GB, 200 * GB),
        )
        plans[guidance, seconds] = planner.choose().device["denoise"]
    assert len(set(plans.values())) == 3
    assert sorted(plans.values()) == list(plans.values())


def test_memory_that_the_parts_hold_counts_as_free(pipe, monkeypatch):
    monkeypatch.setattr(memory_module, "free_memory", lambda: 1000)
    assert measure_free_memory(CPU) == FreeMemory(1000)
    assert measure_free_memory(CPU, pipe.bundle).host == 1000 + pipe.bundle.bytes_on("cpu")
    monkeypatch.setattr(memory_module, "free_device_memory", lambda device: 70)
    assert measure_free_memory(torch.device("cuda"), pipe.bundle).device == 70


@torch.no_grad()
def test_loras_have_an_effect_on_streamed_blocks(pipe):
    """A view with LoRAs shares the weights that are streamed, also if streaming starts later."""
    network = pipe.transformer
    layer = "blocks.0.up"
    adapter = LoraAdapter.start(network, [layer], 2, 2.0)
    for change in adapter.by_name.values():
        change.up.normal_()
    view = with_adapters(network, [(adapter, 1.0)])
    latent = torch.randn(1, 4, 2, 2, 2)
    sigma = torch.full((1, 2), 0.5)
    text = pipe.text_encoder.encode(["a red cat"])
    plain = network(latent, sigma, text)
    changed = view(latent, sigma, text)
    assert not torch.equal(plain, changed)
    pipe.bundle.arrange({"transformer": "streamed"})
    assert torch.equal(network(latent, sigma, text), plain)
    assert torch.equal(view(latent, sigma, text), changed)
    pipe.bundle.arrange({"transformer": "resident"})
    assert torch.equal(view(latent, sigma, text), changed)
