# pyright: basic
"""Estimate time, memory and disk of a plan from the run history of this machine.

A plan is reduced to numbers (`Workload`). Each run appends its measured times and peak memory to
the history; the medians of similar runs give the next estimate. Without history, constants are
used and the estimate is marked as a first guess.
"""

import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

from skyloom.core.device import peak_memory_bytes
from skyloom.core.errors import CapacityError
from skyloom.core.files import write_atomically
from skyloom.core.paths import state_folder
from skyloom.core.types import ScaleFactors
from skyloom.generate.plan import Plan
from skyloom.generate.windows import DECODE_FRAMES
from skyloom.models.base import NetworkCost
from skyloom.models.registry import ModelInfo

MAX_HISTORY = 256 * 1024  # bytes; beyond it the older half is dropped
_SIMILAR_RUNS = 20
# defaults without history
_FIXED_SECONDS = 5.0  # loading and text encoding
_FLOPS = 4e10  # per second
_DECODE_PIXELS = 3e6  # per second
_BASE_BYTES = 600 * 2**20  # the process without model activations
_DECODE_BYTES = 1_200  # live bytes per pixel of the frames in the decoder
_FILE_BYTES = 0.12  # per pixel and frame: twice the bundled model's mp4; two files exist at the end


class Phased(Protocol):
    """A step of a pipeline; only its phase is used."""

    @property
    def phase(self) -> str:
        """ "text", "denoise" or "decode"."""
        ...


S = TypeVar("S", bound=Phased)


@dataclass(frozen=True)
class Workload:
    """A plan in numbers; the field names are keys of the history.

    `calls` of the network with at most `tokens` take `flops` in total. `frames` of `height` x
    `width` pixels are decoded, `seconds` long. `memory_unit` is bytes per token. Runs of the same
    `kind` (model, device, dtype) are comparable. `decoded_at_once` frames come from one call of the
    decoder; in older histories, which lack it, 12.
    """

    kind: str
    windows: int
    calls: int
    tokens: int
    flops: float
    frames: int
    height: int
    width: int
    seconds: float
    memory_unit: int
    decoded_at_once: int = 12

    @property
    def pixels(self) -> int:
        """Pixels of all frames."""
        return self.frames * self.height * self.width

    @property
    def working_bytes(self) -> int:
        """Peak bytes of activations; independent of the number of windows."""
        decoded = min(self.frames, self.decoded_at_once) * self.height * self.width
        return self.tokens * self.memory_unit + decoded * _DECODE_BYTES


@dataclass(frozen=True)
class Run:
    """Measurements of one run. `file_bytes` is 0 if no file was written.

    `fixed_seconds` is the time of loading and text encoding.
    """

    work: Workload
    fixed_seconds: float
    denoise_seconds: float
    decode_seconds: float
    peak_bytes: int
    file_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """Expected seconds per phase and peak bytes of memory and disk, from `runs` similar runs."""

    work: Workload
    fixed_seconds: float
    denoise_seconds: float
    decode_seconds: float
    memory_bytes: int
    disk_bytes: int
    runs: int

    @property
    def seconds(self) -> float:
        """Total seconds."""
        return self.fixed_seconds + self.denoise_seconds + self.decode_seconds

    @property
    def first_guess(self) -> bool:
        """Whether the history has no similar run."""
        return not self.runs

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "seconds": self.seconds, "first_guess": self.first_guess}


def workload_of(
    plan: Plan,
    model: ModelInfo,
    cost: NetworkCost,
    *,
    device: str,
    dtype: str,
) -> Workload:
    """The workload of a plan.

    Every step calls the transformer once, with guidance twice. A finished window is read once more,
    in pieces, into the cache.
    """
    per_frame = tokens_per_frame(plan, cost)
    branches = 1 if plan.guidance_scale == 1.0 else 2
    rollout = model.rollout
    context = 0 if rollout is None else rollout.sink + rollout.recent
    calls = 0
    flops = 0.0
    tokens = 0
    for window in plan.windows:
        frames = window.stop - window.start
        window_tokens = frames * per_frame
        keys = window_tokens + (context * per_frame if window.index else 0)
        cached = rollout is not None and window is not plan.windows[-1]
        pieces = math.ceil(frames / rollout.window) if rollout is not None and cached else 0
        prompts = 2 if window.prompt_fade else 1
        passes = branches * (plan.num_steps * prompts + cached)
        calls += branches * (plan.num_steps + pieces)
        tokens = max(tokens, window_tokens)
        flops += passes * window_tokens * (cost.token_flops + cost.key_flops * keys)
    return Workload(
        kind=f"{model.name} {device} {dtype}",
        windows=len(plan.windows),
        calls=calls,
        tokens=tokens,
        flops=flops,
        frames=plan.shape.frames,
        height=plan.shape.height,
        width=plan.shape.width,
        seconds=plan.seconds,
        memory_unit=cost.token_bytes * branches,
        decoded_at_once=DECODE_FRAMES * cost.scale.time,
    )


def tokens_per_frame(plan: Plan, cost: NetworkCost) -> int:
    """Tokens of the transformer per latent frame."""
    depth, patch_height, patch_width = cost.patch
    rows = math.ceil(math.ceil(plan.shape.height / cost.scale.space) / patch_height)
    columns = math.ceil(math.ceil(plan.shape.width / cost.scale.space) / patch_width)
    return rows * columns // depth


def estimate(work: Workload, history: Iterable[Run]) -> Estimate:
    """Estimate a workload by the medians of the latest similar runs."""
    similar = [run for run in history if run.work.kind == work.kind][-_SIMILAR_RUNS:]
    per_flop = _median(
        [run.denoise_seconds / run.work.flops for run in similar if run.work.flops], 1 / _FLOPS
    )
    per_pixel = _median(
        [run.decode_seconds / run.work.pixels for run in similar], 1 / _DECODE_PIXELS
    )
    base = _median([run.peak_bytes - run.work.working_bytes for run in similar], _BASE_BYTES)
    written = [run.file_bytes / run.work.pixels for run in similar if run.file_bytes]
    return Estimate(
        work,
        fixed_seconds=_median([run.fixed_seconds for run in similar], _FIXED_SECONDS),
        denoise_seconds=work.flops * per_flop,
        decode_seconds=work.pixels * per_pixel,
        memory_bytes=max(0, round(base)) + work.working_bytes,
        disk_bytes=round(2 * work.pixels * _median(written, _FILE_BYTES)),
        runs=len(similar),
    )


def check_capacity(expected: Estimate, *, free_disk: int, free_memory: int) -> None:
    """Raise CapacityError if disk or memory (bytes) are too small; the hint says what would fit."""
    need = expected.disk_bytes
    length = expected.work.seconds
    if need > free_disk:
        fits = math.floor(length * free_disk / need)
        hint = f"Up to {fits} s at this size would fit." if fits else "Free some space."
        raise CapacityError(
            f"Free disk space must be at least {_mebibytes(need)}, got {_mebibytes(free_disk)}.",
            hint=hint,
        )
    if expected.memory_bytes > free_memory:
        raise CapacityError(
            f"Free memory must be at least {_mebibytes(expected.memory_bytes)}, "
            f"got {_mebibytes(free_memory)}.",
            hint=_memory_hint(expected, free_memory),
        )


def check_checkpoint_space(plan: Plan, scale: ScaleFactors, channels: int, folder: Path) -> None:
    """Raise CapacityError if the checkpoints (fp32 latents) do not fit on the disk of `folder`."""
    across = (plan.shape.height // scale.space) * (plan.shape.width // scale.space)
    cells = sum(window.stop - window.start for window in plan.windows) * across
    need = 4 * channels * cells
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if need > free:
        raise CapacityError(
            f"Free disk space for checkpoints in {folder} must be at least {_mebibytes(need)}, "
            f"got {_mebibytes(free)}.",
            hint="Choose a folder on a larger disk, or leave it out.",
        )


def record_run(run: Run, path: Path | None = None) -> bool:
    """Append a run to the history (by default the user's). Returns False on an I/O error."""
    path = path or history_path()
    line = (json.dumps(asdict(run)) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size + len(line) > MAX_HISTORY:
            _shorten(path)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line)  # one call, so that concurrent writers do not mix lines
        finally:
            os.close(file)
    except OSError:
        return False
    return True


def record_steps(
    steps: Iterable[S], work: Workload, *, since: float | None = None, path: Path | None = None
) -> Iterator[S]:
    """Pass steps through and record the run when they end.

    `since` is the time.perf_counter() at which loading began (default: now). A run that fails or is
    stopped early is not recorded.
    """
    last = time.perf_counter() if since is None else since
    spent = {"text": 0.0, "denoise": 0.0, "decode": 0.0}
    for step in steps:
        now = time.perf_counter()
        spent[step.phase] = spent.get(step.phase, 0.0) + now - last
        last = now
        yield step
    record_run(
        Run(work, spent["text"], spent["denoise"], spent["decode"], peak_memory_bytes()), path
    )


def read_history(path: Path | None = None) -> list[Run]:
    """The runs on this machine, oldest first; invalid lines are skipped."""
    try:
        content = (path or history_path()).read_bytes()[-2 * MAX_HISTORY :]
    except OSError:
        return []
    return [run for line in content.splitlines() if (run := _parse(line)) is not None]


def history_path() -> Path:
    """Path of the run history in the state folder."""
    return state_folder() / "runs.jsonl"


def free_memory() -> int:
    """Available bytes of memory: of the machine, limited by the process's cgroup."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        rows = {
            name: int(rest.split()[0]) * 1024
            for name, _, rest in (line.partition(":") for line in lines)
        }
        free = rows["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        group = Path("/sys/fs/cgroup")
        limit, used = (
            (group / name).read_text().strip() for name in ("memory.max", "memory.current")
        )
        return free if limit == "max" else max(0, min(free, int(limit) - int(used)))
    except (OSError, ValueError):
        return free


def _median(values: Sequence[float], default: float) -> float:
    return median(values) if values else default


def _memory_hint(expected: Estimate, free: int) -> str:
    """A hint at a request that would fit into memory."""
    fixed = expected.memory_bytes - expected.work.working_bytes
    share = (free - fixed) / max(1, expected.work.working_bytes)
    if share <= 0:
        return "No size fits: close other programs, or continue with --force."
    if expected.work.windows == 1 and (fits := math.floor(expected.work.seconds * share)):
        return f"Up to {fits} s at this size would fit."
    return "Choose a smaller size, or close other programs."


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 or not size else f"{size / 2**10:,.0f} KiB"


def _shorten(path: Path) -> None:
    """Drop the older half of the history."""
    content = path.read_bytes()[-MAX_HISTORY // 2 :]
    write_atomically(path, content[content.find(b"\n") + 1 :])


def _parse(line: bytes) -> Run | None:
    """The run of a line, if it is valid."""
    try:
        values = json.loads(line)
        run = Run(Workload(**values.pop("work")), **values)
        numbers = [*list(vars(run.work).values())[1:], *list(vars(run).values())[1:]]
        sound = isinstance(run.work.kind, str) and all(
            isinstance(number, int | float) and math.isfinite(number) and number >= 0
            for number in numbers
        )
        return run if sound and run.work.flops and run.work.pixels else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
