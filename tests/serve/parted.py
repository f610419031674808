"""A Postgres that is killed under load, and a network that parts a worker from it.

`--kills N`: the first process of Postgres gets SIGKILL and is started again, N times, under a real
server with two workers and clients who come again with their keys. `--parted SECONDS`: a worker in
a network of its own (a namespace; needs root) holds a job when its packets stop to arrive anywhere;
another goes on with it. Nothing may be lost, made twice or be of other frames, and everybody
recovers alone. Prints one line of JSON; exits with 1 when that is not so.

    python tests/serve/parted.py --kills 20
    python tests/serve/parted.py --parted 60
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import drains
import live
import postgres
import swarm

from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import Job, JobStore
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, FolderStorage

FAKE = live.Fake(workers=2, steps=10, seconds=0.05)
SLOW = live.Fake(workers=1, steps=20, seconds=0.5)
LEASE = {"lease_seconds": 6.0, "heartbeat_seconds": 2.0}
HERE, THERE, NOBODY = "10.213.7.1", "10.213.7.2", "02:00:00:00:00:99"


def judge(store: JobStore, storage: Path, steps: int, ids: dict[str, str]) -> dict[str, int]:
    """What was lost, ended twice, or has other frames than it must have."""
    jobs = {job.id: job for job in store.walk()}
    ends = Counter[str]()
    after = 0
    while page := store.events(after=after, limit=1_000):
        ends.update(event.job for event in page if event.type == "video.completed")
        after = page[-1].number
    lost = sum(id not in jobs or jobs[id].status != "completed" for id in ids.values())
    wrong = sum(not right(job, FolderStorage(storage), steps) for job in jobs.values())
    again = len(jobs) - len(ids)  # one may have been made that no answer named, at the very end
    return {
        "jobs": len(jobs),
        "lost": lost,
        "doubled": sum(n > 1 for n in ends.values()) + max(0, again - 1),
        "wrong": wrong,
    }


def right(job: Job, storage: FolderStorage, steps: int) -> bool:
    """Whether a job's video is what its prompt comes to."""
    if job.result is None:
        return False
    made = b"".join(storage.read(Asset.parse(job.result.assets["video"])))
    return made == swarm.frames_of(str(job.request["prompt"]), steps)


def at_rest(store: JobStore) -> bool:
    """Whether nothing waits and nothing runs."""
    return not {"queued", "in_progress"} & set(store.counts().by_status)


def kill_postgres(kills: int) -> dict[str, object]:
    """Kill it, start it, kill it; then let all be made."""
    dice = random.Random(0)
    with (
        postgres.cluster(durable=True) as base,
        tempfile.TemporaryDirectory(prefix="skyloom-parted-") as name,
    ):
        data = Path(name)
        settings = Settings(data=data, database_url=base.url)
        bounds = {
            **LEASE,
            "max_attempts": 1_000,
            "max_queued": 30,
            "max_queued_per_owner": 30,
            "disk_reserve": 0,
        }
        with live.serving(data, FAKE, database_url=base.url, **bounds) as server:
            client = drains.Client(
                JobStore(Database(base.url), settings), 0.1, server, allowed=(429, 503)
            )
            live.wait_for("workers", lambda: client.store.counts().workers == FAKE.workers)
            thread = threading.Thread(target=client.run, daemon=True)
            thread.start()
            live.wait_for("load", lambda: len(client.ids) > 3)
            family = live.children(server.process.pid)
            for _ in range(kills):
                time.sleep(dice.uniform(0.3, 2.0))
                base.kill()
                time.sleep(dice.uniform(0.0, 1.0))
                base.start()
            made = len(client.ids)
            live.wait_for("a job after the last start", lambda: len(client.ids) > made, 60.0)
            client.over.set()
            thread.join()
            live.wait_for("rest", lambda: at_rest(client.store), 300.0)
            same = live.children(server.process.pid) == family
            summary = judge(client.store, data / "assets", FAKE.steps, client.ids)
    return {
        "postgres_killed": kills,
        **summary,
        "answers": Counter(client.refused),
        "wrong_answers": client.wrong[:5],
        "children_same": same,
    }


class Network:
    """A network of one worker, joined to this machine by a cable that can be cut."""

    def __init__(self) -> None:
        self.name = f"skyloom{os.getpid()}"
        self._here, self._there = f"a{os.getpid()}", f"b{os.getpid()}"

    def build(self) -> None:
        """Two ends, an address each."""
        _ip("netns", "add", self.name)
        _ip("link", "add", self._here, "type", "veth", "peer", "name", self._there)
        _ip("link", "set", self._there, "netns", self.name)
        for where, end, address in (
            ((), self._here, HERE),
            (("-n", self.name), self._there, THERE),
        ):
            _ip(*where, "addr", "add", f"{address}/24", "dev", end)
            _ip(*where, "link", "set", end, "up")

    def cut(self) -> None:
        """From now on what is sent arrives nowhere, and nobody says so: each end sends to a machine
        that is none."""
        self._neighbours("replace", "lladdr", NOBODY)

    def mend(self) -> None:
        """As before."""
        self._neighbours("del")

    def remove(self) -> None:
        """As if it had never been."""
        _ip("netns", "del", self.name)

    def _neighbours(self, verb: str, *more: str) -> None:
        permanent = ("nud", "permanent") if more else ()
        _ip("neigh", verb, THERE, *more, "dev", self._here, *permanent)
        _ip("-n", self.name, "neigh", verb, HERE, *more, "dev", self._there, *permanent)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


@contextmanager
def network() -> Iterator[Network]:
    """A network while the block runs."""
    one = Network()
    one.build()
    try:
        yield one
    finally:
        one.remove()


@contextmanager
def worker(
    data: Path, url: str, storage: Path, where: tuple[str, ...] = ()
) -> Iterator["subprocess.Popen[bytes]"]:
    """A worker with the slow fake renderer and its own folder, as on another host."""
    data.mkdir()
    words = ["--steps", str(SLOW.steps), "--seconds", repr(SLOW.seconds), "--name", data.name]
    variables = {
        "DATABASE_URL": url,
        "STORAGE_URL": str(storage),
        "DISK_RESERVE": "0",
        "MAX_ATTEMPTS": "1000",
    }
    variables |= {name.upper(): str(value) for name, value in LEASE.items()}
    environment = {**os.environ, **{f"SKYLOOM_{name}": value for name, value in variables.items()}}
    with (data / "log").open("w") as log:
        command = [*where, sys.executable, live.ME, "work", str(data), *words]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, env=environment)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def part(seconds: float) -> dict[str, object]:
    """Cut the cable of a worker that holds a job, for some seconds."""
    with (
        network() as cable,
        postgres.cluster(durable=True, address=HERE) as base,
        tempfile.TemporaryDirectory() as name,
    ):
        data, far = Path(name), f"postgresql://{base.user}@{HERE}/postgres"
        settings = Settings(data=data, database_url=base.url)
        store = JobStore(Database(base.url), settings)
        (data / "assets").mkdir()
        ids = {f"{n}": store.submit({"prompt": f"ball {n}"}, owner="ada").id for n in range(4)}
        inside = ("ip", "netns", "exec", cable.name)
        with (
            worker(data / "far", far, data / "assets", inside) as lonely,
            worker(data / "near", base.url, data / "assets"),
        ):
            live.wait_for("a job in the far worker's hands", lambda: held(store, "far"))
            id = held(store, "far")
            cable.cut()
            begun = time.monotonic()
            live.wait_for(
                "the near worker to go on with it",
                lambda: id in (held(store, "near"), *ended(store)),
                120.0,
            )
            taken = time.monotonic() - begun
            time.sleep(max(0.0, seconds - taken))
            cable.mend()
            begun = time.monotonic()
            live.wait_for(
                "the far worker to come back",
                lambda: wish(store, ids) and held(store, "far"),
                240.0,
                0.5,
            )
            back = time.monotonic() - begun
            live.wait_for("rest", lambda: at_rest(store), 240.0)
            alive = lonely.poll() is None
        log = (data / "far/log").read_text()
        judged = judge(store, data / "assets", SLOW.steps, ids)
    told_by_far = {
        "unheard_heartbeats": log.count("heartbeat not written"),
        "leases_lost": log.count("lease lost"),
    }
    return {
        "parted_seconds": seconds,
        "taken_over_after": round(taken, 1),
        "back_after": round(back, 1),
        **told_by_far,
        **judged,
        "far_lives": alive,
    }


def held(store: JobStore, worker: str) -> str | None:
    """The job that a worker has in its hands, as the queue sees it."""
    running = list(store.walk(status="in_progress"))
    return next((job.id for job in running if job.worker == worker), None)


def ended(store: JobStore) -> list[str]:
    """What is completed."""
    return [job.id for job in store.walk(status="completed")]


def wish(store: JobStore, ids: dict[str, str]) -> bool:
    """See that a job waits."""
    if "queued" not in store.counts().by_status:
        key = f"{len(ids)}"
        ids[key] = store.submit({"prompt": f"ball {key}"}, owner="ada").id
    return True


def main() -> None:
    """Run one of the two trials; print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--parted", type=float, default=0.0, help="seconds")
    options, begun = parser.parse_args(), time.monotonic()
    summary: dict[str, object] = kill_postgres(options.kills) if options.kills else {}
    summary |= part(options.parted) if options.parted else {}
    sys.stdout.write(json.dumps({**summary, "seconds": round(time.monotonic() - begun, 1)}) + "\n")
    broken = any(summary[name] for name in ("lost", "doubled", "wrong"))
    sys.exit(1 if broken or summary.get("wrong_answers") or summary.get("leases_lost") == 0 else 0)


if __name__ == "__main__":
    main()
