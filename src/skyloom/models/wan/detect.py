"""Tell which Wan transformer a file holds, by the names and shapes of its tensors.

Variants that need further layers are refused by name; so are those whose conditioning channels are
not supported.
"""

from collections.abc import Mapping

from skyloom.core.errors import CheckpointError
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.state_dict import diffusers_name, is_original_layout

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
    layers = len({name.split(".")[1] for name in named if name.startswith("blocks.")})
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
