"""Tell which Wan model and which part of it files hold, by the names and shapes of their tensors.

Variants that need further layers are refused by name; so are those whose conditioning channels are
not supported. Headers are read only.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from skyloom.core.errors import CheckpointError
from skyloom.models.detect import DetectedModel
from skyloom.models.wan.autoencoder_state_dict import is_autoencoder, read_autoencoder_config
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.state_dict import diffusers_name, is_original_layout
from skyloom.models.weight_files import open_weights, weight_paths

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
TOKENIZER_TENSOR = "spiece_model"  # in ComfyUI's files of the text encoder
HEAD_WIDTH = 128  # of every published Wan transformer

_PREFIX = "condition_embedder."
_VARIANTS = {
    (16, 16, 1536, 30): "t2v-1.3b",
    (16, 16, 5120, 40): "t2v-14b",
    (48, 48, 3072, 30): "ti2v-5b",
}
# names that occur in one kind of variant only, in the original layout and in diffusers'
_MARKERS = {
    "vace_": "Wan VACE (control)",
    "img_emb.": "Wan2.1 image to video (with a CLIP encoder)",
    "image_embedder.": "Wan2.1 image to video (with a CLIP encoder)",
    ".k_img.": "Wan2.1 image to video (with a CLIP encoder)",
    ".add_k_proj.": "Wan2.1 image to video (with a CLIP encoder)",
    "fps_embedding.": "SkyReels-V2",
    "fps_projection.": "SkyReels-V2",
    "casual_audio_encoder.": "Wan2.2 speech to video",
    "audio_injector.": "Wan2.2 speech to video",
    "audio_proj.": "Wan with audio",
    "face_adapter.": "Wan2.2 Animate",
    "motion_encoder.": "Wan2.2 Animate",
    "pose_patch_embedding.": "Wan2.2 Animate",
    "control_adapter.": "Wan Fun camera control",
    "ref_conv.": "Wan Fun control",
    "delta_embed": "AnyFlow",
}
_CONDITIONED = {
    36: "Wan image to video with joined channels (such as I2V-A14B)",
    96: "Lucy-Edit",
}


def detect(paths: Sequence[Path]) -> DetectedModel | None:
    """Tell model and parts of some files; None if no part is Wan's.

    Raises CheckpointError for damaged files, unsupported variants, and parts of several models.
    """
    parts: dict[str, tuple[Path, ...]] = {}
    config: WanConfig | None = None
    channels = 0
    for files in _weight_sets(paths):
        with open_weights(files) as source:
            shapes = source.shapes
        if is_transformer(shapes):
            part = "transformer"
            config = read_transformer_config(shapes, read_heads(files[0], shapes))
        elif is_autoencoder(shapes):
            part = "autoencoder"
            channels = read_autoencoder_config(shapes).channels
        elif is_text_encoder(shapes):
            part = "text_encoder"
            if TOKENIZER_TENSOR in shapes:
                parts.setdefault("tokenizer", files)
        else:
            continue
        if part in parts:
            raise CheckpointError(
                f"Files hold two of the part {part.replace('_', ' ')}: {parts[part][0].name} and "
                f"{files[0].name}.",
                hint="Name one file of each part.",
            )
        parts[part] = files
    for name in reversed(TOKENIZER_FILES):
        tokenizer = next((path for path in paths if path.name == name), None)
        if tokenizer is not None and parts:
            parts["tokenizer"] = (tokenizer,)
    if config is None:
        return None
    if channels:
        check_autoencoder(config, channels)
    return DetectedModel("wan", transformer_variant(config), parts)


def check_autoencoder(config: WanConfig, channels: int) -> None:
    """Raise CheckpointError unless an autoencoder's latent is what the transformer predicts."""
    if channels != config.out_channels:
        wanted = "2.2 (wan2.2_vae)" if config.out_channels > 16 else "2.1 (wan_2.1_vae)"  # noqa: PLR2004
        raise CheckpointError(
            f"The transformer makes latents of {config.out_channels} channels, the autoencoder "
            f"reads {channels}.",
            hint=f"Use the autoencoder of Wan {wanted}.",
        )


def read_heads(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Read the number of attention heads from `config.json` beside a file, as diffusers writes it.

    None without such a file. Raises CheckpointError if it contradicts the tensors.
    """
    file = path.parent / "config.json"
    if is_original_layout(shapes) or not file.is_file():
        return None
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        heads = int(config["num_attention_heads"])
        width = heads * int(config["attention_head_dim"])
        layers = int(config["num_layers"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} cannot be read ({error}).", hint="Download it again, or remove it."
        ) from error
    stored = (shapes["patch_embedding.weight"][0], _count_layers(shapes))
    if heads < 1 or (width, layers) != stored:
        raise CheckpointError(
            f"{file} says width {width} and {layers} layers, the tensors have {stored[0]} and "
            f"{stored[1]}.",
            hint="Weights and config are of different models; download the folder again.",
        )
    return heads


def _weight_sets(paths: Sequence[Path]) -> Iterator[tuple[Path, ...]]:
    """Yield the weight files among paths; shards of one set together."""
    seen: set[Path] = set()
    for path in paths:
        if path.suffix not in (".safetensors", ".gguf") or path in seen:
            continue
        files = tuple(weight_paths(path))
        seen |= set(files)
        yield files


def is_text_encoder(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors are those of a T5 encoder without a decoder, in a layout of UMT5's files."""
    layouts = (
        ("shared.weight", "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("token_embedding.weight", "blocks.0.pos_embedding.embedding.weight"),
        ("token_embd.weight", "enc.blk.1.attn_rel_b.weight"),
    )
    return any(set(names) <= shapes.keys() for names in layouts)


def is_transformer(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors are those of a Wan transformer, of any variant."""
    return is_original_layout(shapes) or f"{_PREFIX}time_embedder.linear_1.weight" in shapes


def read_transformer_config(
    shapes: Mapping[str, tuple[int, ...]], heads: int | None = None
) -> WanConfig:
    """Derive the config from the shapes of a transformer's tensors.

    heads: number of attention heads if a config file has it, else that of heads of 128 channels.
    Raises CheckpointError for variants that need further layers.
    """
    for marker, variant in _MARKERS.items():
        found = next((name for name in shapes if marker in f".{name}"), None)
        if found is not None:
            raise CheckpointError(
                f"{variant} is not supported ({found}).",
                hint="`skyloom models list --available` lists the models that are.",
            )
    rename = diffusers_name if is_original_layout(shapes) else str
    named = {rename(name): shape for name, shape in shapes.items()}
    try:
        width, in_channels, *patch = named["patch_embedding.weight"]
        ffn = named["blocks.0.ffn.net.0.proj.weight"][0]
        text_width = named[f"{_PREFIX}text_embedder.linear_1.weight"][1]
        frequency_width = named[f"{_PREFIX}time_embedder.linear_1.weight"][1]
        out_rows = named["proj_out.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"The transformer's file lacks tensors that tell its sizes ({error}).",
            hint="A part of the weights is missing; download the whole model.",
        ) from error
    layers = _count_layers(named)
    heads = heads or width // HEAD_WIDTH
    if tuple(patch) != (1, 2, 2) or not heads or width % (2 * heads) or out_rows % 4:
        raise CheckpointError(
            f"A Wan transformer has patches of 1x2x2 and heads of {HEAD_WIDTH} channels; got "
            f"patches of {'x'.join(map(str, patch))} and {width} channels.",
            hint="The weights are of another family.",
        )
    return WanConfig(
        in_channels=in_channels,
        out_channels=out_rows // 4,
        width=width,
        heads=heads,
        layers=layers,
        ffn=ffn,
        text_width=text_width,
        frequency_width=frequency_width,
    )


def transformer_variant(config: WanConfig) -> str:
    """Name the variant of a transformer of published sizes. Raises CheckpointError for others."""
    channels = (config.in_channels, config.out_channels)
    if channels[0] in _CONDITIONED and channels[0] != channels[1]:
        raise CheckpointError(
            f"{_CONDITIONED[channels[0]]} is not supported.",
            hint="`skyloom models list --available` lists the models that are.",
        )
    variant = _VARIANTS.get((*channels, config.width, config.layers))
    if variant is None:
        raise CheckpointError(
            f"No Wan model has {channels[0]} to {channels[1]} channels, width {config.width} and "
            f"{config.layers} layers.",
            hint="Pass the model's own folder with its config, or another file.",
        )
    return variant


def _count_layers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
