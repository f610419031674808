"""Forward pass of the transformer against diffusers' WanTransformer3DModel on a CPU in bf16.

python bench/dit_forward.py [--repeats 9]

Prints one JSON line per shape. Parity is asserted first (fp32, 1e-4). The two sides take turns, so
that other load on the machine affects both alike; a ratio above 1 means that skyloom is faster.
Text keys and values are prepared once in skyloom and in every forward pass of diffusers, as in both
pipelines.
"""

import argparse
import json
import statistics
import time

import torch
from diffusers import WanTransformer3DModel

from skyloom.models.checkpoint import load_into
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.state_dict import wan_from_diffusers
from skyloom.models.wan.transformer import Wan

SHAPES = {
    "bundled model, 33 frames at 128x128 (144 tokens)": (256, 4, 8, 1024, (9, 8, 8)),
    "384x12, 33 frames at 128x128 of 4x8x8 latents (576 tokens)": (384, 6, 12, 1536, (9, 16, 16)),
    "384x12, 81 frames at 128x128 of 4x8x8 latents (1344 tokens)": (384, 6, 12, 1536, (21, 16, 16)),
}
CHANNELS, TEXT_WIDTH, TEXT_TOKENS = 16, 384, 32


def build(width: int, heads: int, layers: int, ffn: int) -> tuple[WanTransformer3DModel, Wan]:
    """Build both transformers with the same random weights."""
    torch.manual_seed(0)
    theirs = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=256,
        ffn_dim=ffn,
        num_layers=layers,
    ).eval()
    config = WanConfig(CHANNELS, CHANNELS, width, heads, layers, ffn, TEXT_WIDTH)
    ours = Wan(config).eval()
    load_into(ours, wan_from_diffusers(theirs.state_dict(), config))
    return theirs, ours


@torch.no_grad()
def compare(name: str, repeats: int) -> dict[str, object]:
    """Check parity, then time both sides in turns."""
    width, heads, layers, ffn, size = SHAPES[name]
    theirs, ours = build(width, heads, layers, ffn)
    latent, context = torch.randn(1, CHANNELS, *size), torch.randn(1, TEXT_TOKENS, TEXT_WIDTH)
    sigma = torch.full((1, size[0]), 0.7)
    timestep = torch.tensor([700.0])
    gap = theirs(latent, timestep, context, return_dict=False)[0] - ours(
        latent, sigma, ours.prepare_text(context)
    )
    assert gap.abs().max() <= 1e-4, gap.abs().max()
    theirs, ours = theirs.bfloat16(), ours.bfloat16()
    latent, context = latent.bfloat16(), context.bfloat16()
    text = ours.prepare_text(context)
    sides = {
        "diffusers": lambda: theirs(latent, timestep, context, return_dict=False),
        "skyloom": lambda: ours(latent, sigma, text),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(repeats + 2):
        for side, call in sides.items():
            started = time.perf_counter()
            call()
            if turn > 1:
                times[side].append(time.perf_counter() - started)
    best = {side: min(values) for side, values in times.items()}
    middle = {side: statistics.median(values) for side, values in times.items()}
    return {
        "shape": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "max_abs_difference_fp32": float(gap.abs().max()),
        "milliseconds_min": {side: round(1000 * value, 1) for side, value in best.items()},
        "milliseconds_median": {side: round(1000 * value, 1) for side, value in middle.items()},
        "ratio_of_minima": round(best["diffusers"] / best["skyloom"], 2),
        "ratio_of_medians": round(middle["diffusers"] / middle["skyloom"], 2),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in SHAPES:
        print(json.dumps(compare(name, arguments.repeats)))


if __name__ == "__main__":
    main()
