"""Attacks on a real server (tests/attacks), and what the client beside them notices.

`python bench/attacks.py [--data FOLDER]` starts a server with a fake renderer and the usual limits, attacks it in every
way of tests/attacks/attack_cases.py while another client asks without pause, sends SIGTERM while clients hold
connections open, and prints one JSON line: the other client's calls, failures and latency (p50, p95, worst, in
seconds), for each attack too; the peak of resident memory of the API process and what it holds afterwards (MiB); and
the seconds from SIGTERM to the end.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "attacks"))

import attack_cases as cases
import attack_server

MIB = 2**20
UNLIMITED = 1_000_000  # jobs in the queue


def memory_mib(process: int, name: str) -> float:
    """A row of /proc/PID/status, in MiB."""
    rows = Path(f"/proc/{process}/status").read_text().splitlines()
    return round(next(int(row.split()[1]) for row in rows if row.startswith(name)) / 1024, 1)


def percentile(values: list[float], part: float) -> float:
    """The value that `part` of the values do not exceed."""
    return (
        round(sorted(values)[min(len(values) - 1, int(part * len(values)))], 3) if values else 0.0
    )


def attacks(attacker: cases.Client) -> dict[str, Callable[[], Any]]:
    """What each comes to: how its requests were answered, or how its connections ended."""

    def count(answers: list[cases.Answer]) -> dict[str, int]:
        return dict(Counter(f"{answer.status} {answer.code or ''}".strip() for answer in answers))

    def forms() -> dict[str, int]:
        with ThreadPoolExecutor(3) as pool:
            return count(list(pool.map(lambda _: cases.fields(attacker), range(3))))

    def ends(lines: list[Any]) -> dict[str, int]:
        told = [cases.end_of(line)[9:12].decode() or "closed" for line in lines]
        cases.close(lines)
        return dict(Counter(told))

    def drip() -> dict[str, int]:
        with cases.dripping(attacker) as lines:
            return ends(lines)

    return {
        "plans": lambda: count(cases.plans(attacker)),
        "escapes": lambda: count([cases.escapes(attacker)]),
        "utf16": lambda: count([cases.utf16(attacker)]),
        "fields": lambda: count([cases.fields(attacker)]),
        "fields_three_times": forms,
        "half_open": lambda: ends(cases.half_open(attacker)),
        "dripping": drip,
    }


def measure(data: Path) -> dict[str, Any]:
    """Start, attack, end."""
    server = attack_server.start(data, max_queued=UNLIMITED, max_queued_per_owner=UNLIMITED)
    pid = server.process.pid
    attacker, other = (
        cases.Client(server.url, attack_server.make_key(data, owner))
        for owner in ("mallory", "alice")
    )
    told: dict[str, Any] = {"idle_mib": memory_mib(pid, "VmRSS"), "load": os.getloadavg()[0]}
    seconds: list[float] = []
    failed: Counter[str] = Counter()
    ways: dict[str, Callable[[], Any]] = {"quiet": lambda: time.sleep(5), **attacks(attacker)}
    told["attacks"] = {}
    for name, attack in ways.items():
        with cases.Beside(other) as beside:
            begun = time.monotonic()
            came_to = attack()
            took = round(time.monotonic() - begun, 2)
        if name != "quiet":
            seconds += beside.seconds
            failed.update(f"{path} {status} {code}" for path, status, code in beside.failed)
        p95, worst = percentile(beside.seconds, 0.95), round(max(beside.seconds), 3)
        told["attacks"][name] = {
            "came_to": came_to,
            "seconds": took,
            "other_p95": p95,
            "other_worst": worst,
        }
    told["other"] = {"calls": len(seconds), "failed": dict(failed), "p50": percentile(seconds, 0.5)}
    told["other"] |= {"p95": percentile(seconds, 0.95), "worst": round(max(seconds), 3)}
    told |= {"peak_mib": memory_mib(pid, "VmHWM"), "after_mib": memory_mib(pid, "VmRSS")}
    file = cases.keep_file(attacker, 64 * MIB)
    video = attacker.ask("POST", "/v1/videos", cases.JSON, b'{"prompt": "a cat"}').body["id"]
    lines = cases.hold_open(attacker, file, video)
    told["sigterm_seconds"], told["exit_code"] = round(server.stop(), 2), server.process.returncode
    cases.close(lines)
    return told


def main() -> None:
    """Print the line."""
    options = argparse.ArgumentParser()
    options.add_argument(
        "--data", type=Path, help="folder of the server (default: a temporary one)"
    )
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(asked.data or Path(folder))))


if __name__ == "__main__":
    main()
