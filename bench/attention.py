"""Attention on a CPU: torch's fused kernel against skyloom's, alternating in one process."""

import json
import statistics
import time

import torch
import torch.nn.functional as F

from skyloom.models.attention import attend

ROUNDS = 7


def main() -> None:
    """Print a line of JSON per number of tokens and precision."""
    torch.manual_seed(0)
    for tokens in (576, 1560, 6240):
        for dtype in (torch.float32, torch.bfloat16):
            query, key, value = (torch.randn(1, 6, tokens, 128, dtype=dtype) for _ in range(3))
            calls = {"fused": F.scaled_dot_product_attention, "skyloom": attend}
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(ROUNDS):
                for name, call in calls.items():
                    start = time.perf_counter()
                    call(query, key, value)
                    seconds[name].append(time.perf_counter() - start)
            median = {name: statistics.median(times) for name, times in seconds.items()}
            row = {
                "tokens": tokens,
                "dtype": str(dtype).removeprefix("torch."),
                "ratio": round(median["fused"] / median["skyloom"], 2),
                **{name: round(value, 4) for name, value in median.items()},
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
