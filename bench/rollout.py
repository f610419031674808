"""Long videos against short ones: memory, time for each second of video, time to the first frames; fresh processes.

python bench/rollout.py [--lengths 5 60] [--repeats 3] [--model FOLDER]

Every run loads the model, makes a video into a file while frames come, and tells its peak memory. Lengths take
turns. Prints one JSON line; ratios are of the longest to the shortest, from the middle of the runs.
"""

import argparse
import json
import statistics
import subprocess
import sys

RUN = """
import json, resource, sys, tempfile, time
from pathlib import Path
started = time.perf_counter()
import skyloom
from skyloom.media.write import open_video
pipeline = skyloom.load(sys.argv[1])
loaded = time.perf_counter()
first = None
with tempfile.TemporaryDirectory() as folder, open_video(Path(folder) / "a.mp4", pipeline.info.fps) as writer:
    prompt = "a dog running to the right on the beach"
    for step in pipeline.stream(prompt, seconds=float(sys.argv[2]), seed=1, collect=False):
        if step.frames is not None:
            first = first or time.perf_counter() - loaded
            writer.append(step.frames)
done = time.perf_counter()
print(json.dumps({
    "load": loaded - started, "first_frames": first, "after_load": done - loaded, "frames": writer.frames,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


def run(model: str, seconds: float) -> dict[str, float]:
    """One video in a process of its own."""
    words = [sys.executable, "-c", RUN, model, str(seconds)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=float, nargs="+", default=[5, 60])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="diorama")
    given = parser.parse_args()
    runs: dict[float, list[dict[str, float]]] = {length: [] for length in given.lengths}
    for _ in range(given.repeats):
        for length in given.lengths:
            runs[length].append(run(given.model, length))
    told = {
        f"{length:g} s": {name: round(statistics.median(one[name] for one in each), 3) for name in each[0]}
        for length, each in runs.items()
    }
    short, long = (told[f"{length:g} s"] for length in (min(given.lengths), max(given.lengths)))
    ratios = {
        "peak_memory": round(long["peak_mib"] / short["peak_mib"], 3),
        "time_per_frame": round(long["after_load"] / long["frames"] / (short["after_load"] / short["frames"]), 3),
        "first_frames": round(long["first_frames"] / short["first_frames"], 3),
    }
    print(json.dumps({"runs": told, "ratios": ratios}))


if __name__ == "__main__":
    main()
