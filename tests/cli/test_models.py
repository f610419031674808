"""`skyloom pull` and `skyloom models`: what they say, and that only pull reaches the network."""

import hashlib
import json
import os
import socket
import sys
import threading

import pytest
from model_hub import REPOSITORY, Answer, Hub, weights

from skyloom.hub import catalog

CONNECT = socket.socket.connect
SIZES = {"transformer": 20_001, "text_encoder": 20_002, "autoencoder": 20_003}
OTHER_COMMANDS = [
    ("models", "list"),
    ("models", "list", "--available"),
    ("models", "info", "wan2.2-5b"),
    ("models", "info", "wan2.2-5b", "--urls"),
    ("models", "info", "diorama"),
    ("models", "verify"),
    ("models", "check"),
    ("models", "remove", "diorama", "--yes"),
    ("models", "add", "nowhere"),
    ("pull", "wan2.2-5b", "--dry-run"),
    ("pull", "wan2.1-14b", "--dry-run", "--from", "modelscope"),
    ("pull", "unknown"),
    ("plan", "a cat on the beach"),
    ("styles",),
]


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine with the files of a model, and a catalogue with that model."""

    def connect(self, address):
        assert address[0] == "127.0.0.1", f"a test tried to reach {address}"
        return CONNECT(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    hub = Hub()
    threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True).start()
    files = {}
    for seed, (part, size) in enumerate(SIZES.items()):
        content = weights(seed, size)
        hub.put(f"{part}.safetensors", content)
        files[part] = {
            "repository": REPOSITORY,
            "path": f"{part}.safetensors",
            "about_bytes": len(content),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    licence = {"title": "Research", "url": "https://l.example", "acceptance": True}
    model = {
        "family": "diorama",
        "variant": "small",
        "description": "A small model.",
        "licence": "Free-1",
        "source": "https://hub.example/small",
        "parameters": 20_000,
        "gpu_memory_gb": [1, 2],
        "parts": {part: [part] for part in SIZES},
    }
    licences = {
        "Research-1": {**licence, "conditions": ["Research only."]},
        "Free-1": {**licence, "acceptance": False, "conditions": ["Keep the notices."]},
    }
    models = {"small": model, "bound": {**model, "licence": "Research-1"}}
    path = tmp_path / "catalog.json"
    path.write_text(json.dumps({"licences": licences, "files": files, "models": models}))
    monkeypatch.setattr(catalog, "CATALOG_FILE", path)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def terminal(monkeypatch):
    """Answers questions: `terminal("y")`."""

    def answer(*lines: str) -> None:
        answers = iter(lines)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        monkeypatch.setattr("typer.confirm", lambda text, default: next(answers) == "y")
        monkeypatch.setattr("typer.prompt", lambda text: next(answers))

    return answer


def test_a_pull_says_everything_before_the_first_byte(skyloom, hub):
    ran = skyloom("pull", "small")
    assert (ran.code, hub.gets("Range")) == (2, [])
    assert "yes must be given where nobody can answer" in ran.err
    for words in (
        "licence: Research (Free-1), https://l.example",
        "Keep the notices.",
        "GPU memory: 1 GB",
        "model page: https://hub.example/small",
        "transformer: transformer.safetensors",
        f"0.0 MB from 127.0.0.1/{REPOSITORY} @cccccccccccc",
        "0.1 MB to fetch into",
        "GB free",
    ):
        assert words in ran.out


def test_a_pulled_model_is_listed_described_verified_and_removed(skyloom, hub):
    ran = skyloom("pull", "small", "--yes", "--limit", "100M")
    assert (ran.code, ran.err.count("100 % of")) == (0, 3)
    assert "small is ready in" in ran.out
    assert "\nsmall " in skyloom("models", "list").out
    assert "* small" in skyloom("models", "list", "--available").out
    assert "installed in" in skyloom("models", "info", "small").out
    assert skyloom("models", "show", "small").out == skyloom("models", "info", "small").out
    assert "3 files match their hashes" in skyloom("models", "verify", "small").out
    again = skyloom("models", "pull", "small")
    assert again.code == 0
    assert "Nothing to fetch" in again.out
    assert again.out.count("(SHA-256 equal); used in place") == 3
    kept = skyloom("models", "remove", "small")
    assert kept.code == 2
    removed = skyloom("models", "remove", "small", "--yes")
    assert removed.out.count("delete ") == 4
    assert "Removed small; 0.1 MB are free again." in removed.out
    assert skyloom("models", "verify", "small").code == 2


def test_questions_are_answered(skyloom, hub, terminal):
    terminal("n")
    ran = skyloom("pull", "small")
    assert (ran.code, hub.gets("Range")) == (2, [])
    assert "nothing was fetched" in ran.err
    terminal("y")
    assert skyloom("pull", "small").code == 0
    terminal("n")
    assert "nothing was deleted" in skyloom("models", "remove", "small").err
    terminal("y")
    assert skyloom("models", "remove", "small").code == 0


def test_a_licence_is_accepted_in_words(skyloom, hub, terminal):
    ran = skyloom("pull", "bound", "--yes")
    assert (ran.code, hub.gets("Range")) == (2, [])
    assert "then add: --accept-licence Research-1." in ran.err
    assert "You have to accept it" in ran.out
    assert skyloom("pull", "bound", "--yes", "--accept-licence", "MIT").code == 2
    terminal("yes")
    assert "was not accepted" in skyloom("pull", "bound", "--yes").err
    terminal("Research-1", "y")
    assert skyloom("pull", "bound").code == 0
    acceptance = json.loads(_manifest("bound"))["licence_acceptance"]
    assert (acceptance["how"], acceptance["licence"]) == ("typed", "Research-1")
    skyloom("models", "remove", "bound", "--yes")
    assert skyloom("pull", "bound", "--yes", "--accept-licence", "Research-1").code == 0
    assert json.loads(_manifest("bound"))["licence_acceptance"]["how"] == "--accept-licence"


def _manifest(name: str) -> str:
    from skyloom.core.paths import models_folder

    return (models_folder() / name / "manifest.json").read_text()


def test_a_gated_repository_has_its_own_exit_code(skyloom, hub):
    hub.always = Answer(status=403)
    ran = skyloom("pull", "small", "--yes")
    assert ran.code == 3
    assert f"Accept them at {hub.url}/{REPOSITORY}, set HF_TOKEN" in ran.err
    hub.always = Answer(status=404)
    assert skyloom("pull", "small", "--yes").code == 1


def test_files_are_added_by_path(skyloom, hub, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    for part in SIZES:
        content = hub.files[f"/{REPOSITORY}/resolve/main/{part}.safetensors"]
        (folder / f"{part}.safetensors").write_bytes(content)
    table = json.loads(catalog.CATALOG_FILE.read_text())
    del table["models"]["bound"]
    catalog.CATALOG_FILE.write_text(json.dumps(table))
    ran = skyloom("models", "add", folder, "--name", "mine")
    assert "Added mine: family diorama, variant small." in ran.out
    assert ran.out.count("(its hash is the catalogue's)") == 3
    assert hub.requests == []
    (folder / "transformer.safetensors").unlink()
    assert "1 FILES ARE MISSING" in skyloom("models", "list").out
    broken = skyloom("models", "verify", "mine")
    assert "Run: skyloom models add FOLDER --name mine." in broken.err


@pytest.mark.parametrize("limit", ["fast", "0", "-1M", "20MB/s"])
def test_a_limit_is_a_rate(skyloom, limit):
    ran = skyloom("pull", "wan2.2-5b", "--limit", limit)
    assert ran.code == 2
    assert "limit must be bytes per second such as 20M" in ran.err


def test_check_prints_twelve_numbers_that_repeat(skyloom, tiny_model):
    ran = skyloom("models", "check", tiny_model, "--device", "cpu")
    numbers = [float(word) for line in ran.out.splitlines()[2:] for word in line.split()[1:]]
    assert len(numbers) == 12
    assert ran.out == skyloom("models", "check", tiny_model, "--device", "cpu").out
    assert len(set(numbers)) > 9


def test_check_prints_the_effect_of_loras(skyloom, tiny_model, tmp_path):
    import torch
    from safetensors.torch import save_file

    import skyloom as package

    transformer = package.load(str(tiny_model), device="cpu").transformer
    bias = torch.ones_like(transformer.head.bias)
    save_file({"head.diff_b": bias}, tmp_path / "bright.safetensors")
    save_file({"head.diff_b": 0 * bias}, tmp_path / "idle.safetensors")
    words = ["models", "check", tiny_model, "--device", "cpu", "--lora"]
    ran = skyloom(*words, tmp_path / "bright.safetensors")
    assert ran.code == 0
    assert float(ran.out.split("moves by ")[1].split(" %")[0]) > 1
    ran = skyloom(*words, tmp_path / "idle.safetensors")
    assert ran.code == 2
    assert "moves by 0 %" in ran.out
    assert "changes nothing" in ran.err


def test_a_broken_manifest_of_a_pulled_model_is_reported(skyloom, hub):
    skyloom("pull", "small", "--yes")
    from skyloom.core.paths import models_folder

    (models_folder() / "small" / "manifest.json").write_text("{")
    ran = skyloom("models", "list")
    assert ran.code == 0
    assert "Not usable:" in ran.err
    assert "diorama" in ran.out


@pytest.mark.parametrize("words", OTHER_COMMANDS, ids=" ".join)
def test_only_pull_uses_the_network(skyloom, monkeypatch, words):
    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "__init__", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ran = skyloom(*words)
    assert "a socket was opened" not in ran.err
    assert ran.code in (0, 2)
    assert ran.out or ran.code == 2
