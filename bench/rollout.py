"""Compare long videos with short ones and with diffusers: memory, time, time to first frames.

python bench/rollout.py [--lengths 5 60] [--repeats 3] [--model FOLDER]
    [--theirs "wan 2.2 autoencoder" ...]

Every run is a new process that loads the model, streams a video into a file and measures its peak
memory. Lengths take turns. With --theirs, diffusers' WanPipeline also generates the longest video
into memory in every turn, in four steps without guidance (set up as in bench/pipeline.py).
"wan 2.2 autoencoder" has as many tokens as skyloom, "wan 2.1 autoencoder" four times as many, all
in one attention; it may exceed the memory or time limit. A failed side reports the reason and has
no ratio. Prints one JSON line of medians with ratios of the longest to the shortest length, and of
diffusers to skyloom.
"""

import argparse
import json
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

Measurement = dict[str, float]


def make_ours(model: str, seconds: float) -> Measurement:
    """Generate one video with skyloom in this process."""
    started = time.perf_counter()
    import skyloom
    from skyloom.media.write import open_video

    pipeline = skyloom.load(model)
    loaded = time.perf_counter()
    first = None
    with (
        tempfile.TemporaryDirectory() as folder,
        open_video(Path(folder) / "a.mp4", pipeline.info.fps) as writer,
    ):
        prompt = "a dog running to the right on the beach"
        for step in pipeline.stream(prompt, seconds=seconds, seed=1, collect=False):
            if step.frames is not None:
                first = first or time.perf_counter() - loaded
                writer.append(step.frames)
    done = time.perf_counter()
    assert first is not None
    return _measurement(started, loaded, done, first, writer.frames)


def make_theirs(autoencoder: str, model: str, seconds: float) -> Measurement:
    """Generate one video of the same length with diffusers in this process."""
    started = time.perf_counter()
    import pipeline as short
    import torch

    import skyloom
    from skyloom.generate.request import Request

    torch.set_num_threads(2)
    ours = skyloom.load(model)
    frames = ours.plan(Request("a", seconds=seconds)).shape.frames
    theirs = short.build(short.AUTOENCODERS[autoencoder], ours)
    del ours
    loaded = time.perf_counter()
    first = short.make_theirs(theirs, frames)["first_frames"]
    return _measurement(started, loaded, time.perf_counter(), first, frames)


def _measurement(
    started: float, loaded: float, done: float, first: float, frames: int
) -> Measurement:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = {"load": loaded - started, "first_frames": first, "after_load": done - loaded}
    return {**times, "frames": frames, "peak_mib": peak}


def run(side: str, model: str, seconds: float, limit: float) -> Measurement | str:
    """Generate one video in a new process; return the measurement, or the reason of a failure."""
    words = [sys.executable, __file__, "--one", side, "--model", model, "--lengths", str(seconds)]
    try:
        ran = subprocess.run(words, check=False, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"not done after {limit:g} s"
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no error message"])[-1]
        why = "killed, probably out of memory" if ran.returncode == -signal.SIGKILL else last
        return f"failed: {why:.200}"
    return json.loads(ran.stdout)


def middle(runs: list[Measurement | str]) -> Measurement | str:
    """Compute the median of each number, or return the first failure."""
    failed = [one for one in runs if isinstance(one, str)]
    if failed:
        return failed[0]
    done = [one for one in runs if not isinstance(one, str)]
    return {name: round(statistics.median(one[name] for one in done), 3) for name in done[0]}


def compare(
    results: dict[str, Measurement | str], lengths: list[float], theirs: list[str]
) -> dict[str, float]:
    """Compute ratios of the longest to the shortest length, and of diffusers to skyloom."""
    short, long = (results[f"{length:g} s"] for length in (min(lengths), max(lengths)))
    if isinstance(short, str) or isinstance(long, str):
        return {}
    ratios = {
        "peak_memory": long["peak_mib"] / short["peak_mib"],
        "time_per_frame": (long["after_load"] / long["frames"])
        / (short["after_load"] / short["frames"]),
        "first_frames": long["first_frames"] / short["first_frames"],
    }
    for name in theirs:
        other = results[name]
        if not isinstance(other, str):
            ratios |= {
                f"{name}, {kind}": other[kind] / long[kind] for kind in ("after_load", "peak_mib")
            }
    return {name: round(value, 3) for name, value in ratios.items()}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=float, nargs="+", default=[5, 60])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="diorama")
    parser.add_argument("--theirs", nargs="*", default=[], metavar="AUTOENCODER")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that one run may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        length = given.lengths[0]
        print(
            json.dumps(
                make_theirs(given.one, given.model, length)
                if given.one
                else make_ours(given.model, length)
            )
        )
        return
    sides = {f"{length:g} s": ("", length) for length in given.lengths}
    sides |= {name: (name, max(given.lengths)) for name in given.theirs}
    runs: dict[str, list[Measurement | str]] = {name: [] for name in sides}
    for _ in range(given.repeats):
        for name, (side, length) in sides.items():
            runs[name].append(run(side, given.model, length, given.limit))
    results = {name: middle(each) for name, each in runs.items()}
    print(json.dumps({"runs": results, "ratios": compare(results, given.lengths, given.theirs)}))


if __name__ == "__main__":
    main()
