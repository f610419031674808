"""Adding models from files in place, and removing no more than what pull wrote."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from model_hub import weights

from skyloom.core.errors import CheckpointError, RequestError
from skyloom.hub import add as add_module
from skyloom.hub import catalog
from skyloom.hub.add import add_model
from skyloom.hub.catalog import Catalog, load_catalog
from skyloom.hub.library import plan_removal
from skyloom.hub.local_files import files_folder
from skyloom.hub.pull import carry_out, make_plan
from skyloom.models.checkpoint import verify_manifest
from skyloom.models.detect import DetectedModel
from skyloom.models.registry import find_model

PARTS = ("transformer", "text_encoder", "autoencoder")


@pytest.fixture
def folder(small, tmp_path) -> Path:
    """The files of the model `small`, where another program has put them."""
    for part in PARTS:
        path = tmp_path / "theirs" / part / f"{part}.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(small[part])
    return tmp_path / "theirs"


@pytest.fixture
def known(small) -> Catalog:
    """A catalogue that has the hash of every file, without the model's twins."""
    table = json.loads(catalog.CATALOG_FILE.read_text())
    table["files"]["autoencoder"] |= {
        "bytes": len(small["autoencoder"]),
        "sha256": hashlib.sha256(small["autoencoder"]).hexdigest(),
    }
    del table["models"]["bound"], table["models"]["sibling"]
    catalog.CATALOG_FILE.write_text(json.dumps(table))
    return load_catalog()


def test_files_that_the_catalogue_knows_are_added_in_place(folder, known):
    name, found = add_model([folder], known)
    assert name == "small"
    assert set(found.known) == {path for paths in found.parts.values() for path in paths}
    manifest = verify_manifest(find_model("small").folder)
    for part in PARTS:
        (row,) = manifest["parts"][part]
        assert row["path"] == str(folder / part / f"{part}.safetensors")
        assert not row["fetched"]
    assert not files_folder().exists()


def test_a_detected_model_takes_the_settings_of_its_variant(folder, known, monkeypatch):
    parts = {part: (folder / part / f"{part}.safetensors",) for part in PARTS}
    found = DetectedModel("diorama", "own", parts, {"frames": 9, "licence": "Research-1"})
    monkeypatch.setattr(add_module, "detect", lambda paths: found)
    name, _ = add_model([folder], known)
    assert name == "theirs"
    assert (find_model(name).frames, find_model(name).licence) == (9, "Research-1")


def test_an_incomplete_model_says_what_is_missing(folder, known):
    path = folder / "transformer" / "transformer.safetensors"
    with pytest.raises(CheckpointError, match="lacks its text encoder, autoencoder") as caught:
        add_model([path], known)
    assert "`skyloom pull small` uses these files" in caught.value.hint


def test_a_damaged_file_is_named(folder, known):
    path = folder / "transformer" / "transformer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"transformer\.safetensors is damaged"):
        add_model([folder], known)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Wan2.1_VAE.pth", r"never opened\. Use wan_2\.1_vae\.safetensors of huggingface\.co"),
        ("x.ckpt", "never opened. Use the same weights in safetensors"),
    ],
)
def test_pickles_are_refused(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"cos\nsystem\n")
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match=words):
            add_model([path], load_catalog())


def test_what_is_not_a_model_is_refused(tmp_path, tiny_model, known, folder):
    (tmp_path / "empty").mkdir()
    for path, words in (
        (tmp_path / "empty", "path must hold weights"),
        (tmp_path / "none", "path must exist"),
        (tiny_model, "is a model of skyloom already"),
    ):
        with pytest.raises(RequestError, match=words):
            add_model([path], known)
    stranger = tmp_path / "stranger.safetensors"
    stranger.write_bytes(weights(3, 9_000))
    with pytest.raises(CheckpointError, match="No model family of this version knows stranger"):
        add_model([stranger], known)
    stranger.write_bytes(b"x" * 77)
    with pytest.raises(CheckpointError, match="is damaged: its header"):
        add_model([stranger], known)


@pytest.mark.parametrize("name", ["../up", "files", "Big", "a/b"])
def test_names_are_checked(folder, known, name):
    with pytest.raises(RequestError, match="name must be lower-case"):
        add_model([folder], known, name=name)


def test_names_are_used_once(folder, known):
    add_model([folder], known)
    with pytest.raises(RequestError, match="which is installed"):
        add_model([folder], known)
    assert add_model([folder], known, name="again")[0] == "again"


def test_removing_leaves_what_others_use(small, transfer, hub):
    models = load_catalog()
    for name in ("small", "sibling"):
        plan = make_plan(models.find(name), transfer.source, transfer=transfer)
        carry_out(plan, transfer)
    removal = plan_removal("small", models)
    shared = {files_folder() / f"{part}.safetensors" for part in ("text_encoder", "autoencoder")}
    assert removal.kept == dict.fromkeys(shared, "used by sibling")
    removal.carry_out()
    assert verify_manifest(find_model("sibling").folder)
    assert not (files_folder() / "transformer.safetensors").exists()
    plan_removal("sibling", models).carry_out()
    assert not list(files_folder().iterdir())


def test_removing_leaves_files_of_other_programs(folder, known):
    add_model([folder], known)
    removal = plan_removal("small", known)
    assert set(removal.kept.values()) == {"not downloaded by skyloom"}
    removal.carry_out()
    assert {path.name for path in folder.rglob("*.safetensors")} == {
        f"{p}.safetensors" for p in PARTS
    }
    with pytest.raises(RequestError, match="is not installed"):
        find_model("small")


def test_removing_takes_an_unfinished_pull(small, transfer):
    stop = replace(transfer, progress=lambda *one: (_ for _ in ()).throw(KeyboardInterrupt))
    model = load_catalog().find("small")
    with pytest.raises(KeyboardInterrupt):
        carry_out(make_plan(model, transfer.source, transfer=transfer), stop)
    assert list(files_folder().iterdir())
    plan_removal("small", load_catalog()).carry_out()
    assert not list(files_folder().iterdir())


def test_other_folders_are_only_read(small, transfer, monkeypatch):
    carry_out(make_plan(small["model"], transfer.source, transfer=transfer), transfer)
    read_only = find_model("small").folder.parent
    monkeypatch.setenv("SKYLOOM_MODELS", str(read_only.parent / "new"))
    monkeypatch.setenv("SKYLOOM_MODEL_PATH", str(read_only))
    with pytest.raises(RequestError, match="cannot be removed: it lies in"):
        plan_removal("small", load_catalog())
    with pytest.raises(RequestError, match="cannot be removed: it comes with skyloom"):
        plan_removal("diorama", load_catalog())
