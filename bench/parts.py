"""Time of each part of video generation, on one thread as in the pipeline.

python bench/parts.py [--repeats 9] [--model FOLDER] [--operations]

Prints one JSON line of minimum and median milliseconds: encoding the prompt, the first window (9
latent frames), a later window (3, with 6 cached), extending the cache, decoding 3 latent frames.
With --operations, also the operations of a later window by their own time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import skyloom
from skyloom.generate.pipeline import Pipeline
from skyloom.models.attention import KvCache

PROMPT = "a dog running to the right on the beach"


@torch.no_grad()
def parts_of(pipeline: Pipeline) -> dict[str, Callable[[], object]]:
    """Return one call for every part."""
    dit, vae, rollout = pipeline.transformer, pipeline.autoencoder, pipeline.info.rollout
    assert rollout is not None
    dtype, channels = pipeline.dtype, dit.config.in_channels
    context = pipeline.text_encoder.encode([PROMPT])
    text = dit.prepare_text(context.context.to(dtype), None, context.pooled.to(dtype))
    whole, window = torch.randn(1, channels, 9, 8, 8), torch.randn(1, channels, 3, 8, 8)
    cache = KvCache(rollout.sink, rollout.recent)
    for _ in range(3):
        cache = dit.extend_cache(window.to(dtype), torch.zeros(1, 3), text, cache)
    high, low = torch.full((1, 9), 0.7), torch.full((1, 3), 0.7)
    span = {"span": torch.full((1, 9), 0.2)} if dit.config.span else {}
    late = {"span": torch.full((1, 3), 0.2)} if dit.config.span else {}
    decoded = vae.decode_step(window, None)[1]
    return {
        "read the prompt": lambda: pipeline.text_encoder.encode([PROMPT]),
        "prepare the prompt": lambda: dit.prepare_text(
            context.context.to(dtype), None, context.pooled.to(dtype)
        ),
        "first window, one step": lambda: dit(whole.to(dtype), high, text, **span),
        "later window, one step": lambda: dit(window.to(dtype), low, text, cache=cache, **late),
        "remember a window": lambda: dit.extend_cache(
            window.to(dtype), torch.zeros(1, 3), text, cache
        ),
        "decode 3 latent frames": lambda: vae.decode_step(window, decoded),
    }


@torch.no_grad()
def measure(parts: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Return minimum and median milliseconds; the parts take turns."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 2):
        for name, call in parts.items():
            started = time.perf_counter()
            call()
            if turn > 1:
                times[name].append(1000 * (time.perf_counter() - started))
    return {
        name: {"min": round(min(each), 2), "median": round(statistics.median(each), 2)}
        for name, each in times.items()
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--model", default="diorama")
    parser.add_argument("--operations", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    pipeline = skyloom.load(arguments.model)
    loading = time.perf_counter() - started
    parts = parts_of(pipeline)
    milliseconds = measure(parts, arguments.repeats)
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "load_seconds": round(loading, 2),
                "milliseconds": milliseconds,
            }
        )
    )
    if arguments.operations:
        with torch.profiler.profile() as profile, torch.no_grad():
            for _ in range(5):
                parts["later window, one step"]()
        print(
            profile.key_averages().table(
                sort_by="self_cpu_time_total", row_limit=18, max_name_column_width=32
            )
        )


if __name__ == "__main__":
    main()
