"""Names of the Wan transformer's layers in LoRA files, and what such files may have beyond them.

Layers are named as in the original code or as in diffusers. LoRAs of image-to-video models have
layers that text-to-video models lack; these are left out, with a notice.
"""

from torch import nn

from skyloom.core.errors import CheckpointError
from skyloom.models.lora_targets import LoraSkip, LoraTargets
from skyloom.models.wan.state_dict import diffusers_name, weight_recipes
from skyloom.models.wan.transformer import Wan

_ATTENTION = ("q", "k", "v", "o", "norm_q", "norm_k")
_BLOCK = (
    *(f"{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in _ATTENTION),
    *("norm3", "ffn.0", "ffn.2"),
)
_OUTSIDE = (
    *("time_embedding.0", "time_embedding.2", "time_projection.1"),
    *("text_embedding.0", "text_embedding.2", "head.head"),
)
_CONDITIONED_CHANNELS = 36  # noise, mask and latent of the first picture
_IMAGE_BRANCH = "the image branch of Wan2.1 image to video, which this model lacks"
_SKIPS = (
    LoraSkip(r"(^|[._])blocks[._]\d+[._]cross_attn[._](k_img|v_img|norm_k_img)$", _IMAGE_BRANCH),
    LoraSkip(r"(^|[._])blocks[._]\d+[._]attn2[._](add_[kv]_proj|norm_added_[kq])$", _IMAGE_BRANCH),
    LoraSkip(r"(img_emb|condition_embedder[._]image_embedder)[._]", _IMAGE_BRANCH),
    LoraSkip(
        "patch_embedding$",
        "the patch embedding of image to video, for 36 channels instead of 16",
        channels=_CONDITIONED_CHANNELS,
    ),
)
_TEXT_TO_VIDEO_CHANNELS = 16
_FILE_NOTICES = {
    "(high|low)[-_ ]?noise": "it is for one of the two networks of Wan2.2-A14B, a model that "
    "skyloom does not have; its effect here is not what it was trained for."
}


def original_layers(layers: int) -> tuple[str, ...]:
    """Return the names of all layers in the original code, modulation tables included."""
    blocks = [f"blocks.{index}.{name}" for index in range(layers) for name in _BLOCK]
    tables = [f"blocks.{index}.modulation" for index in range(layers)]
    return (*_OUTSIDE, *blocks, *tables, "head.modulation")


def lora_targets(network: nn.Module) -> LoraTargets:
    """Return the names of a Wan transformer's tensors in LoRA files."""
    if not isinstance(network, Wan):
        raise CheckpointError(f"network must be a Wan transformer, got {type(network).__name__}.")
    config = network.config
    return LoraTargets(
        recipes=weight_recipes(config),
        aliases={name: _diffusers_layer(name) for name in original_layers(config.layers)},
        skips=_SKIPS if config.in_channels == _TEXT_TO_VIDEO_CHANNELS else (),
        file_notices=_FILE_NOTICES,
    )


def _diffusers_layer(name: str) -> str:
    if name.endswith("modulation"):
        return diffusers_name(name)
    return diffusers_name(f"{name}.weight").removesuffix(".weight")
