"""The UMT5 encoder against transformers and the original code, in all layouts and both modes."""

import struct
import weakref
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from tests.support.wan_reference import load
from torch import nn

from skyloom.core.errors import CheckpointError, ConfigError
from skyloom.models.base import TextEncoder, as_condition, prepare_prompt
from skyloom.models.checkpoint import build
from skyloom.models.embedding_cache import EmbeddingCache
from skyloom.models.quantized import QuantizedLayer
from skyloom.models.wan import text_encoder
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.text_encoder import Umt5, Umt5Layer, WanTextEncoder
from skyloom.models.wan.text_encoder_state_dict import Umt5Config, Umt5State
from skyloom.models.wan.transformer import Wan

CPU = torch.device("cpu")
REAL = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
}
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
DOWN = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
PROMPTS = ["a fox", "a fox in the snow, slowly", ""]
TO_ORIGINAL = (
    ("encoder.final_layer_norm", "norm"),
    ("encoder.block", "blocks"),
    ("layer.0.SelfAttention.relative_attention_bias", "pos_embedding.embedding"),
    ("layer.0.SelfAttention", "attn"),
    ("layer.0.layer_norm", "norm1"),
    ("layer.1.layer_norm", "norm2"),
    ("layer.1.DenseReluDense.wi_0", "ffn.gate.0"),
    ("layer.1.DenseReluDense.wi_1", "ffn.fc1"),
    ("layer.1.DenseReluDense.wo", "ffn.fc2"),
    ("shared", "token_embedding"),
)
TO_GGUF = (  # T5_SD_MAP of city96/ComfyUI-GGUF, loader.py (Apache-2.0)
    ("encoder.", "enc."),
    (".block.", ".blk."),
    ("shared", "token_embd"),
    ("final_layer_norm", "output_norm"),
    ("layer.0.SelfAttention.q", "attn_q"),
    ("layer.0.SelfAttention.k", "attn_k"),
    ("layer.0.SelfAttention.v", "attn_v"),
    ("layer.0.SelfAttention.o", "attn_o"),
    ("layer.0.layer_norm", "attn_norm"),
    ("layer.0.SelfAttention.relative_attention_bias", "attn_rel_b"),
    ("layer.1.DenseReluDense.wi_1", "ffn_up"),
    ("layer.1.DenseReluDense.wo", "ffn_down"),
    ("layer.1.DenseReluDense.wi_0", "ffn_gate"),
    ("layer.1.layer_norm", "ffn_norm"),
)


class Weights:
    """Tensors in memory as a source."""

    def __init__(self, tensors):
        self.tensors = tensors
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def read(self, name):
        return self.tensors[name]


def umt5_of_transformers(**sizes):
    transformers = pytest.importorskip("transformers")
    config = {
        "vocab_size": 200,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 96,
        "num_layers": 3,
        "num_heads": 4,
    }
    made = transformers.UMT5Config(
        **{**config, **sizes},
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
    )
    return transformers.UMT5EncoderModel(made).eval()


@pytest.fixture(scope="module")
def reference():
    """A random encoder of transformers."""
    torch.manual_seed(0)
    model = umt5_of_transformers()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
            elif "relative" in name or "shared" in name:
                weight.normal_()
            else:
                weight.normal_(std=weight.shape[1] ** -0.5)
            if name.endswith(".q.weight"):  # as in T5's initialisation: scores are not scaled
                weight.mul_(16**-0.5)
    return model


@pytest.fixture(scope="module")
def tensors(reference):
    """Its weights in the layout of transformers."""
    state = reference.state_dict()
    return {name: value for name, value in state.items() if "embed_tokens" not in name}


def renamed(tensors, table):
    def rename(name):
        for theirs, ours in sorted(table, key=lambda pair: -len(pair[0])):
            name = name.replace(theirs, ours)
        return name

    return {rename(name): tensor for name, tensor in tensors.items()}


def network(tensors, dtype=torch.float32) -> Umt5:
    state = Umt5State(Weights(tensors))
    return build(lambda: Umt5(state.config), state, CPU, dtype)


def piece(text, score, kind):
    body = b"\x0a" + bytes([len(text.encode())]) + text.encode()
    body += b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


PIECES = [("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -2.0, 1)]
PIECES += [(letter, -3.0, 1) for letter in "abcdefghijklmnopqrstuvwxyz,."]


def vocabulary() -> bytes:
    """A SentencePiece model with a token per letter."""
    return b"".join(piece(*row) for row in PIECES)


def write(folder: Path, tensors, **more) -> Path:
    """Write a single file as ComfyUI's, with the vocabulary inside."""
    path = folder / "umt5.safetensors"
    model = torch.frombuffer(bytearray(vocabulary()), dtype=torch.uint8)
    stored = {**tensors, "spiece_model": model, **more}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, path)
    return path


def encoder(path, *, dtype=torch.float32, **options) -> WanTextEncoder:
    made = WanTextEncoder([path], **options)
    made.place(CPU, dtype)
    return made


def test_it_is_a_text_encoder(tmp_path, tensors):
    assert isinstance(encoder(write(tmp_path, tensors)), TextEncoder)


@pytest.mark.parametrize("length", [1, 40, 300])  # distances from 128 on share a bucket
@torch.no_grad()
def test_it_equals_transformers_and_the_original_code(reference, tensors, length):
    ids = torch.randint(3, 200, (2, length), generator=torch.Generator().manual_seed(length))
    expected = reference(ids).last_hidden_state
    t5 = load("wan.modules.t5")
    original = t5.T5Encoder(200, 64, 64, 96, 4, 3, 32, shared_pos=False, dropout=0.0).eval()
    original.load_state_dict(renamed(tensors, TO_ORIGINAL))
    ours = network(tensors)(ids)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=5e-6)
    torch.testing.assert_close(ours, original(ids), rtol=0, atol=5e-6)


@torch.no_grad()
def test_no_padding_equals_padding_with_a_mask(reference, tensors):
    ids = torch.randint(3, 200, (1, 300), generator=torch.Generator().manual_seed(1))
    ids[:, 40:] = 0
    padded = reference(ids, (ids != 0).long()).last_hidden_state
    ours = network(tensors)(ids[:, :40])
    torch.testing.assert_close(ours, padded[:, :40], rtol=0, atol=5e-6)


@torch.no_grad()
def test_all_layouts_give_the_same_result(tensors):
    ids = torch.arange(3, 60)[None]
    expected = network(tensors)(ids)
    assert torch.equal(network(renamed(tensors, TO_ORIGINAL))(ids), expected)
    assert torch.equal(network(renamed(tensors, TO_GGUF))(ids), expected)
    tied = {**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]}
    assert torch.equal(network(tied)(ids), expected)


def test_gguf_names_are_those_of_the_gguf_package(tensors):
    arch = gguf.constants.MODEL_ARCH.T5ENCODER
    known = gguf.get_tensor_name_map(arch, 3)
    for theirs in tensors:
        ours = next(iter(renamed({theirs: 0}, TO_GGUF)))
        assert known.get_name(theirs.removesuffix(".weight")) == ours.removesuffix(".weight")


@pytest.mark.parametrize("table", [(), TO_ORIGINAL, TO_GGUF])
def test_names_and_shapes_at_the_real_size(table):
    with torch.device("meta"):
        state = umt5_of_transformers(**REAL).state_dict()
        ours = Umt5(Umt5Config(256384, 4096, 4096, 64, 10240, 24))
    state = {name: value for name, value in state.items() if "embed_tokens" not in name}
    found = Umt5State(Weights(renamed(state, table)))
    assert found.config == Umt5Config(256384, 4096, 4096, 64, 10240, 24)
    assert found.shapes == {name: tuple(value.shape) for name, value in ours.state_dict().items()}
    assert sum(value.numel() for value in ours.parameters()) == 5_680_910_336


def test_names_of_the_original_code_at_the_real_size():
    t5 = load("wan.modules.t5")
    with torch.device("meta"):
        original = t5.umt5_xxl(encoder_only=True, return_tokenizer=False, device="meta")
    found = Umt5State(Weights(original.state_dict()))
    assert found.config == Umt5Config(256384, 4096, 4096, 64, 10240, 24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streaming_gives_the_same_bits_with_one_layer_in_memory(
    tmp_path, tensors, dtype, monkeypatch
):
    path = write(tmp_path, tensors)
    resident = encoder(path, dtype=dtype).encode(PROMPTS)
    layers: list[weakref.ref] = []

    class Counted(Umt5Layer):
        def __init__(self, config):
            assert all(layer() is None for layer in layers)
            super().__init__(config)
            layers.append(weakref.ref(self))

    monkeypatch.setattr(text_encoder, "Umt5Layer", Counted)
    streaming = encoder(path, dtype=dtype, streamed=True)
    assert torch.equal(streaming.encode(PROMPTS).context, resident.context)
    assert len(layers) == 3
    assert not streaming.loaded


def fp8_file(folder, tensors):
    stored = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and "relative" not in name and "shared" not in name:
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[name.replace(".weight", ".scale_weight")] = scale
        else:
            stored[name] = tensor.half()
    return write(folder, stored)


def gguf_file(folder, tensors):
    path = folder / "umt5.gguf"
    writer = gguf.GGUFWriter(path, "t5encoder")
    writer.add_tokenizer_model("t5")
    writer.add_token_list([text for text, _, _ in PIECES])
    writer.add_token_scores([score for _, score, _ in PIECES])
    writer.add_token_types([kind for _, _, kind in PIECES])
    for name, tensor in renamed(tensors, TO_GGUF).items():
        is_matrix = tensor.ndim == 2 and "rel_b" not in name
        kind = gguf.GGMLQuantizationType.Q8_0 if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("make", [fp8_file, gguf_file])
def test_quantized_weights_stay_quantized_and_stream(tmp_path, tensors, make):
    path = make(tmp_path, tensors)
    resident = encoder(path)
    found = resident.encode(PROMPTS)
    (tmp_path / "exact").mkdir()
    exact = encoder(write(tmp_path / "exact", tensors)).encode(PROMPTS)
    kept = resident._network
    assert kept is not None
    layers = [m for m in kept.modules() if isinstance(m, QuantizedLayer)]
    assert len(layers) >= 21
    assert torch.equal(encoder(path, streamed=True).encode(PROMPTS).context, found.context)
    error = (found.context - exact.context).std() / exact.context.std()
    assert 0 < error < 0.1


@torch.no_grad()
def test_bf16_computes_in_bf16_and_is_no_further_from_fp32_than_transformers(reference, tensors):
    ids = torch.randint(3, 200, (1, 60), generator=torch.Generator().manual_seed(1))
    exact = reference(ids).last_hidden_state
    theirs = umt5_of_transformers()
    theirs.load_state_dict(reference.state_dict())
    theirs = theirs.bfloat16()(ids).last_hidden_state
    ours = network(tensors, torch.bfloat16)
    seen = []
    for layer in ours.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda module, inputs, output: seen.append(
                    (module.weight.dtype, inputs[0].dtype, output.dtype)
                )
            )
        is_small = type(layer).__name__ == "RmsNorm" or layer in {one.bias for one in ours.layers}
        if is_small:
            assert layer.weight.dtype == torch.float32
    result = ours(ids)
    assert result.dtype == torch.bfloat16
    assert seen == [(torch.bfloat16,) * 3] * 21
    assert (result.float() - exact).std() <= (theirs.float() - exact).std()


def test_fp16_is_refused(tmp_path, tensors):
    with pytest.raises(ConfigError, match="must be float32 or bfloat16, got float16"):
        encoder(write(tmp_path, tensors), dtype=torch.float16)


def test_prompts_are_padded_with_zeros_and_masked(tmp_path, tensors):
    made = encoder(write(tmp_path, tensors))
    found = made.encode(PROMPTS)
    assert found.context_mask.sum(1).tolist() == [7, 27, 1]
    assert not found.context[~found.context_mask].any()
    assert found.pooled is None
    assert found.truncated == (0, 0, 0)
    for row, prompt in enumerate(PROMPTS):
        alone = made.encode([prompt]).context[0]
        assert torch.equal(found.context[row, : len(alone)], alone)


@torch.no_grad()
def test_long_prompts_are_cut_and_the_dropped_words_named(tmp_path, tensors):
    made = encoder(write(tmp_path, tensors), text_length=8)
    found = made.encode(["a fox  runs &amp; jumps over it all day long", "a fox"])
    assert found.context.shape[1] == 8
    assert found.truncated == (33, 0)
    assert found.truncated_text == ("runs & jumps over it all", "")
    cut = made._compute([(3, 4, 3, 9, 18, 27, 3, 1)])[0]
    assert torch.equal(found.context[0], cut)


@torch.no_grad()
def test_a_transformer_sees_a_prompt_of_a_batch_as_the_prompt_alone(tmp_path, tensors):
    sizes = {"in_channels": 4, "out_channels": 4, "width": 32, "heads": 2, "layers": 1, "ffn": 32}
    transformer = Wan(WanConfig(**sizes, text_width=64)).eval()
    made = encoder(write(tmp_path, tensors))
    batch = prepare_prompt(made.encode(PROMPTS), 0, transformer)
    alone = as_condition(made.encode(PROMPTS[:1]), transformer)
    assert torch.equal(batch.keys[0], alone.keys[0])
    assert torch.equal(batch.values[0], alone.values[0])
    together = as_condition(made.encode(PROMPTS), transformer)
    latent = torch.randn(3, 4, 1, 4, 4)
    sigma = torch.full((3, 1), 0.5)
    expected = transformer(latent[:1], sigma[:1], batch)
    torch.testing.assert_close(transformer(latent, sigma, together)[:1], expected)


def counted_reads(monkeypatch):
    reads = []
    plain = Umt5State.read
    monkeypatch.setattr(Umt5State, "read", lambda s, name: reads.append(name) or plain(s, name))
    return reads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_prompts_need_no_weights_and_have_the_same_bits(
    tmp_path, tensors, dtype, monkeypatch
):
    path = write(tmp_path, tensors)
    cache = EmbeddingCache(tmp_path / "cache")
    expected = encoder(path, dtype=dtype).encode(PROMPTS)
    first = encoder(path, dtype=dtype, cache=cache).encode(PROMPTS)
    reads = counted_reads(monkeypatch)
    made = encoder(path, dtype=dtype, cache=cache)
    second = made.encode([*PROMPTS, " a  fox"])
    assert not reads
    assert not made.loaded
    assert torch.equal(first.context, expected.context)
    assert torch.equal(second.context[:3], expected.context)
    assert second.context.dtype == dtype
    made.encode(["a new one"])
    assert made.loaded
    made.free()
    assert not made.loaded


def test_the_cache_depends_on_weights_and_precision(tmp_path, tensors, monkeypatch):
    path = write(tmp_path, tensors)
    cache = EmbeddingCache(tmp_path / "cache")
    expected = encoder(path, cache=cache, identity="a").encode(["a fox"]).context
    reads = counted_reads(monkeypatch)
    encoder(path, cache=cache, identity="a").encode(["a fox"])
    assert not reads
    encoder(path, cache=cache).encode(["a fox"])
    assert len(reads) == 32
    reads.clear()
    encoder(path, cache=cache, identity="b").encode(["a fox"])
    assert len(reads) == 32
    encoder(path, cache=cache, identity="a", dtype=torch.bfloat16).encode(["a fox"])
    assert len(reads) == 64
    write(tmp_path, {**tensors, "shared.weight": tensors["shared.weight"] * 2})
    changed = encoder(path, cache=cache).encode(["a fox"]).context
    assert not torch.equal(changed, expected)


def test_moving_keeps_weights_and_another_precision_reads_them_again(tmp_path, tensors):
    made = encoder(write(tmp_path, tensors))
    expected = made.encode(["a fox"]).context
    made.place(CPU, torch.float32)
    assert made.loaded
    made.place(CPU, torch.bfloat16)
    assert not made.loaded
    made.encode(["a fox"])
    made.place(CPU, torch.float32)
    assert torch.equal(made.encode(["a fox"]).context, expected)


@pytest.mark.parametrize("streamed", [False, True])
def test_files_that_do_not_fit_are_refused(tmp_path, tensors, streamed):
    cases = {
        "holds no UMT5 encoder": {"a.weight": torch.ones(2, 2)},
        "2 tensors too few .*relative_attention_bias": {
            name: value
            for name, value in tensors.items()
            if "relative_attention_bias" not in name or ".0.layer" in name
        },
        "1 too many": {**tensors, "decoder.final_layer_norm.weight": torch.ones(64)},
        "misshapen": {
            **tensors,
            "encoder.block.1.layer.1.DenseReluDense.wo.weight": torch.ones(3, 3),
        },
        "no matrices": {**tensors, "shared.weight": torch.ones(200)},
        "do not fit 5 heads": {
            **tensors,
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.ones(
                32, 5
            ),
        },
        "knows 9 tokens, its vocabulary more": {**tensors, "shared.weight": torch.ones(9, 64)},
    }
    for message, state in cases.items():
        with pytest.raises(CheckpointError, match=message):
            encoder(write(tmp_path, state), streamed=streamed).encode(["a zoo"])


def test_a_missing_file_is_refused_at_once(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        WanTextEncoder([tmp_path / "umt5.safetensors"])


def test_the_vocabulary_lies_beside_the_weights_or_is_named(tmp_path, tensors):
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match="has no vocabulary"):
        encoder(folder).encode(["a fox"])
    expected = encoder(write(tmp_path, tensors)).encode(["a fox"]).context
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "spiece.model").write_bytes(vocabulary())
    assert torch.equal(encoder(folder).encode(["a fox"]).context, expected)
    named = tmp_path / "other.model"
    named.write_bytes(vocabulary())
    assert torch.equal(encoder(path, vocabulary=named).encode(["a fox"]).context, expected)
    with pytest.raises(CheckpointError, match="cannot be read"):
        encoder(path, vocabulary=tmp_path / "missing.model").encode(["a fox"])
