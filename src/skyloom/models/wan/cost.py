"""Cost of the Wan networks in time and memory, from the headers of their files.

Live bytes of activations were traced at full size on the device `meta`
(tests/models/wan/test_cost.py); no one has compared them with a GPU yet.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from skyloom.models.base import NetworkCost
from skyloom.models.memory import ModelMemory, PartMemory, PartName
from skyloom.models.wan.autoencoder import Tiling, WanAutoencoderConfig
from skyloom.models.wan.config import WanConfig

# live bytes per token with weights in bf16: of self-attention, and of the feed-forward layer
_ATTENTION = 30.5  # per channel
_FEED_FORWARD = 16.5  # per channel, and
_HIDDEN = 4  # per hidden channel
_CACHED = 16  # per channel of a cached token while a layer attends to it
_CONDITION = (
    6  # per channel and text token: keys, and values with the keys that they were made with
)
_TEXT_BYTES = 320_000_000  # the text encoder at 512 tokens
IN_FP32 = ("encoder.", "conv1.", "quant_conv.")
"""Beginnings of the names of an autoencoder's tensors that compute in fp32."""


@dataclass(frozen=True)
class _AutoencoderBytes:
    """Live bytes per pixel of a frame: decoding (bf16), between calls (bf16), encoding (fp32)."""

    decode: int
    cache: int
    encode: int


_AUTOENCODERS = {  # by channels of the latent
    16: _AutoencoderBytes(decode=9_100, cache=4_750, encode=10_500),
    48: _AutoencoderBytes(decode=8_500, cache=3_600, encode=4_600),
}


def network_cost(
    config: WanConfig,
    autoencoder: WanAutoencoderConfig,
    parts: Mapping[PartName, PartMemory],
) -> NetworkCost:
    """Compute the cost of networks of some sizes with the given weights."""
    width = config.width
    multiplied = 6 * width**2 + 2 * width * config.ffn
    live = max(_ATTENTION * width, _FEED_FORWARD * width + _HIDDEN * config.ffn)
    measured = _AUTOENCODERS[autoencoder.channels]
    memory = ModelMemory(
        parts=parts,
        text_bytes=_TEXT_BYTES,
        condition_bytes=_CONDITION * config.layers * width * config.text_length,
        token_bytes=math.ceil(live),
        cached_token_bytes=4 * config.layers * width + _CACHED * width,
        decode_bytes=measured.decode,
        decoder_cache_bytes=measured.cache,
        encode_bytes=measured.encode,
        tile_pixels=Tiling().size ** 2,
    )
    return NetworkCost(
        scale=autoencoder.scale,
        latent_channels=autoencoder.channels,
        patch=config.patch,
        token_flops=2.0 * config.layers * multiplied,
        key_flops=4.0 * config.layers * width,
        token_bytes=memory.token_bytes,
        memory=memory,
    )
