"""Measure a server under attack: latency of a concurrent client, memory, and shutdown time.

python bench/attacks.py [--data FOLDER]

Starts a server with a fake renderer and the default limits, runs the attacks of
tests/attacks/attack_cases.py while another client sends requests, then sends SIGTERM while clients
hold connections open. Prints one JSON line: requests, failures and latency of the other client
(p50, p95, worst; in seconds), in total and per attack; peak and final resident memory of the API
process (MiB); seconds from SIGTERM to exit.
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
    """Read a row of /proc/PID/status, in MiB."""
    rows = Path(f"/proc/{process}/status").read_text().splitlines()
    return round(next(int(row.split()[1]) for row in rows if row.startswith(name)) / 1024, 1)


def percentile(values: list[float], part: float) -> float:
    """Return a quantile; `part` is in [0, 1]."""
    return (
        round(sorted(values)[min(len(values) - 1, int(part * len(values)))], 3) if values else 0.0
    )


def attacks(attacker: cases.Client) -> dict[str, Callable[[], Any]]:
    """Return the attacks by name; each call counts response codes or ends of connections."""

    def count(answers: list[cases.Answer]) -> dict[str, int]:
        return dict(Counter(f"{answer.status} {answer.code or ''}".strip() for answer in answers))

    def forms() -> dict[str, int]:
        with ThreadPoolExecutor(3) as pool:
            return count(list(pool.map(lambda _: cases.fields(attacker), range(3))))

    def ends(lines: list[Any]) -> dict[str, int]:
        statuses = [cases.end_of(line)[9:12].decode() or "closed" for line in lines]
        cases.close(lines)
        return dict(Counter(statuses))

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
    """Start a server, run every attack, stop it; return the measurements."""
    server = attack_server.start(data, max_queued=UNLIMITED, max_queued_per_owner=UNLIMITED)
    pid = server.process.pid
    attacker, other = (
        cases.Client(server.url, attack_server.make_key(data, owner))
        for owner in ("mallory", "alice")
    )
    results: dict[str, Any] = {"idle_mib": memory_mib(pid, "VmRSS"), "load": os.getloadavg()[0]}
    seconds: list[float] = []
    failed: Counter[str] = Counter()
    ways: dict[str, Callable[[], Any]] = {"quiet": lambda: time.sleep(5), **attacks(attacker)}
    results["attacks"] = {}
    for name, attack in ways.items():
        with cases.Beside(other) as beside:
            begun = time.monotonic()
            outcome = attack()
            took = round(time.monotonic() - begun, 2)
        if name != "quiet":
            seconds += beside.seconds
            failed.update(f"{path} {status} {code}" for path, status, code in beside.failed)
        results["attacks"][name] = {
            "came_to": outcome,
            "seconds": took,
            "other_p95": percentile(beside.seconds, 0.95),
            "other_worst": round(max(beside.seconds), 3),
        }
    results["other"] = {
        "calls": len(seconds),
        "failed": dict(failed),
        "p50": percentile(seconds, 0.5),
        "p95": percentile(seconds, 0.95),
        "worst": round(max(seconds), 3),
    }
    results["peak_mib"] = memory_mib(pid, "VmHWM")
    results["after_mib"] = memory_mib(pid, "VmRSS")
    file = cases.keep_file(attacker, 64 * MIB)
    video = attacker.ask("POST", "/v1/videos", cases.JSON, b'{"prompt": "a cat"}').body["id"]
    lines = cases.hold_open(attacker, file, video)
    results["sigterm_seconds"] = round(server.stop(), 2)
    results["exit_code"] = server.process.returncode
    cases.close(lines)
    return results


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder of the server (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments.data or Path(folder))))


if __name__ == "__main__":
    main()
