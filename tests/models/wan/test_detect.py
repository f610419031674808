"""Detection of Wan transformers at their real sizes, and coverage of every key (row 28).

The names and shapes are those of the reference classes, built on `meta`.
"""

import contextlib

import pytest
import torch
import wan_reference

from skyloom.core.errors import CheckpointError
from skyloom.models.wan.detect import is_transformer, read_transformer_config, transformer_variant
from skyloom.models.wan.state_dict import WanState
from skyloom.models.wan.transformer import Wan

# width, heads, layers, feed-forward width, input and output channels; parameters in millions
REAL = {
    "t2v-1.3b": ((1536, 12, 30, 8960, 16, 16), 1419),
    "ti2v-5b": ((3072, 24, 30, 14336, 48, 48), 5000),
    "t2v-14b": ((5120, 40, 40, 13824, 16, 16), 14288),
    "i2v-a14b": ((5120, 40, 40, 13824, 36, 16), 14289),
}


class Shapes:
    """Names and shapes of tensors that cannot be read."""

    def __init__(self, state):
        self.shapes = {name: tuple(value.shape) for name, value in state.items()}

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was read")


def in_diffusers_layout(sizes, **further):
    diffusers = pytest.importorskip("diffusers", exc_type=ImportError)
    width, heads, layers, ffn, in_channels, out_channels = sizes
    with torch.device("meta"):
        return diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=4096,
            freq_dim=256,
            ffn_dim=ffn,
            num_layers=layers,
            **further,
        ).state_dict()


def in_original_layout(sizes, kind="t2v"):
    module = wan_reference.load("wan.modules.model")
    width, heads, layers, ffn, in_channels, out_channels = sizes
    with torch.device("meta"), contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(module.WanModel, "init_weights", lambda self: None)
        return module.WanModel(
            model_type=kind,
            patch_size=(1, 2, 2),
            text_len=512,
            in_dim=in_channels,
            dim=width,
            ffn_dim=ffn,
            freq_dim=256,
            text_dim=4096,
            out_dim=out_channels,
            num_heads=heads,
            num_layers=layers,
            qk_norm=True,
            cross_attn_norm=True,
        ).state_dict()


@pytest.mark.parametrize("layout", [in_diffusers_layout, in_original_layout])
@pytest.mark.parametrize("name", REAL)
def test_every_key_of_a_real_model_fits(name, layout):
    sizes, millions = REAL[name]
    source = Shapes(layout(sizes))
    assert is_transformer(source.shapes)
    config = read_transformer_config(source.shapes)
    assert (config.width, config.heads, config.layers, config.ffn) == sizes[:4]
    assert (config.in_channels, config.out_channels) == sizes[4:]
    view = WanState(source, config)
    with torch.device("meta"):
        network = Wan(config).state_dict()
    assert view.shapes == {key: tuple(value.shape) for key, value in network.items()}
    assert round(sum(value.numel() for value in network.values()) / 1e6) == millions
    if name in ("i2v-a14b",):
        with pytest.raises(CheckpointError, match="I2V-A14B"):
            transformer_variant(config)
    else:
        assert transformer_variant(config) == name


def test_image_to_video_with_a_clip_encoder_is_refused():
    sizes = (256, 2, 2, 320, 36, 16)
    for source in (
        in_diffusers_layout(sizes, image_dim=1280, added_kv_proj_dim=256),
        {**in_original_layout(sizes), "img_emb.proj.0.weight": torch.empty(1280)},
    ):
        with pytest.raises(CheckpointError, match="CLIP"):
            read_transformer_config(Shapes(source).shapes)


@pytest.mark.parametrize(
    "key, name",
    [
        ("vace_blocks.0.before_proj.weight", "VACE"),
        ("fps_embedding.weight", "SkyReels-V2"),
        ("face_adapter.fuser_blocks.0.linear1_q.weight", "Animate"),
        ("casual_audio_encoder.weights", "speech"),
    ],
)
def test_other_variants_are_named(key, name):
    state = {**in_original_layout((256, 2, 2, 320, 16, 16)), key: torch.empty(3)}
    with pytest.raises(CheckpointError, match=name):
        read_transformer_config(Shapes(state).shapes)


def test_half_a_model_is_refused():
    state = in_original_layout((256, 2, 2, 320, 16, 16))
    half = {name: value for name, value in state.items() if "blocks.1." not in name}
    config = read_transformer_config(Shapes(half).shapes)
    with pytest.raises(CheckpointError, match="channels, width 256"):
        transformer_variant(config)
    del half["head.head.weight"]
    with pytest.raises(CheckpointError, match="lacks tensors"):
        read_transformer_config(Shapes(half).shapes)
    damaged = {name: value for name, value in state.items() if name != "blocks.1.ffn.2.bias"}
    with pytest.raises(CheckpointError, match=r"1 tensors too few \(blocks\.1\.ffn\.net\.2\.bias"):
        WanState(Shapes(damaged), read_transformer_config(Shapes(damaged).shapes))
