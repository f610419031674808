"""Computed sizes and activations of the Wan networks against networks of real size on `meta`."""

from types import SimpleNamespace

import pytest
import torch
from memory_trace import peak_bytes
from safetensors.torch import save_file

from skyloom.models.attention import KvCache
from skyloom.models.memory import PartMemory, part_memory
from skyloom.models.registry import ModelInfo
from skyloom.models.wan.autoencoder import WAN_2_1, WAN_2_2, Tiling, WanAutoencoder
from skyloom.models.wan.config import FAMILY, WanConfig
from skyloom.models.wan.cost import network_cost
from skyloom.models.wan.load import read_network_cost
from skyloom.models.wan.transformer import Wan

META = torch.device("meta")
SIZES = {  # config, autoencoder, latent frames, rows and columns at native size
    "t2v-1.3b": (WanConfig(16, 16, 1536, 12, 30, 8960, 4096), WAN_2_1, (21, 60, 104)),
    "ti2v-5b": (WanConfig(48, 48, 3072, 24, 30, 14336, 4096), WAN_2_2, (31, 44, 80)),
    "t2v-14b": (WanConfig(16, 16, 5120, 40, 40, 13824, 4096), WAN_2_1, (21, 60, 104)),
}
TOLERANCE = 1.15  # computed over traced; never below 1


def on_meta(make):
    with META:
        network = make()
    network.place(META, torch.bfloat16)
    return network


def cost_of(config, autoencoder, parts=None):
    empty = PartMemory(part_memory({}, {}).weights)
    names = ("text_encoder", "transformer", "autoencoder")
    return network_cost(config, autoencoder, dict.fromkeys(names, empty) | (parts or {}))


@pytest.mark.parametrize("name", SIZES)
def test_activations_of_the_transformer(name):
    config, autoencoder, (frames, rows, columns) = SIZES[name]
    network = on_meta(lambda: Wan(config))
    cost = cost_of(config, autoencoder)
    memory = cost.memory
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    part = part_memory(shapes, dict.fromkeys(shapes, "BF16"))
    assert part.blocks == config.layers
    assert part.weights.elements == sum(value.numel() for value in network.parameters())
    assert part.block.elements == sum(value.numel() for value in network.blocks[0].parameters())
    text = torch.empty(1, 20, config.text_width, device=META, dtype=torch.bfloat16)
    condition = network.prepare_text(text)
    held = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for value in (*condition.keys, *condition.values)
    }
    assert sum(held.values()) == memory.condition_bytes
    latent = torch.empty(1, config.in_channels, frames, rows, columns, device=META)
    sigma = torch.empty(1, frames, device=META)
    traced = peak_bytes(lambda: network(latent.bfloat16(), sigma, condition))
    computed = memory.token_bytes * (frames * rows * columns // 4)
    assert 1 <= computed / traced <= TOLERANCE


def test_a_streamed_window_keeps_its_keys_and_values_only():
    config, autoencoder, (_, rows, columns) = SIZES["t2v-1.3b"]
    network = on_meta(lambda: Wan(config))
    condition = network.prepare_text(torch.empty(1, 9, 4096, device=META, dtype=torch.bfloat16))
    latent = torch.empty(1, 16, 3, rows, columns, device=META, dtype=torch.bfloat16)
    sigma = torch.empty(1, 3, device=META)
    cache = KvCache(sink=3, recent=18)
    for _ in range(2):
        cache = network.extend_cache(latent, sigma, condition, cache)
    held = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for value in (*cache.keys, *cache.values)
    }
    tokens = 6 * rows * columns // 4
    assert sum(held.values()) == 4 * config.layers * config.width * tokens
    memory = cost_of(config, autoencoder).memory
    traced = peak_bytes(lambda: network(latent, sigma, condition, cache=cache))
    kept_by_call = 2 * sum(held.values()) // 2  # extended cache of a call
    computed = memory.token_bytes * tokens // 2 + memory.cached_token_bytes * tokens
    assert traced <= computed + kept_by_call


@pytest.mark.parametrize(
    ("config", "size"), [(WAN_2_1, (480, 832)), (WAN_2_2, (704, 1280))], ids=["2.1", "2.2"]
)
def test_activations_of_the_autoencoder(config, size):
    network = on_meta(lambda: WanAutoencoder(config))
    # previews are fitted to pixels, which `meta` does not have
    vars(network)["_preview_map"] = SimpleNamespace(observe=lambda *_, **__: None)
    transformer = SIZES["ti2v-5b" if config is WAN_2_2 else "t2v-14b"][0]
    memory = cost_of(transformer, config).memory
    pixels = size[0] * size[1]
    space = config.scale.space
    latent = torch.empty(1, config.channels, 3, size[0] // space, size[1] // space, device=META)
    _, cache = network.decode_step(latent, None)
    traced = peak_bytes(lambda: network.decode_step(latent, cache))
    assert 1 <= memory.decode_bytes * pixels / traced <= TOLERANCE
    held = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for video in cache.features
        for tile in video
        for value in tile
    }
    assert 1 <= memory.decoder_cache_bytes * pixels / sum(held.values()) <= TOLERANCE
    video = torch.empty(1, 3, 13, *size, device=META)
    traced = peak_bytes(lambda: network.encode(video))
    assert 1 <= memory.encode_bytes * pixels / traced <= TOLERANCE
    assert memory.tile_pixels == Tiling().size ** 2
    parts = part_memory(
        {key: tuple(value.shape) for key, value in network.state_dict().items()},
        dict.fromkeys(network.state_dict(), "F32"),
        in_fp32=("encoder.", "quant."),
    )
    assert parts.weights.bytes(2) == sum(value.nbytes for value in network.state_dict().values())


def write_part(folder, name, shapes, kinds=None):
    folder.mkdir(exist_ok=True)
    kinds = kinds or {}
    tensors = {
        key: torch.zeros(shape).to(kinds.get(key, torch.bfloat16)) for key, shape in shapes.items()
    }
    save_file(tensors, folder / name)
    return [{"path": name, "sha256": "", "identity": []}]


def test_the_cost_of_a_model_is_read_from_the_headers_of_its_files(tmp_path):
    width = 128
    small = {
        "patch_embedding.weight": (width, 16, 1, 2, 2),
        "head.modulation": (1, 2, width),
        "head.head.weight": (64, width),
        "time_embedding.0.weight": (width, 256),
        "text_embedding.0.weight": (width, 64),
        "head.head.bias": (64,),
        "blocks.0.ffn.0.weight": (300, width),
        "blocks.1.ffn.0.weight": (300, width),
    }
    kinds = {"blocks.1.ffn.0.weight": torch.float8_e4m3fn}
    autoencoder = {
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.weight": (16, 16, 1, 1, 1),
        "decoder.head.0.gamma": (96, 1, 1, 1),
    }
    text = {"shared.weight": (10, 8), "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}
    parts = {
        "transformer": write_part(tmp_path, "t.safetensors", small, kinds),
        "autoencoder": write_part(tmp_path, "a.safetensors", autoencoder),
        "text_encoder": write_part(tmp_path, "e.safetensors", text),
    }
    info = ModelInfo(
        name="m",
        family="wan",
        licence="",
        description="",
        size_rule=FAMILY.sizes,
        fps=24,
        frames=81,
        num_steps=1,
        guidance_scale=1.0,
        schedule=FAMILY.schedule,
        parameters=0,
        folder=tmp_path,
        manifest={"name": "m", "parts": parts},
    )
    cost = read_network_cost(info)
    transformer = cost.memory.parts["transformer"]
    assert transformer.blocks == 2
    assert transformer.block.bytes(2) == 2 * 300 * width
    assert transformer.weights.fixed_bytes == 300 * width
    assert transformer.dequantized == 300 * width
    assert cost.memory.parts["text_encoder"].blocks == 1
    encoder = 4 * (96 * 3 * 27 + 32 * 32)
    assert cost.memory.parts["autoencoder"].weights.bytes(2) == encoder + 2 * (256 + 96)
    assert cost.scale.space == 8
