"""A loaded model: its parts by the protocols, placement, and calls by hand."""

import subprocess
import sys
import threading

import pytest
import torch

import skyloom
from skyloom.models.attention import KvCache
from skyloom.models.base import (
    Autoencoder,
    ClipReader,
    ModelBundle,
    TextEncoder,
    Transformer,
    find_loader,
)
from skyloom.models.registry import BUNDLED, read_model

CPU = torch.device("cpu")


@pytest.fixture
def bundle(tiny_model) -> ModelBundle:
    return ModelBundle.load(read_model(tiny_model), CPU, torch.float32)


def test_the_parts_are_of_the_protocols(bundle):
    assert isinstance(bundle.text_encoder, TextEncoder)
    assert isinstance(bundle.autoencoder, Autoencoder)
    assert isinstance(bundle.transformer, Transformer)
    assert (bundle.autoencoder.latent_channels, bundle.autoencoder.scale.space) == (4, 16)
    assert bundle.transformer.prediction == "angular"
    assert bundle.transformer.uncached_frame_offset == 5
    assert bundle.transformer.dtype == torch.float32
    assert bundle.transformer.device == bundle.autoencoder.device == CPU


def test_every_part_has_its_own_precision(tiny_model):
    bundle = ModelBundle.load(read_model(tiny_model), CPU, torch.bfloat16)
    assert bundle.transformer.dtype == torch.bfloat16
    precisions = {name: value.dtype for name, value in bundle.autoencoder.state_dict().items()}
    assert precisions["decoder.stem.weight"] == torch.bfloat16
    assert precisions["decoder.linear.weight"] == precisions["encoder.linear.weight"]
    assert precisions["decoder.linear.weight"] == torch.float32
    kinds = {value.dtype for value in bundle.text_encoder.state_dict().values()}
    assert kinds == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_transformer_takes_encoded_prompts(tiny_model, dtype):
    bundle = ModelBundle.load(read_model(tiny_model), CPU, dtype)
    transformer = bundle.transformer
    latent = torch.randn(1, 4, 2, 2, 2)
    sigma = torch.full((1, 2), 0.5)
    text = bundle.text_encoder.encode(["a red cat"])
    length = int(text.context_mask.sum())
    prepared = transformer.prepare_text(
        text.context[:, :length].to(dtype), None, text.pooled.to(dtype)
    )
    assert torch.equal(transformer(latent, sigma, text), transformer(latent, sigma, prepared))


@torch.no_grad()
def test_a_batch_of_encoded_prompts_equals_single_ones(bundle):
    latent = torch.randn(2, 4, 2, 2, 2)
    sigma = torch.full((2, 2), 0.5)
    prompts = ["a red cat", "the dog on the beach"]
    both = bundle.transformer(latent, sigma, bundle.text_encoder.encode(prompts))
    for row, prompt in enumerate(prompts):
        one = slice(row, row + 1)
        text = bundle.text_encoder.encode([prompt])
        alone = bundle.transformer(latent[one], sigma[one], text)
        torch.testing.assert_close(both[one], alone, atol=1e-4, rtol=1e-4)


class Places:
    """Records where a part is placed."""

    def __init__(self, monkeypatch, part):
        self.devices = []
        monkeypatch.setattr(part, "place", self)

    def __call__(self, device, dtype):
        self.devices.append((device.type, dtype))


THERE = ("cuda", torch.float32)
HOME = ("cpu", torch.float32)


def test_a_resident_part_stays_where_it_is(bundle, monkeypatch):
    places = Places(monkeypatch, bundle.transformer)
    with bundle.use("transformer") as transformer:
        assert transformer is bundle.transformer
    assert places.devices == []


def test_swapped_parts_take_turns_on_the_device(bundle, monkeypatch):
    transformer = Places(monkeypatch, bundle.transformer)
    autoencoder = Places(monkeypatch, bundle.autoencoder)
    bundle.arrange({"transformer": "swapped", "autoencoder": "swapped"})
    bundle.device = torch.device("cuda")
    transformer.devices.clear()
    autoencoder.devices.clear()
    for _ in range(2):
        with bundle.use("transformer"), bundle.use("transformer"):
            pass
    assert transformer.devices == [THERE]
    with pytest.raises(ValueError, match="broken"), bundle.use("autoencoder"):
        raise ValueError("broken")
    assert transformer.devices == [THERE, HOME]
    with bundle.use("transformer"):
        assert autoencoder.devices == [THERE, HOME]
        with bundle.use("autoencoder"):
            assert transformer.devices == [THERE, HOME, THERE]  # in use: it stays


def test_a_resident_part_moves_the_swapped_ones_away(bundle, monkeypatch):
    transformer = Places(monkeypatch, bundle.transformer)
    bundle.arrange({"transformer": "swapped"})
    with bundle.use("transformer"):
        pass
    before = len(transformer.devices)
    with bundle.use("autoencoder"):
        assert len(transformer.devices) == before + 1


def test_a_swapped_text_encoder_leaves_at_once(bundle, monkeypatch):
    places = Places(monkeypatch, bundle.text_encoder)
    bundle.arrange({"text_encoder": "swapped"})
    bundle.device = torch.device("cuda")
    with bundle.use("text_encoder"):
        assert places.devices == [HOME, THERE]
    assert places.devices == [HOME, THERE, HOME]


class LazyEncoder:
    """Reads its weights when it needs them."""

    def __init__(self):
        self.streamed = False
        self.log = []

    def place(self, device, dtype):
        self.log.append(device.type)

    def free(self):
        self.log.append("free")

    def encode(self, prompts):
        raise AssertionError("not called")


def test_every_rung_of_a_text_encoder_that_reads_its_weights_itself(bundle):
    encoder = LazyEncoder()
    bundle.text_encoder = encoder
    bundle.arrange({"text_encoder": "streamed"})
    assert encoder.streamed
    bundle.arrange({"text_encoder": "host"})
    assert not encoder.streamed
    encoder.log.clear()
    bundle.arrange({"text_encoder": "swapped"})
    with bundle.use("text_encoder"):
        encoder.log.append("run")
    assert encoder.log[-4:] == ["cpu", "run", "free", "cpu"]


def test_a_part_in_use_by_a_thread_is_not_moved(bundle, monkeypatch):
    bundle.arrange({"autoencoder": "swapped"})
    places = Places(monkeypatch, bundle.autoencoder)
    bundle.device = torch.device("cuda")
    inside = threading.Event()
    leave = threading.Event()

    def hold():
        with bundle.use("autoencoder"):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(60)
    with bundle.use("transformer"):
        pass
    assert places.devices == [THERE]
    leave.set()
    thread.join(60)
    with bundle.use("transformer"):
        pass
    assert places.devices == [THERE, HOME]


@torch.no_grad()
def test_loading_by_rungs_gives_the_same_network(tiny_model, bundle):
    rungs = {"text_encoder": "swapped", "transformer": "streamed", "autoencoder": "resident"}
    other = ModelBundle.load(read_model(tiny_model), CPU, torch.float32, rungs=rungs)
    assert other.rungs == rungs
    latent = torch.randn(1, 4, 2, 2, 2)
    sigma = torch.full((1, 2), 0.5)
    text = bundle.text_encoder.encode(["a red cat"])
    expected = bundle.transformer(latent, sigma, text)
    assert torch.equal(other.transformer(latent, sigma, text), expected)
    assert other.bytes_on("cpu") >= bundle.bytes_on("cpu") > 0
    assert other.bytes_on("cuda") == 0


@pytest.mark.skipif(not (BUNDLED / "probe").exists(), reason="no bundled probe")
def test_the_clip_reader_is_loaded_on_demand(bundle):
    frames = torch.randint(0, 256, (9, 32, 32, 3)).byte()
    reader = find_loader(bundle.info).load_clip_reader(bundle.info)
    assert isinstance(reader, ClipReader)
    assert "clip_reader" not in vars(bundle)
    assert torch.equal(bundle.clip_reader.features(frames), reader.features(frames))
    assert bundle.clip_reader is bundle.clip_reader
    scores = reader.scores(frames)
    assert {"noun", "place", "things"} <= set(scores)
    for category, values in scores.items():
        assert len(values) == len(reader.labels(category))
        assert (values >= 0).all()
        assert (values <= 1).all()
        if category != "things":
            assert float(values.sum()) == pytest.approx(1, abs=1e-4)


def test_loading_the_pipeline_hashes_the_files_once(tiny_model, monkeypatch):
    hashed = []
    monkeypatch.setattr("skyloom.core.hash_cache._SETTLED_NS", -(10**18))
    real = skyloom.core.hash_cache.sha256_file
    monkeypatch.setattr(
        "skyloom.core.hash_cache.sha256_file", lambda path: hashed.append(path) or real(path)
    )
    for _ in range(2):
        skyloom.load(str(tiny_model))
    assert len(hashed) == len(read_model(tiny_model).manifest["files"])


def test_loading_does_not_import_the_compiler(tiny_model):
    """Computing on `meta` would: a second, and 100 MB that stay."""
    script = (
        "import sys, skyloom\n"
        f"skyloom.load({str(tiny_model)!r})\n"
        "print({'torch._dynamo', 'sympy'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "set()\n"


def test_a_network_without_attention_counts_the_frames_of_its_cache():
    cache = KvCache(sink=1, recent=2)
    for _ in range(3):
        cache = cache.extended((), (), 2)
    assert (cache.frames, cache.seen, cache.keys) == (3, 6, ())
