"""A bundle holds its parts, their training data and the manifest of an earlier model."""

import torch
from safetensors.torch import save_file

from diorama.train.bundle import bundle
from skyloom.models.checkpoint import read_manifest, verify_manifest


def _parts(tmp_path, value: float) -> dict:
    folders = {}
    for name in ("vae", "text", "dit"):
        folder = tmp_path / f"{name}{value:g}"
        folder.mkdir()
        save_file({"weight": torch.full((2, 3), value)}, folder / f"{name}.safetensors")
        folders[name] = folder
    return folders


def test_continued_training_keeps_the_earlier_entries(tmp_path):
    ledger, out = tmp_path / "ledger.sha256", tmp_path / "model"
    ledger.write_text("abc\n")
    bundle(_parts(tmp_path, 1), [], ledger, out, {"name": "small"})
    earlier = {
        **read_manifest(out),
        "data": {"clips": {"count": 7}},
        "training": {"dit": {"steps": 5}, "vae": {"steps": 3}},
    }
    parts = _parts(tmp_path, 2)
    (parts["dit"] / "recipe.toml").write_text("x = 1\n")
    (parts["dit"] / "log.jsonl").write_text('{"kind": "step", "step": 9, "seconds": 60.0}\n')
    bundle(parts, [], ledger, out, {"name": "small"}, earlier)
    manifest = read_manifest(out)
    verify_manifest(out)
    assert manifest["data"] == {"clips": {"count": 7}}
    assert manifest["training"]["vae"] == {"steps": 3}
    assert manifest["training"]["dit"]["steps"] == 9
    assert (manifest["parameters"], manifest["ledger"]) == (6, "abc")
