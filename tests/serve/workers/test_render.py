"""Queued jobs give the same video as a direct pipeline call, from stored inputs only."""

import json
import os
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from PIL import Image
from random_lora import write_lora

from skyloom.core.errors import RequestError
from skyloom.core.files import sha256_file
from skyloom.generate.denoiser import Denoiser
from skyloom.generate.pipeline import load
from skyloom.generate.request import Request
from skyloom.media.source import open_source
from skyloom.media.write import write_video
from skyloom.safety.verify import check
from skyloom.serve.api.response_models import VideoResponse
from skyloom.serve.queue.capabilities import Capabilities
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.jobs import Job, JobStore
from skyloom.serve.queue.leases import Leases
from skyloom.serve.settings import Settings
from skyloom.serve.storage import Asset, FolderStorage
from skyloom.serve.workers.pipelines import PipelineCache
from skyloom.serve.workers.render import PipelineRenderer, seed_of
from skyloom.serve.workers.worker import Worker


@pytest.fixture
def host(tmp_path, tiny_model, monkeypatch) -> Iterator[tuple[JobStore, FolderStorage, Worker]]:
    """A queue, a storage and a worker with the tiny model in its runs folder."""
    settings = Settings(data=tmp_path, disk_reserve=0, heartbeat_seconds=0.05)
    store, storage = (
        JobStore(Database(settings.database), settings),
        FolderStorage(tmp_path / "assets"),
    )
    monkeypatch.chdir(tmp_path)
    yield store, storage, worker_of(store, storage, settings, tiny_model)
    store.database.close()


def worker_of(store: JobStore, storage: FolderStorage, settings: Settings, model: Path) -> Worker:
    """A worker on the CPU; changes this process's working directory as the command does."""
    settings.runs.mkdir(parents=True)
    os.chdir(settings.runs)
    render = PipelineRenderer(storage, "cpu")
    return Worker(
        Leases(store.database, settings),
        storage,
        render,
        settings,
        name="w",
        device="cpu",
        capabilities=Capabilities({str(model): 0}),
    )


def make(host, request: dict, model: Path) -> Job:
    """Submit a job and run it to its end."""
    store, _, worker = host
    job = store.submit({"prompt": "a cat", "model": str(model), **request}, owner="ada")
    worker.run(until_empty=True)
    return store.get(job.id)


def test_a_job_has_the_frames_of_a_direct_pipeline_call(host, tiny_model, tmp_path):
    job = make(host, {}, tiny_model)
    assert job.status == "completed", job.error
    plain = load(str(tiny_model), device="cpu").generate(Request("a cat", seed=seed_of(job.id)))
    assert job.result.receipt["frames"] == plain.receipt["frames"]
    files = {
        name: host[1].fetch(
            Asset.parse(reference), tmp_path / f"{name}.{Asset.parse(reference).suffix}"
        )
        for name, reference in job.result.assets.items()
    }
    assert open_source(files["video"]).frames == len(plain.frames)
    assert all(check(path).credentials is not None for path in files.values())
    with Image.open(files["thumbnail"]) as picture:
        assert (picture.format, picture.size) == ("WEBP", (32, 32))
    with Image.open(files["spritesheet"]) as sheet:
        assert sheet.format == "JPEG"
        assert sheet.size == (5 * 32, 4 * 32)


def test_progress_follows_steps_and_never_decreases(host, tiny_model):
    _, _, worker = host
    job = host[0].submit({"prompt": "a cat", "model": str(tiny_model), "seed": 1}, owner="ada")
    folder = worker.settings.runs / job.id
    (folder / "output").mkdir(parents=True)
    percents = [step.percent for step in worker.renderer(job, folder, output=folder / "output")]
    assert percents == sorted(percents)
    assert percents[0] == 1
    assert percents[-1] == 99
    assert len(set(percents)) > 3


def test_a_resumed_job_has_the_same_frames(host, tiny_model):
    store, _, worker = host
    request = {"seed": 5, "seconds": 3.0}
    whole = make(host, request, tiny_model)
    job = store.submit({"prompt": "a cat", "model": str(tiny_model), **request}, owner="ada")
    render, stops = worker.renderer, []

    def stopped_once(job, folder, *, output):
        for step in render(job, folder, output=output):
            if step.phase == "decode" and not stops:
                stops.append(store.pause(job.id))
                time.sleep(0.3)  # long enough for a heartbeat
            yield step

    worker.renderer = stopped_once
    worker.run(until_empty=True)
    paused = store.get(job.id)
    assert paused.status == "paused"
    assert paused.checkpoint
    store.resume(job.id)
    worker.run(until_empty=True)
    done = store.get(job.id)
    assert done.result.receipt == whole.result.receipt


def test_a_job_can_request_retakes(host, tiny_model):
    job = make(host, {"retakes": 1, "seconds": 1.5}, tiny_model)
    assert job.status == "completed", job.error
    assert "critic" in job.result.receipt["notes"]


def test_a_first_frame_is_fetched_from_the_storage(host, tiny_model, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    reference = host[1].put(tmp_path / "red.png", "png").reference
    job = make(host, {"image": reference}, tiny_model)
    assert job.status == "completed", job.error
    assert str(tmp_path) not in str(job.result.receipt)


@pytest.mark.parametrize("path", ["/etc/passwd", "red.png", "asset:x", "https://example.org/a.png"])
def test_media_outside_the_storage_are_refused(host, tiny_model, path: str):
    job = make(host, {"image": path}, tiny_model)
    assert (job.status, job.error.code) == ("failed", RequestError.code)


def test_an_invalid_request_fails_with_its_message(host, tiny_model):
    job = make(host, {"size": "31x31"}, tiny_model)
    assert (job.status, job.error.code) == ("failed", "request")
    assert "31x31" in job.error.message


def test_a_stored_video_can_be_edited(host, tiny_model):
    source = make(host, {"seed": 3}, tiny_model).result.assets["video"]
    job = make(
        host,
        {"seed": 4, "edit": {"verb": "extend", "videos": [source], "seconds": "0.5"}},
        tiny_model,
    )
    assert job.status == "completed", job.error
    assert job.result.receipt["frames"]["shape"][0] > 17


def wait_for(holds, seconds: float = 120.0) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("state", ["step-", "window-", "span-001/"])
def test_an_edit_resumes_on_another_host_from_the_stored_checkpoint(
    host, tiny_model, tmp_path, monkeypatch, state
):
    """The worker dies in a step after such a state was stored; the other host has no files."""
    monkeypatch.setenv("SKYLOOM_CACHE", "off")
    monkeypatch.setattr("skyloom.serve.workers.render._SAVE_SECONDS", 0.0)
    calls, velocity = [], Denoiser.velocity
    monkeypatch.setattr(Denoiser, "velocity", lambda *given: calls.append(1) or velocity(*given))
    beats, beat = [], Leases.heartbeat
    monkeypatch.setattr(
        Leases, "heartbeat", lambda *given, **more: (beat(*given, **more), beats.append(1))[0]
    )
    store, storage, worker = host
    source = make(host, {"seed": 3}, tiny_model).result.assets["video"]
    edit = {"verb": "recut", "videos": [source], "start": "0.25", "stop": "0.75", "seconds": "1.5"}
    request = {"prompt": "a dog", "model": str(tiny_model), "seed": 4, "num_steps": 2, "edit": edit}
    calls.clear()
    whole = make(host, request, tiny_model)
    assert whole.status == "completed", whole.error
    once = len(calls)
    job = store.submit(request, owner="ada")
    render = worker.renderer

    def dying(job, folder, *, output):
        for step in render(job, folder, output=output):
            checkpoint = store.get(job.id).checkpoint
            if any(state in name and name.endswith(".state") for name in checkpoint):
                raise SystemExit
            enough = len(beats) + 2  # heartbeats, so that this step is stored too
            wait_for(lambda enough=enough: len(beats) >= enough)
            yield step

    worker.renderer = dying
    with pytest.raises(SystemExit):
        worker.work_one()
    worker.leases.requeue_worker_jobs("w")
    kept = store.get(job.id).checkpoint
    assert "span-000/asked.json" in kept
    settings = Settings(
        data=tmp_path / "there", database_url=worker.settings.database, disk_reserve=0
    )
    other, calls[:] = worker_of(store, storage, settings, tiny_model), []
    other.run(until_empty=True)
    done = store.get(job.id)
    assert done.status == "completed", done.error
    assert done.result.receipt["frames"] == whole.result.receipt["frames"]
    assert len(calls) == once - stored_steps(kept, 2)


def stored_steps(kept, steps: int) -> int:
    """Number of network steps that a checkpoint saves."""
    done = {}
    for name in kept:
        folder, _, file = name.rpartition("/")
        if file.startswith("window-"):
            done[folder, file[7:13]] = steps
        elif file.startswith("step-"):
            done.setdefault((folder, file[5:11]), int(file[16:20]))
    return sum(done.values())


def test_the_seed_of_a_job_depends_on_its_id_only():
    assert seed_of("video_a") == seed_of("video_a") != seed_of("video_b")
    assert 0 <= seed_of("video_a") < 2**31


def test_a_refused_job_fails_with_its_rule_and_keeps_no_files(host, tiny_model, classifier, caplog):
    store, _, worker = host
    classifier.allowed = 1
    job = make(host, {"seconds": 3.0}, tiny_model)
    assert (job.status, job.error.code, job.error.rule, job.error.target) == (
        *("failed", "moderation_blocked"),
        *("own", "output"),
    )
    assert job.error.message.startswith("Refused by the rule own, for the video at 1 s: Not here.")
    assert (job.result, job.checkpoint, job.attempts) == (None, {}, 1)
    assert not (worker.settings.runs / job.id).exists()
    assert store.refusals() == {("own", "output", "moderation_blocked"): 1}
    assert not store.referenced_assets()
    refused = next(record for record in caplog.records if record.message == "job refused")
    assert (refused.rule, refused.exc_info) == ("own", None)


@pytest.mark.parametrize("field", ["input_reference", "storyboard[1].image", "video"])
def test_input_media_are_moderated_first_and_named_by_field(
    host, tiny_model, classifier, tmp_path, field
):
    classifier.allowed = 100
    if field == "video":
        source = make(host, {"seed": 3}, tiny_model).result.assets["video"]
        request = {"edit": {"verb": "extend", "videos": [source], "seconds": "0.5"}}
    else:
        Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
        picture = host[1].put(tmp_path / "red.png", "png").reference
        cards = [{"at": "0", "prompt": "a cat"}, {"at": "0.5", "prompt": "a dog", "image": picture}]
        request = (
            {"image": picture} if field == "input_reference" else {"prompt": "", "cards": cards}
        )
    classifier.allowed = 0
    classifier.seen.clear()
    job = make(host, request, tiny_model)
    assert (job.error.code, job.error.target, len(classifier.seen)) == (
        "moderation_blocked",
        "input",
        1,
    )
    assert f"for {field} at 0 s" in job.error.message


def test_a_failing_classifier_fails_the_job_with_moderation_failed(
    host, tiny_model, classifier, monkeypatch
):
    monkeypatch.setattr(classifier, "classify", lambda frames: {})
    job = make(host, {}, tiny_model)
    assert (job.status, job.error.code, job.error.rule) == ("failed", "moderation_failed", "own")
    assert host[0].refusals() == {("own", "output", "moderation_failed"): 1}


def test_the_receipt_lists_character_descriptions(host, tiny_model):
    store, _, worker = host
    request = {"prompt": "a red cat", "model": str(tiny_model), "seed": 1}
    job = store.submit(request, owner="ada", metadata={"described": {"Mossy": "red cat"}})
    worker.run(until_empty=True)
    assert store.get(job.id).result.receipt["notes"]["characters"] == {"Mossy": "red cat"}


def test_a_job_has_the_loras_of_the_settings_and_no_other(host, tiny_model, tmp_path):
    _, storage, worker = host
    direct = load(str(tiny_model), device="cpu")
    file = write_lora(tmp_path / "felt.safetensors", direct)
    pipelines = PipelineCache("cpu", {}, loras={"felt": str(file)})
    worker.renderer = PipelineRenderer(storage, "cpu", pipelines)
    worker.capabilities = Capabilities({str(tiny_model): 0}, ("felt", str(file)))
    job = make(host, {"seed": 1, "loras": [{"name": "felt", "weight": 0.5}]}, tiny_model)
    assert job.status == "completed", job.error
    expected = direct.generate(Request("a cat", seed=1, loras=[f"{file}:0.5"]))
    assert job.result.receipt["frames"] == expected.receipt["frames"]
    recorded = {"name": "felt", "weight": 0.5, "sha256": sha256_file(file)}
    assert job.result.receipt["loras"] == [recorded]
    assert not leaks(json.dumps(job.result.receipt), worker)
    other = make(host, {"loras": [{"name": str(file)}]}, tiny_model)
    assert (other.status, other.result) == ("failed", None)
    assert "loras must name files that exist" in other.error.message


def leaks(text: str, worker: Worker) -> list[str]:
    """Local paths and names found in a text that clients see."""
    words = [
        str(worker.settings.data),
        "inputs/",
        "/runs",
        "/tmp",
        os.uname().nodename,
        "Traceback",
        str(Path.home()),
    ]
    return [word for word in words if word in text]


@pytest.fixture
def inputs(host, tiny_model, tmp_path) -> dict[str, str]:
    """Stored media: a picture, a mask, a video of another size and rate, and damaged files."""
    storage = host[1]
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 40, 40))
    mask.save(tmp_path / "mask.png")
    write_video(
        torch.randint(0, 255, (20, 64, 64, 3), dtype=torch.uint8),
        Fraction(10),
        tmp_path / "other.mp4",
    )
    damaged = (tmp_path / "other.mp4").read_bytes()[:-300]
    (tmp_path / "damaged.mp4").write_bytes(damaged[:200] + bytes(len(damaged) - 200))
    (tmp_path / "damaged.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    return {
        path.stem + path.suffix: storage.put(path, path.suffix[1:]).reference
        for path in tmp_path.glob("*.???")
    }


REQUESTS = {
    "reference": lambda of: {"image": of["red.png"]},
    "storyboard": lambda of: {
        "prompt": "",
        "cards": [{"at": "0", "prompt": "a"}, {"at": "0.5", "prompt": "b", "image": of["red.png"]}],
    },
    "edit": lambda of: {"edit": {"verb": "extend", "videos": [of["other.mp4"]], "seconds": "0.5"}},
    "mask": lambda of: {
        "edit": {"verb": "inpaint", "videos": [of["other.mp4"]], "mask": of["mask.png"]}
    },
    "stitch": lambda of: {"edit": {"verb": "stitch", "videos": [of["other.mp4"], of["other.mp4"]]}},
    "filter": lambda of: {
        "edit": {"verb": "upscale", "videos": [of["other.mp4"]], "size": "128x128"}
    },
}
FAILING = {
    "damaged reference": lambda of: {"image": of["damaged.png"]},
    "damaged card": lambda of: {
        "prompt": "",
        "cards": [{"at": "0", "prompt": "a", "image": of["damaged.png"], "strength": 0.5}],
    },
    "damaged video": lambda of: {
        "edit": {"verb": "extend", "videos": [of["damaged.mp4"]], "seconds": "0.5"}
    },
    "damaged mask": lambda of: {
        "edit": {"verb": "inpaint", "videos": [of["other.mp4"]], "mask": of["damaged.png"]}
    },
    "missing file": lambda of: {"image": f"asset:{'0' * 64}.png"},
    "strict edit": lambda of: {
        "edit": {"verb": "extend", "videos": [of["other.mp4"]], "seconds": "0.5", "strict": True}
    },
}


@pytest.mark.parametrize("kind", REQUESTS)
def test_receipts_contain_no_local_path(host, inputs, tiny_model, tmp_path, kind):
    job = make(host, REQUESTS[kind](inputs), tiny_model)
    assert job.status == "completed", job.error
    asset = Asset.parse(job.result.assets["video"])
    file = host[1].fetch(asset, tmp_path / f"made.{asset.suffix}")
    inside, kept = json.dumps(open_source(file).receipt), json.dumps(dict(job.result.receipt))
    events = json.dumps([dict(event.data) for event in host[0].events(job=job.id)])
    for text in (inside, kept, events, VideoResponse.from_job(job).model_dump_json()):
        assert not leaks(text, host[2])
    assert inside == kept
    if kind in ("edit", "mask", "stitch"):
        field = "videos[1]" if kind == "stitch" else "video"
        assert any(
            notice.startswith(f"{field}: res") for notice in job.result.receipt["notes"]["notices"]
        )
    names = [Asset.parse(reference).sha256 for reference in inputs.values()]
    assert any(name in json.dumps(job.result.receipt["request"]) for name in names), (
        "the request still identifies its file"
    )


@pytest.mark.parametrize("kind", FAILING)
def test_errors_of_failed_jobs_contain_no_local_path(host, inputs, tiny_model, kind):
    job = make(host, FAILING[kind](inputs), tiny_model)
    assert job.status in ("failed", "queued"), job
    events = json.dumps([dict(event.data) for event in host[0].events(job=job.id)])
    for text in (events, VideoResponse.from_job(job).model_dump_json()):
        assert not leaks(text, host[2])
        assert not any(Asset.parse(reference).sha256 in text for reference in inputs.values())
