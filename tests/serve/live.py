"""Real processes for the long tests, and what the kernel says of them.

`serving` starts a real server, with its supervisor and its workers as children. Those render with
the model, or with the fake renderer of swarm.py, whose steps have a known length; then this file is
the program of both:

    python tests/serve/live.py serve DATA --steps 20 --seconds 0.05 [--workers 2]
    python tests/serve/live.py work ...            # what that server starts
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import swarm

from skyloom.core.log import set_up_logging
from skyloom.serve import main as listen
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings, load_settings
from skyloom.serve.storage import FolderStorage
from skyloom.serve.workers import processes as supervise
from skyloom.serve.workers.worker import Worker

PROGRAM = "from skyloom.cli.app import main; main()"
ME = str(Path(__file__).absolute())
TORCH = "torchinductor_"  # how the empty folder begins that torch makes when it is imported
WARM = 0.2  # the part of a run after which memory should no longer grow
GROWTH = 5.0  # percent that it may grow nevertheless


@dataclass(frozen=True)
class Fake:
    """Workers that render nothing: how many, and how many steps of how many seconds a video has."""

    workers: int = 1
    steps: int = 20
    seconds: float = 0.05


@dataclass(frozen=True)
class Server:
    """A server that is ready."""

    process: "subprocess.Popen[str]"
    url: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        """How its own token is sent."""
        return {"authorization": f"Bearer {self.token}"}

    def stop(self) -> float:
        """SIGTERM; the seconds until it is gone."""
        begun = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        return time.monotonic() - begun


def start(data: Path, fake: Fake | None = None, **settings: object) -> Server:
    """A server with workers beside it, once it is ready; its temporary files lie in `data`/tmp, its
    log in `data`."""
    (data / "tmp").mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-c",
        PROGRAM,
        "serve",
        "--data",
        str(data),
        "--port",
        "0",
        "--json",
        "--device",
        "cpu",
    ]
    if fake is not None:
        command = [sys.executable, ME, "serve", str(data), *_words(fake)]
    variables = {f"SKYLOOM_{name.upper()}": str(value) for name, value in settings.items()}
    environment = {**os.environ, **variables, "TMPDIR": str(data / "tmp")}
    with (data / "log").open("a") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
    assert process.stdout
    ready = json.loads(process.stdout.readline())
    return Server(process, ready["url"], ready["token"])


@contextmanager
def serving(data: Path, fake: Fake | None = None, **settings: object) -> Iterator[Server]:
    """A server while the block runs."""
    server = start(data, fake, **settings)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def wait_for(
    what: str, holds: Callable[[], object], seconds: float = 120.0, every: float = 0.1
) -> None:
    """Until something holds. Ends the run when it does not come to that."""
    until = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > until:
            raise SystemExit(f"{what}: not after {seconds:.0f} s")
        time.sleep(every)


def children(process: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    with suppress(FileNotFoundError):
        found = [
            int(one) for one in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
        for thread in Path(f"/proc/{process}/task").iterdir():
            found += [
                int(one)
                for one in (thread / "children").read_text().split()
                if int(one) not in found
            ]
        return [*found, *(one for child in found for one in children(child))]
    return []


def read_process(process: int) -> dict[str, int]:
    """Resident memory in KiB, open files, threads."""
    rows = dict(
        line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines()
    )
    memory, threads = int(rows["VmRSS"].split()[0]), int(rows["Threads"])
    return {
        "rss": memory,
        "fds": len(list(Path(f"/proc/{process}/fd").iterdir())),
        "threads": threads,
    }


class Watch:
    """Reads processes every half second while the block runs; `summary` compares the end with the
    state after the warm-up."""

    def __init__(self, processes: Sequence[int]) -> None:
        self._read: dict[int, list[dict[str, int]]] = {process: [] for process in processes}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.5):
            for process, rows in self._read.items():
                with suppress(FileNotFoundError):
                    rows.append(read_process(process))

    def summary(self, process: int) -> dict[str, Any]:
        """After the warm-up, in the first and the last fifth: memory, and by how much it grew;
        files, threads, and the most of them."""
        rows = self._read[process]
        rows = rows[int(len(rows) * WARM) :]
        part = max(1, len(rows) // 5)
        first, last = (
            sorted(row["rss"] for row in some)[part // 2] for some in (rows[:part], rows[-part:])
        )
        course = [round(row["rss"] / 1024, 1) for row in rows[:: max(1, len(rows) // 10)]]
        growth: dict[str, Any] = {
            "rss_mib": [round(first / 1024, 1), round(last / 1024, 1)],
            "course_mib": course,
        }
        growth["grew_percent"] = round(100 * (last - first) / first, 1)
        return {
            **growth,
            **{
                name: [rows[0][name], rows[-1][name], max(row[name] for row in rows)]
                for name in ("fds", "threads")
            },
        }


def percentile(values: Sequence[float], part: float) -> float:
    """The value that `part` of the values do not exceed, to a millisecond."""
    return (
        round(sorted(values)[min(len(values) - 1, int(part * len(values)))], 3) if values else 0.0
    )


def _words(fake: Fake) -> list[str]:
    return [
        "--workers",
        str(fake.workers),
        "--steps",
        str(fake.steps),
        "--seconds",
        repr(fake.seconds),
    ]


def serve(data: Path, fake: Fake) -> None:
    """The real server, whose supervisor starts workers with the fake renderer."""
    supervise.worker_command = lambda _device: [
        sys.executable,
        ME,
        "work",
        str(data),
        *_words(fake),
    ]
    settings = load_settings(data=data, port=0)

    def announce(url: str, token: str) -> None:
        sys.stdout.write(json.dumps({"url": url, "token": token}) + "\n")
        sys.stdout.flush()

    listen.listen(settings, ["none"] * fake.workers, announce)


def work(settings: Settings, fake: Fake, name: str) -> None:
    """The real worker, with the fake renderer, as `skyloom worker --attached` runs it."""
    settings.runs.mkdir(parents=True, exist_ok=True)
    render = partial(swarm.fake_render, steps=fake.steps, pause=lambda: fake.seconds)
    leases = Leases(Database(settings.database), settings)
    hand = Worker(
        leases, FolderStorage(Path(settings.storage)), render, settings, name=name, device="none"
    )

    def leave(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        hand.drain()

    def until_the_end() -> None:
        while os.read(0, 1024):
            pass
        hand.drain()

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=until_the_end, daemon=True).start()
    hand.run()


def main() -> None:
    """Be a server, or a worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("serve", "work"))
    parser.add_argument("data", type=Path)
    parser.add_argument("--name", default=f"fake-{os.getpid()}")
    for one, value in vars(Fake()).items():
        parser.add_argument(f"--{one}", type=type(value), default=value)
    options = parser.parse_args()
    fake = Fake(options.workers, options.steps, options.seconds)
    set_up_logging(style="human")
    if options.what == "serve":
        serve(options.data, fake)
    else:
        work(load_settings(data=options.data), fake, options.name)


if __name__ == "__main__":
    main()
