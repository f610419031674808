"""Time and peak memory of `skyloom.load()`, of this source tree and of another, in turns.

git worktree add --detach FOLDER COMMIT && python bench/load.py --other FOLDER/src [--repeats 5]
Every run is a process; its imports are not timed. Prints one JSON line per source tree.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parents[1] / "src"
RUN = """
import resource, time
import torch, skyloom, skyloom.generate.pipeline
start = time.perf_counter()
skyloom.load()
seconds = time.perf_counter() - start
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def measure(source: Path) -> tuple[float, float]:
    """Return the seconds and the peak in MiB of one load."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    command = [sys.executable, "-c", RUN]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    seconds, mebibytes = map(float, done.stdout.split())
    return seconds, mebibytes


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--other", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    sources = {"here": HERE, "other": arguments.other}
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for _ in range(arguments.repeats):
        for name, source in sources.items():
            runs[name].append(measure(source))
    for name, found in runs.items():
        seconds = sorted(round(one[0], 3) for one in found)
        peak = round(statistics.median(one[1] for one in found))
        print(json.dumps({"source": name, "seconds": seconds, "peak_mib": peak}))


if __name__ == "__main__":
    main()
