"""Decode with the autoencoder of Wan 2.1 at its real size, against diffusers, on a CPU.

python bench/wan_autoencoder.py [--frames 81] [--size 192x320] [--dtype fp32] [--repeats 3]

Prints JSON lines. Outputs are compared first. Time: both sides take turns, one latent frame at a
time, so that other load on the machine affects both alike; the first latent frame is not counted
in the ratio of a step. With few frames, the time of 81 follows from that of a step.
Memory: each side decodes in a process of its own, which reports the peak of its anonymous memory
(RssAnon in /proc) above that after the weights were loaded; once with glibc's defaults, which leave
holes, and once with large blocks mapped, as skyloom's server sets it.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from skyloom.models.checkpoint import load_into
from skyloom.models.wan.autoencoder import WAN_2_1, WanAutoencoder
from skyloom.models.wan.autoencoder_state_dict import own_name

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIDES = ("diffusers", "skyloom")
ALLOCATORS: dict[str, dict[str, str]] = {
    "glibc's defaults": {},
    "blocks of 1 MiB and more mapped": {"MALLOC_MMAP_THRESHOLD_": str(2**20)},
}
POLL = 0.005  # seconds between two readings of the memory


@torch.no_grad()
def build(dtype: torch.dtype) -> tuple[AutoencoderKLWan, WanAutoencoder]:
    """Build both autoencoders with the same random weights."""
    torch.manual_seed(0)
    theirs = AutoencoderKLWan().eval()
    for name, parameter in theirs.named_parameters():
        if parameter.ndim > 1 and "gamma" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
    ours = WanAutoencoder(WAN_2_1)
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    state = {own_name(name): value for name, value in theirs.state_dict().items()}
    load_into(ours, {name: value.reshape(shapes[name]) for name, value in state.items()})
    ours.place(torch.device("cpu"), dtype)
    return theirs.to(dtype), ours


def latent_of(frames: int, size: str) -> Tensor:
    """Make a random normalised latent."""
    height, width = map(int, size.split("x"))
    shape = WAN_2_1.scale.latent_frames(frames), height // 8, width // 8
    return torch.randn(1, WAN_2_1.channels, *shape, generator=torch.Generator().manual_seed(1))


def raw(latent: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo the normalisation, which diffusers' autoencoder leaves to its pipelines."""
    mean, std = (torch.tensor(one)[:, None, None, None] for one in (WAN_2_1.mean, WAN_2_1.std))
    return (latent * std + mean).to(dtype)


class TheirSteps:
    """The loop of `AutoencoderKLWan._decode`, one latent frame at a time."""

    def __init__(self, model: AutoencoderKLWan, latent: Tensor, dtype: torch.dtype) -> None:
        self.model = model
        self.latent = model.post_quant_conv(raw(latent, dtype))
        model.clear_cache()

    def __call__(self, index: int) -> Tensor:
        """Decode a latent frame."""
        self.model._conv_idx = [0]
        return self.model.decoder(
            self.latent[:, :, index : index + 1],
            feat_cache=self.model._feat_map,
            feat_idx=self.model._conv_idx,
            first_chunk=index == 0,
        ).clamp(-1, 1)


class OurSteps:
    """`decode_step`, one latent frame at a time."""

    def __init__(self, model: WanAutoencoder, latent: Tensor) -> None:
        self.model = model
        self.latent = latent
        self.cache = None

    def __call__(self, index: int) -> Tensor:
        """Decode a latent frame."""
        decoded, self.cache = self.model.decode_step(
            self.latent[:, :, index : index + 1], self.cache
        )
        return decoded


@torch.no_grad()
def compare_time(frames: int, size: str, dtype: torch.dtype) -> dict[str, object]:
    """Check parity, then decode on both sides in turns."""
    theirs, ours = build(dtype)
    exact = latent_of(5, "64x64")
    gap = (theirs.decode(raw(exact, dtype)).sample - ours.decode(exact)).abs()
    assert dtype != torch.float32 or gap.max() <= 1e-5, gap.max()
    latent = latent_of(frames, size)
    sides: dict[str, Callable[[int], Tensor]] = {
        "diffusers": TheirSteps(theirs, latent, dtype),
        "skyloom": OurSteps(ours, latent),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    for index in range(latent.shape[2]):
        for side, step in sides.items():
            started = time.perf_counter()
            step(index)
            times[side].append(time.perf_counter() - started)
    ratios = [a / b for a, b in zip(times["diffusers"][1:], times["skyloom"][1:], strict=True)]
    return {
        "max_difference": float(gap.max()),
        "seconds": {side: round(sum(values), 1) for side, values in times.items()},
        "seconds_of_a_step": {
            side: round(statistics.median(values[1:]), 2) for side, values in times.items()
        },
        "ratio_of_sums": round(sum(times["diffusers"]) / sum(times["skyloom"]), 2),
        "ratio_of_a_step": {
            "min": round(min(ratios), 2),
            "median": round(statistics.median(ratios), 2),
            "max": round(max(ratios), 2),
        },
    }


def anonymous_megabytes() -> float:
    """Return the anonymous resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


@torch.no_grad()
def measure_memory(side: str, frames: int, size: str, dtype: torch.dtype) -> float:
    """Return the peak of the anonymous memory above the weights while a whole video is decoded."""
    theirs, ours = build(dtype)
    latent = latent_of(frames, size)
    if side == "diffusers":
        del ours
        decode = lambda: theirs.decode(raw(latent, dtype)).sample  # noqa: E731
    else:
        del theirs
        decode = lambda: ours.decode(latent)  # noqa: E731
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # gives back what building the models left
    before = anonymous_megabytes()
    peak = before
    done = threading.Event()

    def poll() -> None:
        nonlocal peak
        while not done.wait(POLL):
            peak = max(peak, anonymous_megabytes())

    watcher = threading.Thread(target=poll)
    watcher.start()
    decode()
    done.set()
    watcher.join()
    return peak - before


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--size", default="192x320")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", choices=SIDES, help="measure one side only")
    parser.add_argument("--memory-frames", type=int, default=13)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype]
    if arguments.memory:
        print(measure_memory(arguments.memory, arguments.memory_frames, arguments.size, dtype))
        return
    result = {"frames": arguments.frames, "size": arguments.size, "dtype": arguments.dtype}
    result |= {"threads": arguments.threads, "torch": torch.__version__}
    result |= compare_time(arguments.frames, arguments.size, dtype)
    print(json.dumps(result), flush=True)
    command = [sys.executable, __file__, *sys.argv[1:], "--memory"]
    for allocator, environment in ALLOCATORS.items():
        megabytes = {
            side: float(
                subprocess.run(
                    [*command, side], check=True, capture_output=True, env=os.environ | environment
                ).stdout
            )
            for side in SIDES
        }
        result = {"memory_frames": arguments.memory_frames, "dtype": arguments.dtype}
        result |= {"allocator": allocator}
        result |= {"megabytes_above_weights": {side: round(megabytes[side]) for side in SIDES}}
        result |= {"ratio_of_memory": round(megabytes["skyloom"] / megabytes["diffusers"], 2)}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
