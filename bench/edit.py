"""Compare a retake of one second of a long video with generating one window and the whole video.

python bench/edit.py [--seconds 60] [--repeats 3] [--model FOLDER]

Every run is a new process. The long video is generated once and used by all retakes. Times exclude
loading the model and include opening the file and copying every kept frame. Prints one JSON line;
ratios are of medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RUN = """
import json, resource, sys, time
from pathlib import Path
import skyloom
from skyloom.generate.request import Request
from skyloom.media.write import open_video
request, target = Request.from_dict(json.loads(sys.argv[2])), Path(sys.argv[3])
pipeline = skyloom.load(sys.argv[1])
started, calls = time.perf_counter(), 0
with open_video(target, pipeline.info.fps) as writer:
    for step in pipeline.stream(request, collect=False):
        calls += step.phase == "denoise"
        if step.frames is not None:
            writer.append(step.frames)
print(json.dumps({
    "seconds": time.perf_counter() - started, "frames": writer.frames, "calls": calls,
    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""
NOTHING_KEPT = {**os.environ, "SKYLOOM_CACHE": "off"}
PROMPT = "a dog running to the right on the beach"


def run(model: str, request: dict[str, object], target: Path) -> dict[str, float]:
    """Generate one video in a new process without a cache."""
    words = [sys.executable, "-c", RUN, model, json.dumps(request), str(target)]
    return json.loads(
        subprocess.run(words, check=True, capture_output=True, text=True, env=NOTHING_KEPT).stdout
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="diorama")
    given = parser.parse_args()
    middle = int(given.seconds / 2)
    window: dict[str, object] = {"prompt": PROMPT, "seed": 1}
    with tempfile.TemporaryDirectory() as folder:
        long, other = Path(folder) / "long.mp4", Path(folder) / "other.mp4"
        edit = {
            "verb": "retake",
            "videos": [str(long)],
            "start": str(middle),
            "stop": str(middle + 1),
        }
        whole = run(given.model, {**window, "seconds": given.seconds}, long)
        retakes, windows = [], []
        for seed in range(given.repeats):
            retakes.append(
                run(
                    given.model, {"prompt": "a cat on the beach", "seed": seed, "edit": edit}, other
                )
            )
            windows.append(run(given.model, {**window, "seed": seed}, other))
    results = {
        "retake": {
            name: round(statistics.median(one[name] for one in retakes), 3) for name in whole
        },
        "window": {
            name: round(statistics.median(one[name] for one in windows), 3) for name in whole
        },
        "whole": {name: round(value, 3) for name, value in whole.items()},
    }
    took = {name: one["seconds"] for name, one in results.items()}
    ratios = {
        "time_of_a_window": round(took["retake"] / took["window"], 3),
        "time_of_the_whole": round(took["retake"] / took["whole"], 4),
        "network_calls_of_a_window": round(
            results["retake"]["calls"] / results["window"]["calls"], 3
        ),
        "memory_of_a_window": round(
            results["retake"]["peak_mib"] / results["window"]["peak_mib"], 3
        ),
    }
    print(json.dumps({"seconds": given.seconds, "runs": results, "ratios": ratios}))


if __name__ == "__main__":
    main()
