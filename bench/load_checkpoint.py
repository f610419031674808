"""Host memory and time to load a checkpoint of the size of Wan2.1-T2V-1.3B into bf16.

python bench/load_checkpoint.py [--stored bf16 fp32 fp8] [--read mmap copy] [--folder TEMPORARY]

Writes a fake checkpoint (2.8 GB in bf16) and prints one JSON line for each way of storing and
reading: sizes, the peak of anonymous memory beyond the target tensors, and seconds. Each load runs
in a process of its own that samples its memory every 2 ms. Needs Linux.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from skyloom.models.checkpoint import build
from skyloom.models.file_bytes import ReadMode
from skyloom.models.wan.config import WanConfig
from skyloom.models.wan.transformer import Wan
from skyloom.models.weight_files import open_weights

CONFIG = WanConfig(
    in_channels=16, out_channels=16, width=1536, heads=12, layers=30, ffn=8960, text_width=4096
)
STORED = {
    "bf16": ("BF16", torch.bfloat16),
    "fp32": ("F32", torch.float32),
    "fp8": ("F8_E4M3", torch.float8_e4m3fn),
}
SAMPLE_SECONDS = 0.002


def write_fake(path: Path, stored: str) -> None:
    """Write random weights of the network, one tensor at a time."""
    name, dtype = STORED[stored]
    with torch.device("meta"):
        state = Wan(CONFIG).state_dict()
    table = {}
    position = 0
    for key, value in state.items():
        size = value.numel() * dtype.itemsize
        table[key] = {
            "dtype": name,
            "shape": list(value.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    free = shutil.disk_usage(path.parent).free
    if free < 2 * position:
        raise SystemExit(f"{path.parent} needs {2 * position} free bytes, has {free}.")
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for value in state.values():
            values = torch.randn(value.shape, generator=generator).to(dtype)
            file.write(values.flatten().view(torch.uint8).numpy().tobytes())


def anonymous_bytes() -> int:
    """Return this process's resident memory that is no page of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kinds = ("RssAnon", "RssShmem")
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kinds))


def load(path: Path, read: ReadMode) -> dict[str, float]:
    """Load the checkpoint and measure."""
    peak = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_SECONDS):
            peak = max(peak, anonymous_bytes())

    torch.nn.Linear(8, 8)(torch.zeros(1, 8))
    before = anonymous_bytes()
    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    with open_weights(path, read=read) as files:
        network = build(lambda: Wan(CONFIG), files, torch.device("cpu"), torch.bfloat16)
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    peak = max(peak, anonymous_bytes())
    size = path.stat().st_size
    target = sum(value.nbytes for value in network.state_dict().values())
    beyond = peak - before - target
    return {
        "file_gb": round(size / 1e9, 3),
        "target_gb": round(target / 1e9, 3),
        "peak_gb": round((peak - before) / 1e9, 3),
        "beyond_target_mb": round(beyond / 1e6, 1),
        "share_of_file": round(beyond / size, 4),
        "seconds": round(seconds, 2),
    }


def main() -> None:
    """Write the files, and load each in every way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stored", nargs="+", choices=list(STORED), default=["bf16"])
    parser.add_argument("--read", nargs="+", choices=["mmap", "copy"], default=["mmap", "copy"])
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load is not None:
        print(json.dumps(load(options.load, options.read[0])))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for stored in options.stored:
            path = Path(folder) / "fake.safetensors"
            write_fake(path, stored)
            for read in options.read:
                command = [sys.executable, __file__, "--load", str(path), "--read", read]
                result = subprocess.run(command, capture_output=True, text=True, check=True)
                row = {"stored": stored, "read": read, **json.loads(result.stdout)}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
