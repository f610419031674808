"""Time, memory and disk of a plan before any work, learned from earlier runs on this machine.

A plan becomes plain numbers (`Work`). Each run leaves a line in the history: how long its parts took and how much
memory it had at most. The medians of like runs give the next estimate; before there are any, constants do, and the
estimate says that it is a first guess.
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

from safetensors import SafetensorError, safe_open

from skyloom.core.config import from_table
from skyloom.core.device import peak_memory_bytes
from skyloom.core.errors import CapacityError, CheckpointError
from skyloom.core.files import write_atomically
from skyloom.core.paths import state_folder
from skyloom.core.types import ScaleFactors
from skyloom.generate.plan import Plan
from skyloom.models.dit import DitConfig
from skyloom.models.registry import ModelInfo

MAX_HISTORY = 256 * 1024  # bytes; the older half goes when it is passed
_LIKE_RUNS = 20
_FIXED_SECONDS, _FLOPS, _DECODE_PIXELS = (
    5.0,
    4e10,
    3e6,
)  # before any run: load, FLOP/s, pixels decoded a second
_BASE_BYTES, _FLOATS_PER_WIDTH = (
    600 * 2**20,
    24,
)  # the program itself; live fp32 values per token and channel
_DECODE_BYTES = 1_200  # live bytes per pixel of the frames that are decoded at a time
_FILE_BYTES = 0.12  # per pixel and frame, twice what the bundled model's mp4 take; there are two files at the end
_DECODED_AT_A_TIME = 12  # frames


class Phased(Protocol):
    """A step of a pipeline, as far as timing goes."""

    @property
    def phase(self) -> str:
        """ "text", "denoise" or "decode"."""
        ...


S = TypeVar("S", bound=Phased)
C = TypeVar("C")


@dataclass(frozen=True)
class Work:
    """A plan in plain numbers. `calls` of the network over `tokens` at most take `flops` in all; `frames` of `height`
    x `width` are decoded, `seconds` long as shown; `kind` names what runs are alike: model, device, number format."""

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

    @property
    def pixels(self) -> int:
        """Of all frames."""
        return self.frames * self.height * self.width

    @property
    def working_bytes(self) -> int:
        """What the work needs at its peak, besides the program and the weights; the same however many windows."""
        decoded = min(self.frames, _DECODED_AT_A_TIME) * self.height * self.width
        return self.tokens * self.memory_unit + decoded * _DECODE_BYTES


@dataclass(frozen=True)
class Run:
    """What one run measured: seconds until the first step (loading, reading the prompt), of denoising and of decoding,
    the bytes of memory it had at most, and those of the file (0: none was written)."""

    work: Work
    fixed_seconds: float
    denoise_seconds: float
    decode_seconds: float
    peak_bytes: int
    file_bytes: int = 0


@dataclass(frozen=True)
class Estimate:
    """What a plan will take: seconds in all and of each part, bytes of memory and of disk at their peaks. `runs` of
    the same kind were learned from; none makes it a first guess."""

    work: Work
    fixed_seconds: float
    denoise_seconds: float
    decode_seconds: float
    memory_bytes: int
    disk_bytes: int
    runs: int

    @property
    def seconds(self) -> float:
        """From the start to the file."""
        return self.fixed_seconds + self.denoise_seconds + self.decode_seconds

    @property
    def first_guess(self) -> bool:
        """Whether nothing was learned yet."""
        return not self.runs

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {**asdict(self), "seconds": self.seconds, "first_guess": self.first_guess}


def work_of(
    plan: Plan, model: ModelInfo, config: DitConfig, scale: ScaleFactors, device: str, dtype: str
) -> Work:
    """A plan in plain numbers: every step asks the transformer once, with guidance twice, and a finished window is
    read once more, piece by piece, into the memory of the next."""
    depth, tall, wide = config.patch
    rows, columns = (
        math.ceil(side / scale.space) for side in (plan.shape.height, plan.shape.width)
    )
    per_frame = math.ceil(rows / tall) * math.ceil(columns / wide) // depth
    branches = 1 if plan.guidance_scale == 1.0 else 2
    seen = 0 if model.rollout is None else model.rollout.sink + model.rollout.recent
    calls, flops, tokens = 0, 0.0, 0
    for window in plan.windows:
        here = (window.stop - window.start) * per_frame
        keys = here + (seen * per_frame if window.index else 0)
        again = model.rollout is not None and window is not plan.windows[-1]
        pieces = (
            math.ceil((window.stop - window.start) / model.rollout.window)
            if model.rollout and again
            else 0
        )
        calls, tokens = calls + branches * (plan.num_steps + pieces), max(tokens, here)
        asked = branches * (plan.num_steps * (2 if window.fade else 1) + again)
        flops += asked * here * _flops_per_token(config, keys)
    shape = plan.shape
    kind = f"{model.name} {device} {dtype}"
    unit = config.width * _FLOATS_PER_WIDTH * 4 * branches
    return Work(
        kind,
        len(plan.windows),
        calls,
        tokens,
        flops,
        shape.frames,
        shape.height,
        shape.width,
        plan.seconds,
        unit,
    )


def read_config(folder: Path, part: str, config_class: type[C]) -> C:
    """The config in a part's header; no tensor is read. Raises CheckpointError when it is missing or damaged."""
    path = next(iter(sorted(folder.glob(f"{part}*.safetensors"))), folder / f"{part}.safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            return from_table(
                json.loads((file.metadata() or {})["config"]), config_class, str(path)
            )
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}).", hint="Install skyloom again."
        ) from error


def estimate(work: Work, history: Iterable[Run]) -> Estimate:
    """What the work will take, by the medians of the latest runs of its kind."""
    like = [run for run in history if run.work.kind == work.kind][-_LIKE_RUNS:]
    per_flop = _typical(
        [run.denoise_seconds / run.work.flops for run in like if run.work.flops], 1 / _FLOPS
    )
    per_pixel = _typical([run.decode_seconds / run.work.pixels for run in like], 1 / _DECODE_PIXELS)
    base = _typical([run.peak_bytes - run.work.working_bytes for run in like], _BASE_BYTES)
    written = [run.file_bytes / run.work.pixels for run in like if run.file_bytes]
    return Estimate(
        work,
        fixed_seconds=_typical([run.fixed_seconds for run in like], _FIXED_SECONDS),
        denoise_seconds=work.flops * per_flop,
        decode_seconds=work.pixels * per_pixel,
        memory_bytes=max(0, round(base)) + work.working_bytes,
        disk_bytes=round(2 * work.pixels * _typical(written, _FILE_BYTES)),
        runs=len(like),
    )


def check_capacity(expected: Estimate, *, free_disk: int, free_memory: int) -> None:
    """Raise CapacityError, with what would fit, when bytes of disk or memory will not do."""
    need, length = expected.disk_bytes, expected.work.seconds
    if need > free_disk:
        fits = math.floor(length * free_disk / need)
        hint = f"What is free fits up to {fits} s at this size." if fits else "Free some space."
        raise CapacityError(
            f"This video needs {_mebibytes(need)} of disk, {_mebibytes(free_disk)} are free.",
            hint=hint,
        )
    if expected.memory_bytes > free_memory:
        raise CapacityError(
            f"This video needs {_mebibytes(expected.memory_bytes)} of memory, {_mebibytes(free_memory)} are free.",
            hint=_fitting(expected, free_memory),
        )


def check_states(plan: Plan, scale: ScaleFactors, channels: int, folder: Path) -> None:
    """Raise CapacityError when the latents that a folder to resume from is to keep, in fp32, will not fit there."""
    across = (plan.shape.height // scale.space) * (plan.shape.width // scale.space)
    cells = sum(window.stop - window.start for window in plan.windows) * across
    need, there = 4 * channels * cells, folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if need > free:
        raise CapacityError(
            f"To go on after a stop, {folder} needs {_mebibytes(need)} of disk, {_mebibytes(free)} are free.",
            hint="Name a folder on a larger disk, or leave it out.",
        )


def record_run(run: Run, path: Path | None = None) -> bool:
    """Add a run to the history (by default this user's); False when it cannot be written, which stops nobody."""
    path = path or history_path()
    line = (json.dumps(asdict(run)) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size + len(line) > MAX_HISTORY:
            _shorten(path)
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line)  # one call: lines of several programs do not mix
        finally:
            os.close(file)
    except OSError:
        return False
    return True


def recorded(
    steps: Iterable[S], work: Work, *, since: float | None = None, path: Path | None = None
) -> Iterator[S]:
    """The same steps; when they have come to their end, the run is recorded.

    `since` is when loading began, by time.perf_counter(); without it, it began now. A run that is left early, or
    fails, is not recorded: it would teach something wrong.
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
    """The runs on this machine, oldest first; a line that is cut or broken is passed over."""
    try:
        content = (path or history_path()).read_bytes()[-2 * MAX_HISTORY :]
    except OSError:
        return []
    return [run for line in content.splitlines() if (run := _parse(line)) is not None]


def history_path() -> Path:
    """Return the path of the run history in the state folder."""
    return state_folder() / "runs.jsonl"


def free_memory() -> int:
    """Bytes that programs can still get: of this machine, and of the group that this process is in."""
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


def _flops_per_token(config: DitConfig, keys: int) -> float:
    """Of one call: the weights of every layer, and the attention to `keys` tokens. Two for a multiplied weight."""
    weights = config.layers * (
        4 * config.width**2 + 2 * config.width**2 + 2 * config.width * config.ffn
    )
    return 2.0 * weights + 4.0 * config.layers * config.width * keys


def _typical(values: Sequence[float], default: float) -> float:
    return median(values) if values else default


def _fitting(expected: Estimate, free: int) -> str:
    """What could be asked for instead, when memory is short."""
    fixed = expected.memory_bytes - expected.work.working_bytes
    share = (free - fixed) / max(1, expected.work.working_bytes)
    if share <= 0:
        return "Not even the smallest would fit: close other programs, or go on with --force."
    if expected.work.windows == 1 and (fits := math.floor(expected.work.seconds * share)):
        return f"What is free fits up to {fits} s at this size."
    return "Ask for a smaller size, or close other programs."


def _mebibytes(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 or not size else f"{size / 2**10:,.0f} KiB"


def _shorten(path: Path) -> None:
    """Keep the newer half of the history, whole lines only."""
    content = path.read_bytes()[-MAX_HISTORY // 2 :]
    write_atomically(path, content[content.find(b"\n") + 1 :])


def _parse(line: bytes) -> Run | None:
    """A line's run, if it is one and has sound numbers."""
    try:
        values = json.loads(line)
        run = Run(Work(**values.pop("work")), **values)
        numbers = [*list(vars(run.work).values())[1:], *list(vars(run).values())[1:]]
        sound = isinstance(run.work.kind, str) and all(
            isinstance(number, int | float) and math.isfinite(number) and number >= 0
            for number in numbers
        )
        return run if sound and run.work.flops and run.work.pixels else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
