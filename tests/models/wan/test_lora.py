"""LoRA files of other tools on the Wan transformer: row 29 of the test matrix.

The reference is W + alpha / rank * B A in the original names, converted like the weights.
"""

import json
import math
from copy import deepcopy

import pytest
import torch
import wan_models
from safetensors.torch import save_file

import skyloom
from skyloom.core.errors import CheckpointError, RequestError
from skyloom.generate.loras import Lora, find_loras
from skyloom.generate.model_check import lora_effects
from skyloom.generate.request import Request
from skyloom.models.checkpoint import build
from skyloom.models.lora import LoraAdapter, LoraStack, with_adapters
from skyloom.models.lora_files import read_adapter
from skyloom.models.quantized import QuantizedLinear, QuantizedWeight
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.lora import lora_targets, original_layers
from skyloom.models.wan.state_dict import WanState, diffusers_name, weight_recipes
from skyloom.models.wan.transformer import Wan
from skyloom.models.weight_files import open_weights

CONFIG = WanConfig(16, 16, width=48, heads=2, layers=2, ffn=80, text_width=24, text_length=16)
RANK = 4
ATTENTION = tuple(f"{kind}.{name}" for kind in ("self_attn", "cross_attn") for name in "qkvo")
LAYERS = tuple(f"blocks.{n}.{name}" for n in range(2) for name in (*ATTENTION, "ffn.0", "ffn.2"))
OUTSIDE = (
    *("time_embedding.0", "time_embedding.2", "time_projection.1"),
    *("text_embedding.0", "text_embedding.2", "head.head"),
)


class StateSource:
    """A state dict as a source of tensors."""

    def __init__(self, state):
        self.state = state
        self.shapes = {name: tuple(value.shape) for name, value in state.items()}

    def read(self, name: str):
        return self.state[name]


def diffusers_layer(name: str) -> str:
    return diffusers_name(f"{name}.weight").removesuffix(".weight")


def random(*shape: int, std: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape) * std


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights of unit gain, by diffusers' names."""
    torch.manual_seed(0)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Wan(CONFIG).state_dict().items()}
    weights: dict[str, torch.Tensor] = {}
    for name, recipe in weight_recipes(CONFIG).items():
        for stored in recipe.names:
            rows, *rest = shapes[name]
            shape = (rows // len(recipe.names), *rest)
            if stored == "patch_embedding.weight":
                shape = (CONFIG.width, 16, 1, 2, 2)
            if stored.endswith("table"):
                shape = (1, *shape)
            std = 1 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.1
            weights[stored] = random(*shape, std=std)
            if "norm" in stored and stored.endswith("weight"):
                weights[stored] += 1
    return weights


@pytest.fixture
def network(state) -> Wan:
    return network_of(state)


def network_of(state) -> Wan:
    source = WanState(StateSource(state), CONFIG)
    return build(lambda: Wan(CONFIG), source, torch.device("cpu"))


@pytest.fixture(scope="module")
def update(state) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Matrices A and B of layers, by original name."""
    torch.manual_seed(1)
    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in (*LAYERS, *OUTSIDE):
        rows, columns = state[diffusers_layer(name) + ".weight"].shape
        pairs[name] = (random(RANK, columns, std=columns**-0.5), random(rows, RANK, std=0.3))
    return pairs


def changed_by_hand(state, update, scale: float) -> dict[str, torch.Tensor]:
    changed = dict(state)
    for name, (a, b) in update.items():
        changed[diffusers_layer(name) + ".weight"] = (
            state[diffusers_layer(name) + ".weight"] + scale * b @ a
        )
    return network_of(changed).state_dict()


def read(path, network) -> LoraAdapter:
    with open_weights(path) as source:
        return read_adapter(path, source, network, lora_targets(network))


def written(path, tensors, network, metadata=None) -> LoraAdapter:
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    return read(path, network)


def merged(network: Wan, *adapters: tuple[LoraAdapter, float]) -> dict[str, torch.Tensor]:
    copy = deepcopy(network)
    LoraStack(copy).merge(adapters)
    return copy.state_dict()


def matrices(update, layer, down: str, up: str, alpha: float | None = None):
    """The tensors of a file; layer: gives the name in the file of an original one."""
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in update.items():
        tensors[f"{layer(name)}.{down}.weight"] = a
        tensors[f"{layer(name)}.{up}.weight"] = b
        if alpha is not None:
            tensors[f"{layer(name)}.alpha"] = torch.tensor(alpha)
    return tensors


def underscored(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


LAYOUTS = {
    "diffusers": (lambda name: f"transformer.{diffusers_layer(name)}", "lora_A", "lora_B"),
    "diffusers, bare": (diffusers_layer, "lora_A", "lora_B"),
    "original": (lambda name: f"diffusion_model.{name}", "lora_A", "lora_B"),
    "PEFT": (lambda name: f"base_model.model.{name}", "lora_A.default", "lora_B.default"),
    "ComfyUI": (lambda name: f"diffusion_model.{name}", "lora_down", "lora_up"),
    "kohya": (underscored, "lora_down", "lora_up"),
}


def close(given, expected) -> None:
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("alpha", [None, 1.0])
def test_all_layouts_of_one_update_give_the_weights_made_by_hand(
    layout, alpha, state, update, network, tmp_path
):
    tensors = matrices(update, *LAYOUTS[layout], alpha=alpha)
    adapter = written(tmp_path / "a.safetensors", tensors, network)
    weights = merged(network, (adapter, 0.7))
    close(weights, changed_by_hand(state, update, 0.7 * (alpha or RANK) / RANK))
    assert not adapter.notices


def test_whole_differences_as_a_file_of_a_distilled_model_has_them(state, network, tmp_path):
    torch.manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    changed = dict(state)
    for name in original_layers(CONFIG.layers):
        if name.endswith("modulation"):
            stored = diffusers_name(name)
            key = f"diffusion_model.{name.removesuffix('modulation')}diff_m"
            tensors[key] = random(*state[stored].shape)
            changed[stored] = state[stored] + tensors[key]
            continue
        for attribute, suffix in (("weight", "diff"), ("bias", "diff_b")):
            stored = f"{diffusers_layer(name)}.{attribute}"
            if stored in state:
                tensors[f"diffusion_model.{name}.{suffix}"] = random(*state[stored].shape)
                changed[stored] = state[stored] + tensors[f"diffusion_model.{name}.{suffix}"]
    adapter = written(tmp_path / "a.safetensors", tensors, network)
    expected = network_of(changed).state_dict()
    untouched = [
        name for name in expected if torch.equal(expected[name], network.state_dict()[name])
    ]
    assert untouched == ["patch.weight", "patch.bias"]
    close(merged(network, (adapter, 1.0)), expected)
    close(with_adapters(network, [(adapter, 1.0)]).state_dict(), expected)


def test_the_patch_embedding_may_be_a_convolution_of_low_rank(state, network, tmp_path):
    torch.manual_seed(3)
    a = random(RANK, 16, 1, 2, 2)
    b = random(CONFIG.width, RANK, 1, 1, 1)
    tensors = {"patch_embedding.lora_down.weight": a, "patch_embedding.lora_up.weight": b}
    adapter = written(tmp_path / "a.safetensors", tensors, network)
    expected = state["patch_embedding.weight"] + (b.flatten(1) @ a.flatten(1)).view(-1, 16, 1, 2, 2)
    close(
        merged(network, (adapter, 1.0)),
        network_of({**state, "patch_embedding.weight": expected}).state_dict(),
    )


def test_parts_of_a_joined_matrix_may_lack_a_change_or_have_another_rank(
    state, update, network, tmp_path
):
    torch.manual_seed(4)
    name = "blocks.1.self_attn.{}"
    chosen = {
        name.format("k"): (random(3, 48, std=0.1), random(48, 3)),
        name.format("v"): (random(7, 48, std=0.1), random(48, 7)),
    }
    tensors = matrices(chosen, lambda layer: layer, "lora_A", "lora_B")
    tensors[f"{name.format('v')}.alpha"] = torch.tensor(14.0, dtype=torch.bfloat16)
    adapter = written(tmp_path / "a.safetensors", tensors, network)
    doubled = {
        **chosen,
        name.format("v"): (chosen[name.format("v")][0] * 2, chosen[name.format("v")][1]),
    }
    close(merged(network, (adapter, 1.0)), changed_by_hand(state, doubled, 1.0))


def call(network) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    latent = torch.randn(1, 16, 2, 4, 4, generator=generator)
    text = network.prepare_text(torch.randn(1, 5, CONFIG.text_width, generator=generator))
    return network(latent, torch.full((1, 2), 0.6), text)


@torch.no_grad()
def test_a_stack_of_two_attached_equals_merged_and_comes_off_to_the_bit(
    state, update, network, tmp_path
):
    torch.manual_seed(5)
    other = {name: (torch.randn_like(a), b * 0.1) for name, (a, b) in update.items()}
    biases = {f"{name}.diff_b": random(48) for name in LAYERS[:3]}
    bare = lambda name: name  # noqa: E731
    first = written(
        tmp_path / "a.safetensors", matrices(update, bare, "lora_A", "lora_B") | biases, network
    )
    second = written(
        tmp_path / "b.safetensors",
        matrices(other, underscored, "lora_down", "lora_up", 2.0),
        network,
    )
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain = call(network)
    pairs = [(first, 0.5), (second, -0.3)]
    attached_output = call(with_adapters(network, pairs))
    assert torch.equal(call(network), plain)
    stack = LoraStack(network)
    stack.merge(pairs)
    with_biases = dict(state)
    for key, value in biases.items():
        stored = diffusers_layer(key.removesuffix(".diff_b")) + ".bias"
        with_biases[stored] = state[stored] + 0.5 * value
    by_hand = changed_by_hand(with_biases, update, 0.5)
    shift = changed_by_hand(state, other, -0.3 * 2 / RANK)
    expected = {name: by_hand[name] + shift[name] - before[name] for name in before}
    close(network.state_dict(), expected)
    merged_output = call(network)
    assert (merged_output - plain).norm() > 0.1 * plain.norm()
    torch.testing.assert_close(attached_output, merged_output, rtol=0, atol=2e-5)
    stack.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    stack.attach(pairs)
    torch.testing.assert_close(call(network), merged_output, rtol=0, atol=2e-5)
    stack.detach()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(call(network), plain)


def quantized(state) -> dict[str, torch.Tensor | QuantizedWeight]:
    """The weights of the blocks in fp8 with a scale per row."""
    result: dict[str, torch.Tensor | QuantizedWeight] = dict(state)
    for name, value in state.items():
        if name.startswith("blocks.") and value.ndim == 2:
            scale = value.abs().amax(1, keepdim=True) / 448
            result[name] = QuantizedWeight((value / scale).to(torch.float8_e4m3fn), scale)
    return result


@torch.no_grad()
def test_on_an_fp8_base_the_codes_stay_and_the_outputs_are_those_of_the_plain_base(
    state, update, tmp_path
):
    base = network_of(quantized(state))
    assert isinstance(base.blocks[0].qkv, QuantizedLinear)
    tensors = matrices(update, *LAYOUTS["ComfyUI"], alpha=2.0)
    tensors["blocks.0.ffn.0.diff"] = random(80, 48, std=0.1)
    del tensors["diffusion_model.blocks.0.ffn.0.lora_down.weight"]
    del tensors["diffusion_model.blocks.0.ffn.0.lora_up.weight"]
    del tensors["diffusion_model.blocks.0.ffn.0.alpha"]
    tensors["blocks.0.ffn.0.diff_b"] = random(80)
    adapter = written(tmp_path / "a.safetensors", tensors, base)
    dequantized = {
        name: value.dequantize() if isinstance(value, QuantizedWeight) else value
        for name, value in quantized(state).items()
    }
    plain = network_of(dequantized)
    LoraStack(plain).merge([(adapter, 0.8)])
    before = {name: value.clone() for name, value in base.state_dict().items()}
    unchanged = call(base)
    torch.testing.assert_close(call(with_adapters(base, [(adapter, 0.8)])), call(plain))
    assert torch.equal(call(base), unchanged)
    stack = LoraStack(base)
    stack.merge([(adapter, 0.8)])
    torch.testing.assert_close(call(base), call(plain))
    stack.unmerge()
    for name, value in base.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[name].view(torch.uint8))
    assert torch.equal(call(base), unchanged)


@torch.no_grad()
def test_in_16_bits_a_merge_is_rounded_once(state, update, network, tmp_path):
    network.place(torch.device("cpu"), torch.bfloat16)
    adapter = written(tmp_path / "a.safetensors", matrices(update, *LAYOUTS["original"]), network)
    weight = network.blocks[0].out.weight
    a, b = update["blocks.0.self_attn.o"]
    once = (weight.float() + 0.5 * (b @ a) + 0.25 * (b @ a)).bfloat16()
    LoraStack(network).merge([(adapter, 0.5), (adapter, 0.25)])
    assert torch.equal(network.blocks[0].out.weight, once)
    adapter.place(network, torch.device("cpu"))
    kinds = {name: change.up.dtype for name, change in adapter.by_name.items()}
    assert kinds["blocks.0.qkv"] == torch.bfloat16
    assert kinds["time.inner"] == torch.float32


def test_alpha_in_the_header_as_diffusers_writes_it(state, update, network, tmp_path):
    settings = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 8,
        "transformer.alpha_pattern": {"attn1.to_q": 2},
    }
    adapter = written(
        tmp_path / "a.safetensors",
        matrices(update, *LAYOUTS["diffusers"]),
        network,
        {"lora_adapter_metadata": json.dumps(settings)},
    )
    scaled = {
        name: (a, b * (0.25 if name.endswith("self_attn.q") else 1))
        for name, (a, b) in update.items()
    }
    close(merged(network, (adapter, 1.0)), changed_by_hand(state, scaled, 2.0))


def test_parity_with_the_conversion_of_diffusers(update, network, tmp_path):
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils", exc_type=ImportError)
    blocks = {name: pair for name, pair in update.items() if name.startswith("blocks.")}
    biases = {f"diffusion_model.{name}.diff_b": random(48) for name in LAYERS[:4]}
    cases = {
        "ComfyUI": (utils._convert_non_diffusers_wan_lora_to_diffusers, blocks, biases, 3.0),
        "original": (utils._convert_non_diffusers_wan_lora_to_diffusers, update, {}, None),
        "kohya": (utils._convert_musubi_wan_lora_to_diffusers, blocks, {}, 0.5),
    }
    for layout, (convert, chosen, further, alpha) in cases.items():
        tensors = matrices(chosen, *LAYOUTS[layout], alpha=alpha) | further
        ours = written(tmp_path / "ours.safetensors", tensors, network)
        converted = convert({name: value.clone() for name, value in tensors.items()})
        theirs = written(tmp_path / "theirs.safetensors", converted, network)
        close(merged(network, (ours, 1.0)), merged(network, (theirs, 1.0)))


def test_layers_of_image_to_video_are_left_out_with_a_notice(state, update, network, tmp_path):
    tensors = matrices(update, *LAYOUTS["ComfyUI"])
    extra = {
        "diffusion_model.blocks.0.cross_attn.k_img.lora_down.weight": random(RANK, 48),
        "diffusion_model.blocks.0.cross_attn.k_img.lora_up.weight": random(48, RANK),
        "diffusion_model.blocks.1.cross_attn.v_img.diff_b": random(48),
        "diffusion_model.blocks.1.cross_attn.norm_k_img.diff": random(48),
        "lora_unet_blocks_0_cross_attn_v_img.alpha": torch.tensor(1.0),
        "transformer.blocks.0.attn2.add_k_proj.lora_A.weight": random(RANK, 48),
        "diffusion_model.img_emb.proj.1.diff_b": random(48),
        "diffusion_model.patch_embedding.lora_down.weight": random(RANK, 36, 1, 2, 2),
        "diffusion_model.patch_embedding.lora_up.weight": random(48, RANK, 1, 1, 1),
    }
    adapter = written(tmp_path / "wan_HIGH_noise.safetensors", tensors | extra, network)
    close(merged(network, (adapter, 1.0)), changed_by_hand(state, update, 1.0))
    image, patch, expert = sorted(adapter.notices, key=lambda one: ("A14B" in one, "patch" in one))
    assert "7 tensors are left out (the image branch of Wan2.1 image to video" in image
    assert "2 tensors are left out (the patch embedding of image to video" in patch
    assert "one of the two networks of Wan2.2-A14B" in expert
    with pytest.raises(CheckpointError, match="changes nothing of this model"):
        written(tmp_path / "b.safetensors", extra, network)


def test_an_image_lora_is_refused_where_no_such_pair_exists(update, tmp_path):
    with torch.device("meta"):
        other = Wan(WanConfig(48, 48, width=48, heads=2, layers=2, ffn=80, text_width=24))
    tensors = {"blocks.0.cross_attn.norm_k_img.diff": random(48)}
    with pytest.raises(CheckpointError, match=r"has 1 of 1 tensors for which Wan has no place"):
        written(tmp_path / "a.safetensors", tensors, other)


def test_a_lora_of_another_model_is_refused_with_its_first_wrong_tensor(update, tmp_path):
    with torch.device("meta"):
        wider = Wan(WanConfig(16, 16, width=96, heads=2, layers=2, ffn=80, text_width=24))
        shorter = Wan(WanConfig(16, 16, width=48, heads=2, layers=1, ffn=80, text_width=24))
    tensors = matrices(update, *LAYOUTS["ComfyUI"])
    with pytest.raises(
        CheckpointError, match=r"embedding\.0\.lora_up\.weight.* must be \(96, 4\), got \(48, 4\)"
    ) as refused:
        written(tmp_path / "a.safetensors", tensors, wider)
    assert "trained on another model" in str(refused.value)
    message = r"has 20 of 52 tensors for which Wan has no place \(.blocks\.1\.cross_attn\.k\.lora_"
    with pytest.raises(CheckpointError, match=message):
        written(tmp_path / "a.safetensors", tensors, shorter)


Q = "blocks.0.self_attn.q"
GOOD = {f"{Q}.lora_A.weight": torch.zeros(2, 48), f"{Q}.lora_B.weight": torch.zeros(48, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.dora_scale": torch.ones(48, 1)}, "is DoRA"),
        ({f"{Q}.lora_magnitude_vector.weight": torch.ones(48)}, "is DoRA"),
        ({f"{Q}.hada_w1_a": torch.ones(48, 2)}, "is LoHa"),
        ({f"{Q}.lokr_w1": torch.ones(4, 4)}, "is LoKr"),
        ({f"{Q}.set_weight": torch.ones(48, 48)}, "set_weight"),
        ({f"{Q}.lora_B.weight": None}, "but no matrix 'up' beside it"),
        ({f"{Q}.lora_A.weight": None, f"{Q}.alpha": torch.ones(())}, "but no matrix 'down'"),
        ({f"{Q}.lora_A.weight": torch.zeros(0, 48)}, r"must be \(1, 48\), got \(0, 48\)"),
        ({f"{Q}.lora_A.weight": torch.zeros(())}, r"must be \(1, 48\), got \(\)"),
        ({f"{Q}.lora_B.weight": torch.zeros(48, 3)}, r"must be \(48, 2\), got \(48, 3\)"),
        ({f"{Q}.lora_B.weight": torch.full((48, 2), math.inf)}, "not finite"),
        ({f"{Q}.alpha": torch.tensor(math.nan)}, "not finite"),
        ({f"{Q}.alpha": torch.ones(2)}, r"must be \(1,\), got \(2,\)"),
        ({f"{Q}.lora_down.weight": torch.zeros(2, 48)}, "for one tensor"),
        ({f"transformer.{diffusers_layer(Q)}.lora_A.weight": torch.zeros(2, 48)}, "for one tensor"),
        ({f"{Q}.diff": torch.zeros(48, 47)}, r"must be \(48, 48\), got \(48, 47\)"),
        ({f"{Q}.diff_b": torch.zeros(49)}, r"must be \(48,\), got \(49,\)"),
        ({"blocks.0.diff_m": torch.zeros(6, 48)}, r"must be \(6, 48\), got \(6, 48\)"),
        ({"blocks.0.norm3.lora_A.weight": torch.zeros(2, 48)}, "which is no layer"),
        ({"blocks.9.self_attn.q.diff": torch.zeros(48, 48)}, "1 of 3 tensors"),
        ({"lora_unet_blocks_0_selfattn_q.alpha": torch.ones(())}, "1 of 3 tensors"),
        ({"transformer_2.blocks.0.attn1.to_q.lora_A.weight": torch.ones(1)}, "1 of 3 tensors"),
        ({f"{Q}.strange": torch.ones(1)}, "1 of 3 tensors"),
        ({f"{Q}.lora_A.weight": None, f"{Q}.lora_B.weight": None}, "changes nothing"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_sentence(change, message, network, tmp_path):
    tensors = {name: value for name, value in (GOOD | change).items() if value is not None}
    with pytest.raises(CheckpointError, match=message) as refused:
        written(tmp_path / "a.safetensors", tensors, network)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["[", "[1]", '{"lora_alpha": "x"}', '{"alpha_pattern": [1]}'])
def test_broken_settings_in_the_header_are_refused(text, network, tmp_path):
    with pytest.raises(CheckpointError, match="has invalid settings"):
        written(tmp_path / "a.safetensors", GOOD, network, {"lora_adapter_metadata": text})


def test_the_names_of_the_original_code_are_those_of_every_tensor():
    stored = {diffusers_layer(name) for name in original_layers(CONFIG.layers)}
    named = {
        name.rpartition(".")[0]
        for recipe in weight_recipes(CONFIG).values()
        for name in recipe.names
        if not name.endswith("table")
    }
    tables = {diffusers_name(name) for name in original_layers(2) if name.endswith("modulation")}
    assert named - stored == {"patch_embedding"}  # the same in both layouts
    assert tables == {
        name
        for recipe in weight_recipes(CONFIG).values()
        for name in recipe.names
        if name.endswith("table")
    }


def test_a_lora_changes_the_frames_of_its_video_only(tmp_path):
    wan_models.write_parts(tmp_path / "parts", "t2v-1.3b")
    model = wan_models.write_model(tmp_path / "tiny-wan", tmp_path / "parts", "t2v-1.3b")
    pipeline = skyloom.load(str(model), device="cpu")
    # frames below 64 pixels have no watermark, which depends on the request
    request = Request("a cat on the beach", size="32x32", seconds=0.3, seed=1, num_steps=2)
    width = pipeline.transformer.config.width
    torch.manual_seed(6)
    query = "diffusion_model.blocks.0.self_attn.q"
    image = "diffusion_model.blocks.0.cross_attn.norm_k_img.diff"
    tensors = {
        f"{query}.lora_down.weight": random(RANK, width),
        f"{query}.lora_up.weight": random(width, RANK),
        f"{query}.alpha": torch.tensor(2.0),
        "diffusion_model.head.diff_m": random(1, 2, width),
        image: random(width),
    }
    path = tmp_path / "felt.safetensors"
    save_file(tensors, path)
    plain = pipeline.generate(request).frames
    steps = list(pipeline.stream(request, loras=[path], collect=True))
    changed = steps[-1].video.frames
    assert not torch.equal(changed, plain)
    notices = " ".join(step.notice or "" for step in steps)
    assert "felt.safetensors: 1 tensors are left out (the image branch" in notices
    assert torch.equal(pipeline.generate(request, loras=[f"{path}:0"]).frames, plain)
    assert torch.equal(pipeline.generate(request, loras=[path]).frames, changed)
    assert torch.equal(pipeline.generate(request).frames, plain)
    halves = [Lora(str(path), 0.5), Lora(str(path), 1.0)]
    sizes = [lora_effects(pipeline, find_loras([one], None))[0][str(path)] for one in halves]
    assert 0.001 < sizes[0] < sizes[1]
    save_file({**tensors, f"{query}.lora_up.weight": random(width + 1, RANK)}, path)
    with pytest.raises(RequestError, match=r"q\.lora_up\.weight.* must be"):
        pipeline.stream(request, loras=[path])
