"""Training step of the former transformer and of the U-Net: rate, and time by kind of operation.

python projects/diorama/bench/training_step.py [--threads 2] [--repeats 6]

Forward and backward of the flow loss on random latents, without and with the optimizer. Prints one
JSON line. FLOPs are counted by torch (a multiply-add is two).
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from skyloom.models.diorama.config import UNetConfig
from skyloom.models.diorama.transformer import UNet
from skyloom.models.diorama.v1.transformer import Dit, DitConfig
from skyloom.train.ema import Ema
from skyloom.train.master import MasterWeights
from skyloom.train.optim import OptimizerConfig, build_optimizer

KINDS = {
    "convolutions": ("conv",),
    "products": ("mm", "linear", "matmul", "einsum"),
    "softmax and norms": ("softmax", "norm"),
    "copies and casts": ("copy", "cat", "contiguous", "clone", "index", "shuffle", "pad"),
    "optimizer": ("fused_adam", "foreach", "lerp"),
}
FORMER = DitConfig(
    in_channels=48,
    out_channels=48,
    width=256,
    heads=4,
    layers=8,
    ffn=1024,
    text_width=768,
    pooled_width=1024,
    pooled_text=True,
    places=True,
    detail=96,
    detail_blocks=4,
    prediction="angular",
)


def step_of(
    name: str, batch: int, frames: int
) -> tuple[nn.Module, Callable[[], None], Callable[[], None]]:
    """Return a network, its forward and backward pass, and a whole training step."""
    torch.manual_seed(0)
    if name == "former":
        network, side, dtype = Dit(FORMER), 8, torch.float32
    else:
        widths = {"S32": (32, (128, 192)), "W48": (48, (128, 256))}[name]
        network, side, dtype = (
            UNet(UNetConfig(channels=widths[0], widths=widths[1])),
            16,
            torch.bfloat16,
        )
    weights = MasterWeights(network, dtype)
    channels = 48 if name == "former" else network.config.channels
    latent = torch.randn(batch, channels, frames, side, side)
    sigma, mask = torch.rand(batch, frames), torch.ones(batch, 24, dtype=torch.bool)
    context, pooled = torch.randn(batch, 24, 768), torch.randn(batch, 1024)
    optimizer = build_optimizer(weights.master, OptimizerConfig())
    ema = Ema(weights.master, 0.99)
    count = 0

    def gradients() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            made = network(latent, sigma, network.prepare_text(context, mask, pooled))
        made.float().square().mean().backward()

    def whole() -> None:
        nonlocal count
        gradients()
        weights.clip_gradients(1.0)
        optimizer.step()
        weights.publish()
        count += 1
        if name == "former" or count % 4 == 0:
            ema.update(weights.master, count)
        network.zero_grad(set_to_none=True)

    return network, gradients, whole


def best(call: Callable[[], None], repeats: int) -> float:
    """Return the minimum wall time of several calls, in seconds."""
    call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return min(times)


def shares(call: Callable[[], None]) -> dict[str, float]:
    """Compute fractions of the operators' self time by kind."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    total = 0.0
    kinds = dict.fromkeys([*KINDS, "element-wise and the rest"], 0.0)
    for event in found.key_averages():
        own = event.self_cpu_time_total
        total += own
        kind = next(
            (k for k, parts in KINDS.items() if any(part in event.key.lower() for part in parts)),
            None,
        )
        kinds[kind or "element-wise and the rest"] += own
    return {name: round(value / total, 3) for name, value in kinds.items()}


def processor() -> str:
    """Return the processor's name and its bf16 instructions."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next(
        (line.split(":")[1].strip() for line in text.splitlines() if "model name" in line),
        platform.machine(),
    )
    kinds = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
    bf16 = next((name for flag, name in kinds.items() if flag in text), "no bf16")
    return f"{model} ({bf16})"


def main() -> None:
    """Measure every network on stills and clips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=6)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name, stills, clips in (("former", 64, 16), ("S32", 32, 8), ("W48", 32, 8)):
        for kind, batch, frames in (("stills", stills, 1), ("clips", clips, 9)):
            network, gradients, whole = step_of(name, batch, frames)
            with FlopCounterMode(display=False) as counter:
                gradients()
            flops = counter.get_total_flops()
            bare = best(gradients, arguments.repeats)
            full = best(whole, arguments.repeats)
            row = {
                "network": name,
                "kind": kind,
                "batch": batch,
                "GFLOP a sample": round(flops / batch / 1e9, 2),
                "GFLOP/s": round(flops / bare / 1e9),
                "with optimizer": round(flops / full / 1e9),
                "samples/s": round(batch / full, 1),
                "shares": shares(whole),
            }
            rows.append(row)
            del network
    print(
        json.dumps(
            {
                "processor": processor(),
                "threads": arguments.threads,
                "torch": torch.__version__,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
