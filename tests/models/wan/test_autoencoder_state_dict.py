"""Autoencoders of other models are refused in one sentence."""

import pytest
import torch

from skyloom.core.errors import CheckpointError
from skyloom.models.wan.autoencoder import WAN_2_1, WanAutoencoder
from skyloom.models.wan.autoencoder_state_dict import (
    is_autoencoder,
    own_name,
    read_autoencoder_config,
)


def shapes_of_2_1() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = WanAutoencoder(WAN_2_1).state_dict()
    return {name: tuple(value.shape) for name, value in state.items()}


def test_names_of_a_converted_file_stay():
    shapes = shapes_of_2_1()
    assert {own_name(name) for name in shapes} == set(shapes)
    assert is_autoencoder(shapes)
    assert read_autoencoder_config(shapes) == WAN_2_1


def test_other_channels_are_refused():
    shapes = {**shapes_of_2_1(), "post_quant.weight": (4, 4, 1, 1)}
    with pytest.raises(CheckpointError, match=r"16 channels .* got 4 and 3") as caught:
        read_autoencoder_config(shapes)
    assert caught.value.hint


def test_an_image_autoencoder_is_refused():
    shapes = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "decoder.conv_in.weight": (512, 4, 3, 3),
        "post_quant_conv.weight": (4, 4, 1, 1),
        "decoder.mid_block.resnets.0.norm1.weight": (512,),
    }
    assert not is_autoencoder(shapes)
    with pytest.raises(CheckpointError, match="not that of a Wan autoencoder"):
        read_autoencoder_config(shapes)
