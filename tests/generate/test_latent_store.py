"""Resuming: the same frames wherever the run stopped; other requests are refused."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import skyloom
from skyloom.core.errors import CapacityError, RequestError
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.edit_spec import Edit
from skyloom.generate.latent_store import FinishedWindow, WindowStore, clear
from skyloom.generate.request import Request

LONG = Request("a red cat on the beach", seed=7, seconds=2.5, num_steps=2, guidance_scale=1.0)
BEST = Request(
    "a red cat on the beach", seed=7, seconds=1.75, quality="best", num_steps=4
)  # 2 windows


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), dtype="bfloat16")


def frames_of(steps):
    return torch.cat([step.frames for step in steps if step.frames is not None])


def test_stopped_after_any_step_it_goes_on_to_the_same_frames(pipeline, tmp_path):
    whole = pipeline.generate(LONG)
    total = len(list(pipeline.stream(LONG)))
    for count in range(1, total + 1):
        folder = tmp_path / str(count)
        stream = pipeline.stream(LONG, resume=folder)
        for _ in range(count):
            next(stream)
        stream.close()
        again = list(pipeline.stream(LONG, resume=folder))
        assert torch.equal(frames_of(again), whole.frames)
        assert again[-1].receipt == whole.receipt
        assert len(again) <= total


def test_finished_windows_are_not_made_again(pipeline, tmp_path):
    list(pipeline.stream(LONG, resume=tmp_path / "a"))
    again = [
        step for step in pipeline.stream(LONG, resume=tmp_path / "a") if step.phase == "denoise"
    ]
    assert len(again) == len(pipeline.plan(LONG).windows)


def test_another_request_is_refused_and_nothing_is_lost(pipeline, tmp_path):
    list(pipeline.stream(LONG, resume=tmp_path / "a"))
    before = {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    with pytest.raises(
        RequestError,
        match="belongs to another video: its `prompt` is 'a red cat on the beach', not 'a dog'",
    ):
        pipeline.stream(replace(LONG, prompt="a dog"), resume=tmp_path / "a")
    with pytest.raises(RequestError, match=r"its `seconds` is 2\.5, not 3\.0"):
        pipeline.stream(replace(LONG, seconds=3), resume=tmp_path / "a")
    assert {path: path.read_bytes() for path in (tmp_path / "a").rglob("*.*")} == before
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("keep me")
    with pytest.raises(RequestError, match="holds other files"):
        pipeline.stream(LONG, resume=tmp_path / "b")


def test_a_damaged_window_is_made_again(pipeline, tmp_path):
    list(pipeline.stream(LONG, resume=tmp_path / "a"))
    hurt = sorted((tmp_path / "a").rglob("window-*"))[1]
    hurt.write_bytes(hurt.read_bytes()[:-7])
    steps = list(pipeline.stream(LONG, resume=tmp_path / "a"))
    assert torch.equal(frames_of(steps), pipeline.generate(LONG).frames)


def test_clearing_leaves_what_others_put_there(tmp_path, pipeline):
    list(pipeline.stream(LONG, resume=tmp_path / "a"))
    (tmp_path / "a" / "mine.txt").write_text("keep me")
    clear(tmp_path / "a")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("every", [0.0, 3600.0])
def test_a_finished_step_is_not_made_again(pipeline, tmp_path, monkeypatch, every):
    calls = []
    velocity = Denoiser.velocity
    monkeypatch.setattr(Denoiser, "velocity", lambda *given: calls.append(1) or velocity(*given))
    total = len(pipeline.plan(LONG).windows) * LONG.num_steps
    while True:
        stream = pipeline.stream(LONG, resume=tmp_path / "a", save_every=every)
        before = len(calls)
        frames = []
        for step in stream:
            frames += [] if step.frames is None else [step.frames]
            if len(calls) > before:
                break  # after every single step that it makes
        else:
            break
        stream.close()
    assert len(calls) == total
    assert torch.equal(torch.cat(frames), pipeline.generate(LONG).frames)


def test_known_frames_survive_a_stop_inside_a_window(pipeline, tmp_path):
    Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / "first.png")
    request = replace(LONG, image=str(tmp_path / "first.png"))
    stream = pipeline.stream(request, resume=tmp_path / "a")
    for _ in range(3):
        next(stream)
    stream.close()
    assert torch.equal(
        frames_of(pipeline.stream(request, resume=tmp_path / "a")),
        pipeline.generate(request).frames,
    )


def state(store, kind):
    """A store with one state of a kind, and that state's file."""
    latent = torch.arange(24.0).reshape(1, 2, 3, 2, 2)
    if kind == "window":
        store.save(0, FinishedWindow(latent, 2, ({"score": 1.5},)))
    else:
        store.save_step(0, 1, 3, [latent])
    return next(store.folder.glob(f"{kind}-*.state"))


def read(store, kind):
    return store.load(0) if kind == "window" else store.load_step(0, 1)


@pytest.mark.parametrize("kind", ["window", "step"])
def test_every_flipped_bit_and_every_cut_is_seen(tmp_path, kind):
    store = WindowStore(tmp_path, {"prompt": "a cat"})
    path = state(store, kind)
    sound = path.read_bytes()
    assert read(store, kind) is not None
    for position in range(len(sound)):
        path.write_bytes(
            sound[:position]
            + bytes([sound[position] ^ (1 << position % 8)])
            + sound[position + 1 :]
        )
        assert read(store, kind) is None, position
    for length in range(0, len(sound), 7):
        path.write_bytes(sound[:length])
        assert read(store, kind) is None, length
    path.write_bytes(sound + b"x")
    assert read(store, kind) is None
    path.write_bytes(sound)
    assert read(store, kind) is not None


def test_a_damaged_step_falls_back_to_the_one_before(tmp_path):
    store = WindowStore(tmp_path, {"prompt": "a cat"})
    latents = [torch.full((1, 2, 3, 2, 2), float(number)) for number in range(4)]
    for done, latent in enumerate(latents[1:], start=1):
        store.save_step(5, 0, done, [latent])
    assert [path.name for path in sorted(tmp_path.glob("step-*"))] == [
        f"step-000005-000-000{done}.state" for done in (2, 3)
    ]
    last = tmp_path / "step-000005-000-0003.state"
    last.write_bytes(last.read_bytes()[:-1])
    done, (latent,) = store.load_step(5, 0)
    assert (done, latent.unique().tolist()) == (2, [2.0])
    store.save(5, FinishedWindow(latents[0]))
    assert not list(tmp_path.glob("step-*"))


def test_the_state_of_a_multistep_solver_comes_back_in_its_order(tmp_path):
    store = WindowStore(tmp_path, {"prompt": "a cat"})
    state = [torch.full((1, 2, 3, 2, 2), float(number)) for number in range(4)]
    store.save_step(0, 0, 1, state[:3])
    assert [float(one.mean()) for one in store.load_step(0, 0)[1]] == [0, 1, 2]
    store.save_step(0, 0, 2, state)
    done, loaded = store.load_step(0, 0)
    assert done == 2
    assert all(map(torch.equal, loaded, state))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_together_is_what_is_needed(tmp_path):
    store = WindowStore(tmp_path, {"prompt": "a cat"}, interval=3600.0)
    for done in (1, 2, 3):
        store.save_step(0, 0, done, [torch.full((1, 2, 3, 2, 2), float(done))])
    store.save_step(0, 1, 1, [torch.zeros(1, 2, 3, 2, 2)])
    assert names(tmp_path) == ["asked.json"]
    store.flush()
    assert names(tmp_path) == [
        "asked.json",
        "step-000000-000-0003.state",
        "step-000000-001-0001.state",
    ]
    store.save(0, FinishedWindow(torch.ones(1, 2, 3, 2, 2)))
    store.save_step(1, 0, 1, [torch.zeros(1, 2, 3, 2, 2)])
    store.flush()
    assert names(tmp_path) == ["asked.json", "step-000001-000-0001.state", "window-000000.state"]


def test_states_of_other_places_and_other_requests_are_not_taken(tmp_path):
    ours, theirs = (WindowStore(tmp_path / name, {"prompt": name}) for name in ("a", "b"))
    path = state(ours, "window")
    (ours.folder / "window-000001.state").write_bytes(path.read_bytes())
    (theirs.folder / path.name).write_bytes(path.read_bytes())
    assert ours.load(0) is not None
    assert ours.load(1) is None
    assert theirs.load(0) is None


def test_a_damaged_identity_file_is_refused(tmp_path):
    request = {"prompt": "a cat", "request": {"seed": 7}}
    WindowStore(tmp_path, request)
    path = tmp_path / "asked.json"
    sound = path.read_bytes()
    for position in range(len(sound)):
        path.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        with pytest.raises(RequestError, match="damaged"):
            WindowStore(tmp_path, request)
    path.write_bytes(sound)
    WindowStore(tmp_path, request)


def test_a_full_disk_is_reported_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    store = WindowStore(tmp_path, {"prompt": "a cat"})

    def refuse(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("skyloom.core.files.os.fsync", refuse)
    with pytest.raises(CapacityError, match="disk is full"):
        store.save_step(0, 0, 1, [torch.zeros(1, 2, 3, 2, 2)])
    assert [path.name for path in tmp_path.iterdir()] == ["asked.json"]


NURSERY = """
import json, os, signal, sys
from pathlib import Path
import skyloom, skyloom.generate.pipeline, skyloom.generate.latent_store as resume
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.request import Request

def tell(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())

def pause(*words):
    tell(*words)
    os.read(0, 1)  # until the parent lets it go on, or kills it

def child(folder, inside, request):
    velocity, fsync = Denoiser.velocity, os.fsync
    def counted(*given):
        tell("call")
        return velocity(*given)
    def paused_fsync(file):
        pause("write")
        fsync(file)
        pause("write")
    Denoiser.velocity = counted
    if inside:
        os.fsync = paused_fsync
    pipeline = skyloom.load(sys.argv[1], dtype="bfloat16")
    for step in pipeline.stream(Request.from_dict(request), resume=Path(folder), collect=False):
        if step.phase == "denoise" and not inside:
            pause("step")
    tell("done", step.receipt["frames"]["sha256"])

for line in iter(lambda: sys.stdin.readline(), ""):
    if not (number := os.fork()):
        child(*json.loads(line))
        os._exit(0)
    tell("pid", number)
    os.waitpid(number, 0)
    tell("ended")
"""


class Nursery:
    """Processes that generate a video and may be killed at any step.

    They are forked from one that has all modules imported.
    """

    def __init__(self, model):
        words = [sys.executable, "-u", "-c", NURSERY, str(model)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SKYLOOM_CACHE": "off"}
        self.process = subprocess.Popen(
            words, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def run(self, folder, inside, kill_at, request=BEST):
        """Run a child and kill it at its pause `kill_at`.

        Returns the number of network calls, and the digest of the video if it was finished.
        """
        self.process.stdin.write(
            json.dumps([str(folder), inside, request.to_dict()]).encode() + b"\n"
        )
        pid, calls, pauses, digest = None, 0, 0, None
        while True:
            word, *rest = self.process.stdout.readline().split()
            if word == b"pid":
                pid = int(rest[0])
            elif word == b"call":
                calls += 1
            elif word == b"done":
                digest = rest[0].decode()
            elif word == b"ended":
                assert digest or pauses == kill_at, "it ended by itself"
                return calls, digest
            elif pauses == kill_at:
                os.kill(pid, signal.SIGKILL)
            else:
                pauses += 1
                self.process.stdin.write(b".")


@pytest.fixture(scope="module")
def nursery(tiny_model):
    nursery = Nursery(tiny_model)
    yield nursery
    nursery.process.stdin.close()
    nursery.process.wait()
    nursery.process.stdout.close()


def test_killed_after_every_step_no_step_is_made_twice_and_the_frames_are_the_same(
    nursery, pipeline, tmp_path
):
    """SIGKILL after the first new step of every run, until the video is done."""
    lives, calls, digest, finished = 0, 0, None, 0
    while digest is None:
        # windows that were finished in earlier lives tell of themselves once more
        made, digest = nursery.run(tmp_path / "a", False, finished)
        assert made == (0 if digest else 1)
        lives, calls = lives + 1, calls + made
        finished = len(list((tmp_path / "a").rglob("window-*.state")))
    assert (lives - 1, calls) == (8, 8)
    assert digest == pipeline.generate(BEST).receipt["frames"]["sha256"]


def test_an_edit_killed_after_every_step_makes_none_twice_and_the_frames_are_the_same(
    nursery, pipeline, tmp_path
):
    """SIGKILL after every new step of a recut: two spans, one before and one after what is kept."""
    pipeline.generate(BEST).save(tmp_path / "a.mkv")
    edit = Edit("recut", (str(tmp_path / "a.mkv"),), start="0.5", stop="1", seconds="1.5")
    request = Request("a dog on the beach", seed=3, num_steps=2, edit=edit)
    kept, calls, digest, lives = tmp_path / "kept", 0, None, 0
    while digest is None:
        finished = len(list(kept.glob("span-*/window-*.state")))
        made, digest = nursery.run(kept, False, finished, request)
        assert made == (0 if digest else 1)
        lives, calls = lives + 1, calls + made
    assert (lives - 1, calls) == (2 * len(pipeline.plan(request).windows),) * 2
    assert digest == pipeline.generate(request).receipt["frames"]["sha256"]


def test_killed_inside_every_write_the_frames_are_the_same(nursery, pipeline, tmp_path):
    """SIGKILL before and after fsyncs of files and the folder; every run progresses."""
    digest, kill_at = None, 0
    while digest is None:
        _, digest = nursery.run(tmp_path / "a", True, kill_at)
        kill_at += 3  # of the four pauses of a write, each comes up
    assert digest == pipeline.generate(BEST).receipt["frames"]["sha256"]
    assert kill_at > 12
