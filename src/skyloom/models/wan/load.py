"""Loaders of the Wan family (`models.base.FamilyLoader`).

The manifest's `parts` name the files of transformer, text encoder, tokenizer and autoencoder; they
lie anywhere and in any layout that `weight_files` reads.
"""

import torch

from skyloom.core.errors import CheckpointError, ConfigError
from skyloom.models.base import ClipReader, ModelBundle, NetworkCost
from skyloom.models.checkpoint import build
from skyloom.models.embedding_cache import embedding_cache
from skyloom.models.memory import PartMemory, PartName, part_memory
from skyloom.models.registry import ModelInfo, part_paths, weight_files
from skyloom.models.wan.autoencoder import WanAutoencoder
from skyloom.models.wan.autoencoder_state_dict import WanAutoencoderState, read_autoencoder_config
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.cost import IN_FP32, network_cost
from skyloom.models.wan.detect import check_autoencoder, read_heads, read_transformer_config
from skyloom.models.wan.state_dict import WanState
from skyloom.models.wan.text_encoder import WanTextEncoder
from skyloom.models.wan.transformer import Wan
from skyloom.models.weight_files import WeightFiles, open_weights


def load(info: ModelInfo, device: torch.device, dtype: torch.dtype) -> ModelBundle:
    """Load all parts of a model; the text encoder's weights are read when they are needed.

    Raises CheckpointError, and ConfigError for fp16, whose range these networks exceed.
    """
    if dtype == torch.float16:
        raise ConfigError(
            f"dtype must be bf16 or fp32 for {info.name}, got fp16.",
            hint="Leave dtype out: bf16 is the default where the device has it.",
        )
    transformer = load_transformer(info, device, dtype)
    autoencoder = load_autoencoder(info, device, dtype)
    check_autoencoder(transformer.config, autoencoder.latent_channels)
    return ModelBundle(
        info,
        text_encoder=make_text_encoder(info, device, dtype),
        autoencoder=autoencoder,
        transformer=transformer,
        device=device,
        dtype=dtype,
    )


def make_text_encoder(info: ModelInfo, device: torch.device, dtype: torch.dtype) -> WanTextEncoder:
    """Make the text encoder; its weights are read when a prompt is not cached."""
    paths = part_paths(info, "text_encoder")
    has_tokenizer = "tokenizer" in info.manifest.get("parts", {})
    tokenizer = part_paths(info, "tokenizer") if has_tokenizer else ()
    hashes = {file.path: file.sha256 for file in weight_files(info.folder, info.manifest)}
    encoder = WanTextEncoder(
        paths,
        vocabulary=next((path for path in tokenizer if path not in paths), None),
        identity=" ".join(hashes[path] for path in (*paths, *tokenizer)),
        cache=embedding_cache(),
    )
    encoder.place(device, dtype)
    return encoder


def load_transformer(info: ModelInfo, device: torch.device, dtype: torch.dtype) -> Wan:
    """Load the transformer alone. Raises CheckpointError."""
    with open_weights(part_paths(info, "transformer")) as source:
        config = _config(info, source)
        return build(lambda: Wan(config), WanState(source, config), device, dtype)


def load_autoencoder(info: ModelInfo, device: torch.device, dtype: torch.dtype) -> WanAutoencoder:
    """Load the autoencoder alone. Raises CheckpointError."""
    with open_weights(part_paths(info, "autoencoder")) as source:
        config = read_autoencoder_config(source.shapes)
        return build(lambda: WanAutoencoder(config), WanAutoencoderState(source), device, dtype)


def load_clip_reader(info: ModelInfo) -> ClipReader | None:
    """Return None: the family has no clip reader."""
    return None


def read_network_cost(info: ModelInfo) -> NetworkCost:
    """Read the cost of the networks from the headers of their files. Raises CheckpointError."""
    parts: dict[PartName, PartMemory] = {}
    with open_weights(part_paths(info, "transformer")) as source:
        config = _config(info, source)
        parts["transformer"] = part_memory(source.shapes, source.dtypes)
    with open_weights(part_paths(info, "autoencoder")) as source:
        autoencoder = read_autoencoder_config(source.shapes)
        parts["autoencoder"] = part_memory(source.shapes, source.dtypes, in_fp32=IN_FP32)
    with open_weights(part_paths(info, "text_encoder")) as source:
        parts["text_encoder"] = part_memory(source.shapes, source.dtypes)
    return network_cost(config, autoencoder, parts)


def _config(info: ModelInfo, source: WeightFiles) -> WanConfig:
    """The config of a transformer's file. Raises CheckpointError if it makes no latent alone."""
    heads = read_heads(part_paths(info, "transformer")[0], source.shapes)
    config = read_transformer_config(source.shapes, heads)
    if config.in_channels != config.out_channels:
        raise CheckpointError(
            f"A transformer with {config.in_channels} input and {config.out_channels} output "
            "channels is not supported.",
            hint="Use a text-to-video model, or TI2V-5B.",
        )
    return config
