"""Pulling a model: what is reused, what is fetched, what the manifest says."""

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from model_hub import COMMIT, REPOSITORY

from skyloom.core.errors import CheckpointError, DiskFullError, DownloadError
from skyloom.core.paths import models_folder
from skyloom.hub import pull as pull_module
from skyloom.hub.library import lock_library
from skyloom.hub.local_files import files_folder, read_extra_paths
from skyloom.hub.pull import carry_out, make_plan, read_pins
from skyloom.hub.sources import Source, find_source, read_token
from skyloom.models import detect
from skyloom.models.checkpoint import verify_manifest
from skyloom.models.registry import estimate_memory, find_model, find_models, list_models


def pull(transfer, small, **options) -> Path:
    """Plan and carry out; return the folder."""
    plan = make_plan(small["model"], transfer.source, transfer=transfer, **options)
    return carry_out(plan, transfer)


def test_a_pulled_model_is_found_with_all_its_files(transfer, hub, small):
    folder = pull(transfer, small)
    info = find_model("small")
    assert info.folder == folder == models_folder() / "small"
    assert "small" in {model.name for model in list_models()} & set(find_models([]))
    manifest = verify_manifest(folder)
    assert set(manifest["parts"]) == {"transformer", "text_encoder", "tokenizer", "autoencoder"}
    assert manifest["parts"]["tokenizer"] == manifest["parts"]["text_encoder"]
    for part in ("transformer", "text_encoder", "autoencoder"):
        (row,) = manifest["parts"][part]
        assert (folder / row["path"]).read_bytes() == small[part]
        assert not Path(row["path"]).is_absolute()
        assert row["bytes"] == len(small[part])
        assert row["revision"] == COMMIT
    assert manifest["licence_acceptance"]["how"] == "not required"
    assert estimate_memory(info) == round(
        1.5 * sum(len(small[part]) for part in ("transformer", "text_encoder", "autoencoder"))
    )


def test_what_the_catalogue_lacks_is_pinned(transfer, hub, small):
    pull(transfer, small)
    pin = read_pins()["autoencoder"]
    assert (pin["bytes"], pin["revision"]) == (len(small["autoencoder"]), COMMIT)
    for path in files_folder().iterdir():
        path.unlink()
    hub.put("autoencoder.safetensors", small["transformer"])
    with pytest.raises(DownloadError, match="is another file"):
        pull(transfer, small)


def test_a_second_pull_fetches_nothing(transfer, hub, small):
    pull(transfer, small)
    count = len(hub.requests)
    plan = make_plan(small["model"], transfer.source)
    assert plan.missing == 0
    carry_out(plan, transfer)
    assert len(hub.requests) == count


def test_a_damaged_file_is_fetched_again(transfer, hub, small):
    folder = pull(transfer, small)
    damaged = files_folder() / "transformer.safetensors"
    damaged.write_bytes(small["transformer"][:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"is corrupt.*Run: skyloom pull small"):
        verify_manifest(folder)
    pull(transfer, small)
    verify_manifest(folder)


def test_a_moved_folder_of_models_still_works(transfer, small, monkeypatch):
    pull(transfer, small)
    moved = models_folder().rename(models_folder().with_name("moved"))
    assert not {"small"} & set(find_models([]))
    monkeypatch.setenv("SKYLOOM_MODEL_PATH", os.pathsep.join(["/nowhere", str(moved)]))
    assert verify_manifest(find_model("small").folder)["name"] == "small"


def test_an_unreadable_model_of_another_folder_does_not_disturb(transfer, small):
    pull(transfer, small)
    other = models_folder() / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "other", "family": "unheard of"}')
    assert "small" in {model.name for model in list_models()}
    with pytest.raises(CheckpointError, match="family must be one of"):
        find_model("other")


def put_in_hub_cache(root: Path, name: str, content: bytes, sha256: str) -> Path:
    """Lay a file into a hub's cache as its own program does."""
    folder = root / f"models--{REPOSITORY.replace('/', '--')}"
    blob = folder / "blobs" / sha256
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(content)
    link = folder / "snapshots" / COMMIT / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(blob)
    return link


def test_the_hub_cache_is_used_without_reading(small, transfer, own_home, monkeypatch):
    transformer = small["model"].parts["transformer"][0]
    link = put_in_hub_cache(
        own_home / ".cache/huggingface/hub",
        transformer.path,
        small["transformer"],
        transformer.sha256,
    )
    monkeypatch.setattr("skyloom.core.hash_cache.sha256_file", lambda path: pytest.fail("read"))
    plan = make_plan(small["model"], transfer.source)
    assert [one.local for one in plan.files] == [link, None, None]


@pytest.mark.parametrize(
    "place",
    ["ComfyUI/models/diffusion_models", "own/models/unet", "elsewhere/weights", "Wan2GP/ckpts"],
)
def test_files_of_other_programs_are_used_in_place(small, transfer, own_home, monkeypatch, place):
    monkeypatch.setenv("COMFYUI_PATH", str(own_home / "own"))
    (own_home / "own").mkdir()
    (own_home / "own/extra_model_paths.yaml").write_text(
        f"comfyui:\n    base_path: {own_home}/elsewhere\n    diffusion_models: weights\n"
    )
    path = own_home / place / "renamed.safetensors"
    path.parent.mkdir(parents=True)
    path.write_bytes(small["transformer"])
    (path.parent / "same_size.safetensors").write_bytes(bytes(len(small["transformer"])))
    folder = pull(transfer, small)
    manifest = json.loads((folder / "manifest.json").read_text())
    (row,) = manifest["parts"]["transformer"]
    assert (row["path"], row["fetched"]) == (str(path), False)
    assert not (files_folder() / "transformer.safetensors").exists()


def test_extra_paths_are_read(tmp_path):
    path = tmp_path / "extra_model_paths.yaml"
    path.write_text(
        "# comment\nfirst:\n  base_path: /data/  # disk\n  is_default: true\n  vae: models/vae\n"
        "  loras: |\n    a\n    'b c'\nsecond:\n  vae: relative\n"
    )
    assert read_extra_paths(path) == [
        Path("/data/models/vae"),
        Path("/data/a"),
        Path("/data/b c"),
        tmp_path / "relative",
    ]
    assert read_extra_paths(tmp_path / "none") == []


def test_a_folder_as_source_is_used_in_place_and_compared(small, transfer, tmp_path):
    for part in ("transformer", "text_encoder", "autoencoder"):
        (tmp_path / f"{part}.safetensors").write_bytes(small[part])
    source = find_source(str(tmp_path))
    carry_out(make_plan(small["model"], source), transfer)
    assert verify_manifest(find_model("small").folder)
    assert not files_folder().exists()
    (tmp_path / "transformer.safetensors").write_bytes(small["transformer"][:-1] + b"?")
    with pytest.raises(DownloadError, match="is not the file of the catalogue"):
        make_plan(small["model"], source)
    (tmp_path / "transformer.safetensors").unlink()
    with pytest.raises(DownloadError, match="is not in"):
        make_plan(small["model"], source)


def test_too_small_a_disk_is_said_before_the_first_byte(small, transfer, hub, monkeypatch):
    monkeypatch.setattr(pull_module, "_free_disk", lambda folder: 50_000)
    with pytest.raises(DiskFullError, match="set SKYLOOM_MODELS"):
        pull(transfer, small)
    assert not hub.gets("Range")


def test_an_unfinished_download_needs_only_the_rest(small, transfer, hub):
    stop = replace(transfer, progress=lambda *one: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pull(stop, small)
    plan = make_plan(small["model"], transfer.source, transfer=transfer)
    (first, *_) = plan.files
    assert first.started > 0
    assert first.missing == len(small["transformer"]) - first.started
    carry_out(plan, transfer)
    assert verify_manifest(find_model("small").folder)


def test_a_second_pull_waits_and_says_for_whom(small, transfer, hub, recorder):
    waits = threading.Event()

    def notice(text: str) -> None:
        recorder.notices.append(text)
        waits.set()

    other = replace(transfer, notice=notice)
    thread = threading.Thread(target=pull, args=(other, small))
    with lock_library("pull big", recorder.notices.append):
        thread.start()
        assert waits.wait(60)
        assert not hub.gets("Range")
    thread.join(60)
    assert recorder.notices == [
        f"Waiting for `skyloom pull big` (process {os.getpid()}) to end. Ctrl-C stops waiting."
    ]
    assert verify_manifest(find_model("small").folder)


def test_tensors_of_another_model_are_refused(small, transfer, monkeypatch):
    found = detect.DetectedModel("diorama", "small", {}, {"frames": 9})
    monkeypatch.setattr(pull_module, "detect", lambda paths: found)
    pull(transfer, small)
    assert find_model("small").frames == 9
    monkeypatch.setattr(pull_module, "detect", lambda paths: replace(found, variant="large"))
    with pytest.raises(CheckpointError, match="hold diorama large, the catalogue says diorama"):
        pull(transfer, small)


def test_sources(monkeypatch, own_home, tmp_path):
    assert find_source(None).address == "https://huggingface.co"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    assert find_source("hf").address == "https://mirror.example"
    assert find_source("modelscope").token is None
    assert find_source("https://files.example/x/").flat
    assert find_source(str(tmp_path)).folder == tmp_path
    with pytest.raises(Exception, match="from must be hf, modelscope"):
        find_source("nowhere")


def test_addresses(small):
    file = replace(small["model"].parts["transformer"][0], revision=COMMIT)
    assert (
        Source("hf", "https://h").url(file)
        == f"https://h/{REPOSITORY}/resolve/{COMMIT}/{file.path}"
    )
    assert find_source("modelscope").url(file).endswith(f"{REPOSITORY}/resolve/master/{file.path}")
    assert Source("url", "https://h", flat=True).url(file) == "https://h/transformer.safetensors"


def test_tokens(monkeypatch, own_home):
    assert read_token() is None
    stored = own_home / ".cache/huggingface/token"
    stored.parent.mkdir(parents=True)
    stored.write_text("stored\n")
    assert read_token() == "stored"
    monkeypatch.setenv("HF_TOKEN", "given")
    assert read_token() == "given"
    assert find_source("https://files.example").token is None
