"""Read the state dict of a Wan autoencoder in the layout of diffusers or of the original code.

ComfyUI's files have the original layout. Names differ, and convolutions of one pixel and norms have
fewer dimensions here.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from skyloom.core.errors import CheckpointError
from skyloom.models.checkpoint import TensorSource
from skyloom.models.quantized import dense
from skyloom.models.wan.autoencoder import WAN_2_1, WAN_2_2, WanAutoencoderConfig
from skyloom.models.wan.autoencoder_layers import BLOCKS

_ORIGINAL_NAMES = (
    (r"^conv1\.", "quant."),
    (r"^conv2\.", "post_quant."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
)
_DIFFUSERS_NAMES = (
    (r"^quant_conv\.", "quant."),
    (r"^post_quant_conv\.", "post_quant."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.conv_shortcut\.", ".shortcut."),
    (
        r"\.(down|up)_blocks\.(\d+)\.(downsampler|upsampler|upsamplers\.0)\.",
        r".blocks.\2.resample.",
    ),
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.", r".blocks.\2.resnets."),
)
_RESAMPLE_NAMES = (
    (r"\.resample\.1\.", ".spatial."),
    (r"\.time_conv\.", ".temporal."),
)
# layers of a level in one list: the residual blocks, then the change of resolution
_NESTED = re.compile(r"^(encoder|decoder)\.(?:down|up)samples\.(\d+)\.(?:down|up)samples\.(\d+)\.")
_FLAT = re.compile(r"^(encoder|decoder)\.(?:down_blocks|downsamples|upsamples)\.(\d+)\.")
_RESNETS = {"encoder": BLOCKS, "decoder": BLOCKS + 1}
_KINDS = {(16, 3): WAN_2_1, (48, 12): WAN_2_2}  # by channels of the latent and of the input


class WanAutoencoderState:
    """The weights of a file under the names of `WanAutoencoder`, converted when they are read."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self._stored = {own_name(name): name for name in source.shapes}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors, by name."""
        stored = self._source.shapes
        return {own: _own_shape(own, stored[name]) for own, name in self._stored.items()}

    def read(self, name: str) -> Tensor:
        """Read and reshape a tensor."""
        value = dense(self._source.read(self._stored[name]))
        return value.reshape(_own_shape(name, tuple(value.shape)))


def is_autoencoder(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors are those of a Wan autoencoder, judged by the layers that only it has."""
    names = {own_name(name) for name in shapes}
    return {"post_quant.weight", "decoder.middle.0.norm1.gamma"} <= names


def read_autoencoder_config(shapes: Mapping[str, tuple[int, ...]]) -> WanAutoencoderConfig:
    """Derive the config from the shapes of the tensors. Raises CheckpointError for other kinds."""
    named = {own_name(name): shape for name, shape in shapes.items()}
    try:
        width, pixels = named["encoder.conv_in.weight"][:2]
        decoder_width = named["decoder.norm_out.gamma"][0]
        channels = named["post_quant.weight"][0]
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"The file is not that of a Wan autoencoder: it lacks {error}.",
            hint="Pass the autoencoder of Wan 2.1 or 2.2, or download it again.",
        ) from error
    if (channels, pixels) not in _KINDS:
        raise CheckpointError(
            "The autoencoder must be that of Wan 2.1 (16 channels of the latent, 3 of the input) "
            f"or 2.2 (48 and 12), got {channels} and {pixels}.",
            hint="The weights are of another model.",
        )
    return replace(_KINDS[channels, pixels], width=width, decoder_width=decoder_width)


def own_name(name: str) -> str:
    """Return the name in `WanAutoencoder` of a tensor in either layout."""
    for pattern, replacement in (*_ORIGINAL_NAMES, *_DIFFUSERS_NAMES):
        name = re.sub(pattern, replacement, name)
    name = _NESTED.sub(lambda found: _layer(found[1], int(found[2]), int(found[3])), name)
    name = _FLAT.sub(_flat_layer, name)
    for pattern, replacement in _RESAMPLE_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _flat_layer(found: re.Match[str]) -> str:
    """Name a layer that is numbered through all levels."""
    return _layer(found[1], *divmod(int(found[2]), _RESNETS[found[1]] + 1))


def _layer(side: str, level: int, index: int) -> str:
    """Name the layer of a level: residual blocks come before the change of resolution."""
    kind = f"resnets.{index}" if index < _RESNETS[side] else "resample"
    return f"{side}.blocks.{level}.{kind}."


def _own_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Drop dimensions of size 1 at the end that the layer does not have."""
    rank = len(shape)
    if name.endswith(".gamma"):
        rank = 1
    elif name.endswith((".to_qkv.weight", ".proj.weight")):
        rank = 2
    elif name.endswith(("quant.weight", ".shortcut.weight")):
        rank = 4
    return shape[:rank] if set(shape[rank:]) <= {1} else shape
