"""Write the table of docs/models.md that says what fits which GPU, computed by the memory planner.

`make docs` runs it, and tests/models/wan/test_memory_table.py compares. Nothing in it was measured
on a GPU: sizes of weights come from the configs, activations from networks on the device `meta`.
"""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import nn

from skyloom.models.base import NetworkCost
from skyloom.models.memory import (
    Demand,
    FreeMemory,
    MemoryPlan,
    MemoryPlanner,
    PartMemory,
    part_memory,
)
from skyloom.models.wan.autoencoder import (
    WAN_2_1,
    WAN_2_2,
    WanAutoencoder,
    WanAutoencoderConfig,
)
from skyloom.models.wan.config import VARIANTS, WanConfig
from skyloom.models.wan.cost import network_cost
from skyloom.models.wan.transformer import Wan

PAGE = Path(__file__).parent / "models.md"
START = "<!-- memory: written by docs/write_memory_table.py -->"
END = "<!-- end of memory -->"
CARDS = (6, 8, 12, 16, 24, 48, 80)  # GiB
USABLE = 0.94  # of a card: the rest is taken by the driver and, up to here, by a desktop
CONTEXT = 2**29  # bytes
HOST = 2**40
MODELS = {  # transformer, autoencoder, variant
    "wan2.1-1.3b": (WanConfig(16, 16, 1536, 12, 30, 8960, 4096), WAN_2_1, "t2v-1.3b"),
    "wan2.2-5b": (WanConfig(48, 48, 3072, 24, 30, 14336, 4096), WAN_2_2, "ti2v-5b"),
    "wan2.1-14b": (WanConfig(16, 16, 5120, 40, 40, 13824, 4096), WAN_2_1, "t2v-14b"),
}
SHORT = {
    "resident": "stays",
    "swapped": "swapped",
    "streamed": "streamed",
    "host": "on the CPU",
    "tiled": "tiles",
}


def text_shapes() -> dict[str, tuple[int, ...]]:
    """Shapes of the matrices of UMT5-XXL."""
    width, ffn = 4096, 10240
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (256384, width)}
    for layer in range(24):
        names = ("q", "k", "v", "o")
        shapes |= {f"enc.blk.{layer}.attn_{name}.weight": (width, width) for name in names}
        names = ("gate", "up", "down")
        shapes |= {f"enc.blk.{layer}.ffn_{name}.weight": (width, ffn) for name in names}
    return shapes


def sizes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's weights."""
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def weights(shapes: dict[str, tuple[int, ...]], *, fp8: bool, blocks: str) -> PartMemory:
    """Return the memory of weights in bf16; with `fp8`, matrices of the blocks are in 8 bits."""
    matrices = {name for name in shapes if blocks in name and name.endswith(".weight")}
    in_8_bits = {name for name in matrices if fp8 and len(shapes[name]) > 1}
    dtypes = {name: "F8_E4M3" if name in in_8_bits else "BF16" for name in shapes}
    return part_memory(shapes, dtypes)


def cost(config: WanConfig, autoencoder: WanAutoencoderConfig, *, fp8: bool) -> NetworkCost:
    """Compute the cost of a published model."""
    with torch.device("meta"):
        transformer = sizes(Wan(config))
        decoder = sizes(WanAutoencoder(autoencoder))
    in_bf16 = dict.fromkeys(decoder, "BF16")
    return network_cost(
        config,
        autoencoder,
        {
            "text_encoder": weights(text_shapes(), fp8=fp8, blocks="blk."),
            "transformer": weights(transformer, fp8=fp8, blocks="blocks."),
            "autoencoder": part_memory(decoder, in_bf16, in_fp32=("encoder.", "quant.")),
        },
    )


def demand(variant: str, model: NetworkCost) -> Demand:
    """Return what a video of the model's own size needs, with guidance."""
    record = VARIANTS[variant]
    width, height = record.sizes.default
    scale = model.scale
    latent_frames = scale.latent_frames(record.frames)
    cells = (width // scale.space) * (height // scale.space)
    return Demand(
        pixels=width * height,
        frames=record.frames,
        tokens=latent_frames * cells // 4,
        cached_tokens=0,
        branches=2,
        parallel=1,
        calls=2 * record.num_steps,
        windows=1,
        pictures=variant.startswith("ti2v"),
    )


def plans(name: str, *, fp8: bool) -> dict[int, MemoryPlan]:
    """Plan a video of a model's own size on every card."""
    config, autoencoder, variant = MODELS[name]
    model = cost(config, autoencoder, fp8=fp8)
    assert model.memory is not None
    needed = demand(variant, model)
    usable = {card: round(USABLE * card * 2**30) - CONTEXT for card in CARDS}
    return {
        card: MemoryPlanner(model.memory, needed, FreeMemory(HOST, free)).choose()
        for card, free in usable.items()
    }


def rows() -> Iterator[str]:
    """Yield the rows of the table; cards with the same plan share one."""
    for name in MODELS:
        width, height = VARIANTS[MODELS[name][2]].sizes.default
        frames = VARIANTS[MODELS[name][2]].frames
        for fp8 in (False, True):
            label = f"{name} {'fp8' if fp8 else 'bf16'}, {width}x{height}, {frames} frames"
            made = plans(name, fp8=fp8)
            for lacking, group in groupby(made, key=lambda card: _placing(made[card])):
                cards = list(group)
                plan = made[cards[0]]
                peaks = f"{plan.device_peak / 2**30:.1f} | {plan.host_peak / 2**30:.1f}"
                listed = ", ".join(map(str, cards))
                yield f"| {label} | {listed} | {' | '.join(lacking)} | {peaks} |"


def _placing(plan: MemoryPlan) -> tuple[str, ...]:
    if not plan.fits:
        return ("does not fit", "", "")
    return tuple(SHORT[rung] for rung in plan.rungs.values())


def table() -> str:
    """Write the table with its marks."""
    head = (
        "| model | GPU of GB | text encoder | transformer | autoencoder | GPU peak, GiB | "
        "host, GiB |"
    )
    lines = [START, head, "|---|---|---|---|---|---|---|", *rows(), END]
    return "\n".join(lines)


def main() -> None:
    """Replace the table in the page."""
    text = PAGE.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    PAGE.write_text(before + table() + after)


if __name__ == "__main__":
    main()
