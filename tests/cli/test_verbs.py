"""The smaller verbs: models, doctor, train, data, and those that moved."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from skyloom.models import registry
from skyloom.models.diorama.v1.autoencoder import Vae
from skyloom.serve.queue.database import Database
from skyloom.serve.settings import Settings
from skyloom.train.loop import LoopConfig
from skyloom.train.setups import Setup


@pytest.fixture
def shelf(tiny_model, tmp_path, monkeypatch):
    """A folder of installed models with the tiny one in it."""
    folder = tmp_path / "shelf"
    shutil.copytree(tiny_model, folder / "tiny")
    real = registry.list_models
    monkeypatch.setattr(registry, "list_models", lambda root=folder: real(root))
    return folder


def test_models_are_listed_shown_and_verified(skyloom, shelf):
    listed = skyloom("models", "list").out
    assert listed.split()[:2] == ["tiny", "32x32"]
    assert "Apache-2.0" in listed
    assert json.loads(skyloom("models", "show", shelf / "tiny").out)["frames"] == 17
    assert "3 files match their hashes" in skyloom("models", "verify", shelf / "tiny").out


def test_a_damaged_model_is_found(skyloom, shelf):
    with (shelf / "tiny" / "vae.safetensors").open("ab") as file:
        file.write(b"x")
    for words in (["models", "verify", shelf / "tiny"], ["doctor"]):
        ran = skyloom(*words)
        assert ran.code == 1
        assert "vae.safetensors is corrupt" in ran.err


def test_the_doctor_trusts_remembered_hashes_unless_it_reads_all(skyloom, shelf):
    path = shelf / "tiny" / "vae.safetensors"
    os.utime(path, (1e9, 1e9))  # old enough to be remembered
    assert skyloom("doctor").code == 0
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:  # the same inode
        file.write(content)
    os.utime(path, (1e9, 1e9))
    assert "match their published hashes" in skyloom("doctor").out
    ran = skyloom("doctor", "--full")
    assert ran.code == 1
    assert "vae.safetensors is corrupt" in ran.err


def test_the_doctor_reports_the_device_that_is_asked_for(skyloom, shelf):
    ran = skyloom("doctor", "--device", "cpu")
    assert "kernels that run: flash, math" in ran.out
    assert "device     cpu, " in ran.out
    ran = skyloom("doctor", "--device", "vulkan")
    assert ran.code == 2
    assert "The device must be cpu, cuda, cuda:N or mps, got 'vulkan'" in ran.err


def test_the_doctor_says_what_there_is(skyloom, shelf):
    ran = skyloom("doctor")
    assert ran.code == 0
    for word in (
        "skyloom",
        "python",
        "torch",
        "FFmpeg",
        "libavcodec",
        "safe for two writers",
        "device",
        "threads",
    ):
        assert word in ran.out
    for word in ("free disk", "match their published hashes", "differs from fp32 by"):
        assert word in ran.out
    shutil.rmtree(shelf / "tiny")
    assert "no model is installed" in skyloom("doctor").out
    assert "No model is installed" in skyloom("models", "list").err


def test_the_doctor_warns_of_a_machine_that_reckons_wrong(skyloom, shelf, monkeypatch):
    monkeypatch.setattr("skyloom.core.device.choose_dtype", lambda device: torch.float32)
    assert "fp32 by 0 of 255" in skyloom("doctor").out
    assert "WRONG" not in skyloom("doctor").out
    real = Vae.decode
    monkeypatch.setattr("skyloom.core.device.choose_dtype", lambda device: torch.bfloat16)
    monkeypatch.setattr(
        Vae,
        "decode",
        lambda vae, latent: (
            real(vae, latent) + (vae.decoder.stem.weight.dtype == torch.bfloat16) / 2
        ),
    )
    ran = skyloom("doctor")
    assert ran.code == 0
    assert "WRONG" in ran.out


def test_the_doctor_looks_through_the_database(skyloom, shelf, tmp_path):
    assert "not created yet" in skyloom("doctor", "--check-db", "--data", tmp_path / "data").out
    assert not (tmp_path / "data").exists()
    Database(Settings(data=tmp_path).database).close()
    assert "database   no damage found" in skyloom("doctor", "--check-db", "--data", tmp_path).out
    path = tmp_path / "skyloom.db"
    path.write_bytes(path.read_bytes()[:4096] + bytes(path.stat().st_size - 4096))
    ran = skyloom("doctor", "--check-db", "--data", tmp_path)
    assert ran.code == 2
    assert "skyloom restore" in ran.err


def test_without_a_safe_sqlite_the_doctor_says_so(skyloom, shelf, monkeypatch):
    monkeypatch.setattr("skyloom.serve.queue.database._SAFE_SQLITE", (99, 0, 0))
    assert "NOT SAFE" in skyloom("doctor").out


def test_a_recipe_with_an_unknown_key_is_refused(skyloom, tmp_path, monkeypatch):
    setup = Setup(LoopConfig, lambda settings, loop: pytest.fail("not built"))
    monkeypatch.setattr("skyloom.train.recipe.find_setups", lambda: {"small": setup})
    recipe = tmp_path / "r.toml"
    recipe.write_text("[loop]\nstepz = 3\n")
    ran = skyloom("train", "run", recipe, "--run", tmp_path / "run")
    assert ran.code == 2
    assert "unknown key 'stepz'. Did you mean 'steps'?" in ran.err
    assert not (tmp_path / "run").exists()
    ran = skyloom("train", "run", recipe, "--run", "run", "--set", "loop.steps")
    assert "--set must be KEY=VALUE, got 'loop.steps'." in ran.err
    assert skyloom("train", "run", "none.toml", "--run", "run").code == 2


def test_settings_reach_the_recipe(skyloom, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "skyloom.train.recipe.run_recipe",
        lambda path, overrides, folder, resume: (
            seen.append((path.name, overrides, folder.name, resume)) or 3
        ),
    )
    ran = skyloom(
        "train", "run", "r.toml", "--run", "out", "--set", "a=1", "--set", "b.c=x=y", "--resume"
    )
    assert seen == [("r.toml", {"a": "1", "b.c": "x=y"}, "out", True)]
    assert "3 steps done" in ran.out


def test_a_recipe_without_an_installed_setup_is_refused(skyloom, tmp_path, monkeypatch):
    monkeypatch.setattr("skyloom.train.recipe.find_setups", dict)
    (tmp_path / "r.toml").write_text("[loop]\n[optimizer]\n[flow]\n")
    ran = skyloom("train", "run", "r.toml", "--run", "run")
    assert ran.code == 2
    assert "No training setup is installed." in ran.err


@pytest.mark.parametrize(
    "words", [["world"], ["world", "render", "--frames", 5], ["evaluate", "motion", "--json"]]
)
def test_moved_verbs_say_where_they_went(skyloom, words):
    ran = skyloom(*words)
    assert ran.code == 2
    assert f"`skyloom {words[0]}` is now `diorama {words[0]}`" in ran.err
    assert "pip install ./projects/diorama" in ran.err
    assert not ran.out


def test_a_model_encodes_clips_and_captions(skyloom, tiny_model, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    np.save(folder / "clips-00000.npy", np.zeros((2, 5, 32, 32, 3), np.uint8))
    row = {"seed": 0, "captions": {"short": "a cat", "medium": "a red cat", "long": "a dog"}}
    (folder / "clips-00000.json").write_text(json.dumps([row, row]))
    ran = skyloom("data", "encode", folder, "--captions", "table", "--model", tiny_model)
    assert ran.code == 0, ran.err
    assert "1 shards encoded" in ran.out
    assert load_file(folder / "clips-00000.latents.safetensors")["latent"].shape == (2, 4, 2, 2, 2)
    assert load_file(tmp_path / "table")["lengths"].shape == (3,)
