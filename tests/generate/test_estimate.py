"""Estimates: recorded runs are predicted, numbers follow the plan, broken lines are skipped."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from skyloom.core.errors import CapacityError
from skyloom.core.types import ScaleFactors
from skyloom.generate import estimate as module
from skyloom.generate.estimate import (
    MAX_HISTORY,
    Run,
    Workload,
    check_capacity,
    estimate,
    free_memory,
    history_path,
    read_history,
    record_run,
    record_steps,
    workload_of,
)
from skyloom.generate.plan import make_plan
from skyloom.generate.request import Request
from skyloom.models.base import find_loader
from skyloom.models.registry import read_model

WORK = Workload("tiny cpu float32", 1, 4, 20, 1e9, 17, 32, 32, 1.0, 1000)
RUN = Run(WORK, 2.0, 3.0, 0.5, 400 * 2**20, 10_000)
SCALE = ScaleFactors(4, 16)
MIB = 2**20


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """A history of its own."""
    monkeypatch.setenv("SKYLOOM_STATE", str(tmp_path / "state"))
    return tmp_path / "state" / "runs.jsonl"


def work(tiny_model, **fields):
    """The tiny model's work on a request."""
    info = read_model(tiny_model)
    plan = make_plan(Request("a cat", seed=1, **fields), info, SCALE)
    return workload_of(
        plan, info, find_loader(info).read_network_cost(info), device="cpu", dtype="float32"
    )


def test_frames_decoded_at_once_follow_the_autoencoder(tiny_model):
    info = read_model(tiny_model)
    plan = make_plan(Request("a cat", seed=1), info, SCALE)
    cost = find_loader(info).read_network_cost(info)
    work = {
        time: workload_of(
            plan,
            info,
            replace(cost, scale=ScaleFactors(time, cost.scale.space)),
            device="cpu",
            dtype="float32",
        )
        for time in (2, 4)
    }
    assert (work[2].decoded_at_once, work[4].decoded_at_once) == (6, 12)
    assert work[2].working_bytes < work[4].working_bytes


def test_a_measured_run_is_the_next_estimate():
    again = estimate(WORK, [RUN])
    assert (again.fixed_seconds, again.decode_seconds, again.runs, again.first_guess) == (
        2.0,
        0.5,
        1,
        False,
    )
    assert again.denoise_seconds == pytest.approx(3.0)
    assert again.seconds == pytest.approx(5.5)
    assert again.memory_bytes == RUN.peak_bytes
    assert again.disk_bytes == 2 * RUN.file_bytes


def test_twice_the_work_takes_twice_the_time_and_loads_once():
    double = estimate(replace(WORK, flops=2e9, frames=34), [RUN])
    assert double.fixed_seconds == 2.0
    assert double.denoise_seconds == pytest.approx(6.0)
    assert double.decode_seconds == pytest.approx(1.0)


def test_only_like_runs_teach_and_the_middle_one_counts():
    slow, odd = (
        replace(RUN, denoise_seconds=300.0),
        replace(RUN, work=replace(WORK, kind="tiny cuda bfloat16")),
    )
    assert estimate(WORK, [slow, RUN, RUN, odd]).denoise_seconds == pytest.approx(3.0)
    assert estimate(WORK, [odd]).first_guess
    assert estimate(WORK, [slow] * 10 + [RUN] * 20).denoise_seconds == pytest.approx(3.0)


def test_network_calls_are_counted(tiny_model):
    assert work(tiny_model).calls == 2
    assert work(tiny_model, num_steps=5, guidance_scale=3.0).calls == 10
    whole = work(tiny_model, seconds=3)
    assert (whole.windows, whole.frames) == (4, 49)
    assert whole.calls == 4 * 2 + (2 + 1 + 1)
    assert whole.tokens == work(tiny_model).tokens == 5
    assert work(tiny_model, size="64x32").tokens == 10


def test_the_denoiser_calls_the_network_as_often_as_planned(tiny_model, monkeypatch):
    import skyloom
    from skyloom.models.diorama.v1.transformer import Dit

    calls = []
    for name in ("forward", "extend_cache"):
        real = getattr(Dit, name)
        monkeypatch.setattr(
            Dit, name, lambda *args, _real=real, **more: calls.append(1) or _real(*args, **more)
        )
    skyloom.load(str(tiny_model)).generate(
        "a cat", seconds=3, seed=1, num_steps=3, guidance_scale=2.0
    )
    assert len(calls) == work(tiny_model, seconds=3, num_steps=3, guidance_scale=2.0).calls


def test_memory_does_not_grow_with_windows_but_disk_does(tiny_model):
    short, long = (estimate(work(tiny_model, seconds=seconds), []) for seconds in (3, 30))
    assert short.memory_bytes == long.memory_bytes
    assert long.disk_bytes > 9 * short.disk_bytes
    assert long.denoise_seconds > short.denoise_seconds


def test_a_full_disk_is_refused_with_what_would_fit():
    expected = estimate(replace(WORK, frames=961, seconds=60.0), [RUN])
    check_capacity(expected, free_disk=expected.disk_bytes, free_memory=expected.memory_bytes)
    with pytest.raises(CapacityError, match="Up to 41 s at this size would fit"):
        check_capacity(
            expected, free_disk=round(expected.disk_bytes * 41.5 / 60), free_memory=2**40
        )
    with pytest.raises(CapacityError, match="Free some space"):
        check_capacity(expected, free_disk=10, free_memory=2**40)


def test_short_memory_is_refused():
    many = estimate(replace(WORK, windows=3), [RUN])
    with pytest.raises(CapacityError, match="Choose a smaller size"):
        check_capacity(many, free_disk=2**40, free_memory=many.memory_bytes - 1)
    with pytest.raises(
        CapacityError, match=r"memory must be at least 400 MiB, got 100 MiB.*close other programs"
    ):
        check_capacity(many, free_disk=2**40, free_memory=100 * MIB)
    one = estimate(replace(WORK, seconds=10.0), [RUN])
    half = one.memory_bytes - one.work.working_bytes // 2
    with pytest.raises(CapacityError, match="Up to 5 s"):
        check_capacity(one, free_disk=2**40, free_memory=half)


def test_runs_are_written_and_read_back(state):
    assert read_history() == []
    assert record_run(RUN)
    assert record_run(replace(RUN, decode_seconds=9.0))
    assert history_path() == state
    assert read_history() == [RUN, replace(RUN, decode_seconds=9.0)]


def test_invalid_lines_are_skipped(state):
    record_run(RUN)
    good = state.read_text()
    bad = json.loads(good)
    bad["peak_bytes"] = "much"
    worse = {**json.loads(good), "fixed_seconds": float("nan")}
    zero = json.loads(good)
    zero["work"]["flops"] = 0
    lines = [json.dumps(values) for values in (bad, worse, zero)]
    state.write_bytes(
        "\n".join(["hello", "[]", "{}", *lines, good, good[:40]]).encode() + b"\xff\xfe\n"
    )
    assert read_history() == [RUN]


def test_the_history_stays_small_and_keeps_the_latest(state):
    length = len(json.dumps(module.asdict(RUN)))
    state.parent.mkdir()
    state.write_text((json.dumps(module.asdict(RUN)) + "\n") * (MAX_HISTORY // (length + 1)))
    last = replace(RUN, fixed_seconds=77.0)
    assert record_run(last)
    assert state.stat().st_size < MAX_HISTORY * 0.6
    kept = read_history()
    assert kept[-1] == last
    assert len(kept) * (length + 1) > MAX_HISTORY * 0.4
    assert list(state.parent.iterdir()) == [state]


def test_a_history_that_cannot_be_written_stops_nobody(tmp_path):
    (tmp_path / "file").write_text("")
    assert not record_run(RUN, tmp_path / "file" / "runs.jsonl")
    assert read_history(tmp_path / "file" / "runs.jsonl") == []


def test_the_state_folder_is_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("SKYLOOM_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_path() == tmp_path / "skyloom" / "runs.jsonl"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_path() == tmp_path / ".local/state/skyloom/runs.jsonl"


def test_a_watched_run_is_recorded_at_its_end_only(monkeypatch):
    clock = iter([10.0, 12.0, 15.0, 15.5, 16.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    steps = [SimpleNamespace(phase=phase) for phase in ("text", "denoise", "denoise", "decode")]
    watched = record_steps(steps, WORK)
    taken = [next(watched) for _ in steps]
    assert taken == steps
    assert read_history() == []
    assert next(watched, None) is None
    (run,) = read_history()
    assert (run.fixed_seconds, run.denoise_seconds, run.decode_seconds) == (2.0, 3.5, 0.5)
    assert run.work == WORK
    assert run.peak_bytes > 0


def test_the_machine_has_some_memory():
    assert 0 <= free_memory() < 2**60
