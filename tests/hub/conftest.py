"""A model hub on this machine, and a catalogue of small models that it has."""

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from model_hub import REPOSITORY, Hub, Recorder, weights

from skyloom.hub.catalog import load_catalog
from skyloom.hub.download import Transfer
from skyloom.hub.sources import Source, make_client

CONNECT = socket.socket.connect


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Only this machine can be reached."""

    def connect(self, address):
        assert address[0] == "127.0.0.1", f"a test tried to reach {address}"
        return CONNECT(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path_factory) -> Path:
    """A home folder without models, tokens and proxies."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    for name in [
        "HF_TOKEN",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_ENDPOINT",
        "COMFYUI_PATH",
        "WANGP_PATH",
        "SKYLOOM_MODELS",
        "SKYLOOM_MODEL_PATH",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ]:
        monkeypatch.delenv(name, raising=False)
    return home


@pytest.fixture
def start_hub() -> Iterator[Callable[[], Hub]]:
    """Starts hubs on this machine."""
    hubs: list[Hub] = []

    def start() -> Hub:
        hub = Hub()
        threading.Thread(target=hub.server.serve_forever, args=(0.01,), daemon=True).start()
        hubs.append(hub)
        return hub

    yield start
    for hub in hubs:
        hub.server.shutdown()
        hub.server.server_close()


@pytest.fixture
def hub(start_hub) -> Hub:
    """A hub."""
    return start_hub()


@pytest.fixture
def recorder() -> Recorder:
    """The record of this test's transfer."""
    return Recorder()


@pytest.fixture
def transfer(hub, recorder) -> Iterator[Transfer]:
    """A transfer from the hub that does not sleep."""
    with make_client() as client:
        yield Transfer(
            client,
            Source("hf", hub.url),
            sleep=recorder.slept.append,
            notice=recorder.notices.append,
        )


SMALL = {"transformer": 1, "text_encoder": 2, "autoencoder": 3}


@pytest.fixture
def small(hub, monkeypatch, tmp_path_factory):
    """A catalogue of the model `small` with three files, of which the hub has the content.

    The autoencoder's size and hash are not in the catalogue.
    """
    contents = {part: weights(seed, 20_000 + seed) for part, seed in SMALL.items()}
    files = {}
    for part, content in contents.items():
        hub.put(f"{part}.safetensors", content)
        files[part] = {
            "repository": REPOSITORY,
            "path": f"{part}.safetensors",
            "about_bytes": 20_000,
            "bytes": None if part == "autoencoder" else len(content),
            "sha256": None if part == "autoencoder" else hashlib.sha256(content).hexdigest(),
            "dtype": None,
        }
    files["transformer"]["dtype"] = "bf16"
    licences = {
        name: {
            "title": name,
            "url": f"https://licences.example/{name}",
            "acceptance": name == "Research-1",
            "conditions": ["Keep the notices."],
        }
        for name in ("Apache-2.0", "Research-1")
    }
    model = {
        "family": "diorama",
        "variant": "small",
        "description": "A small model.",
        "licence": "Apache-2.0",
        "source": f"https://hub.example/{REPOSITORY}",
        "parameters": 20_000,
        "gpu_memory_gb": [1, 2],
        "parts": {**{part: [part] for part in SMALL}, "tokenizer": "text_encoder"},
    }
    models = {
        "small": model,
        "sibling": {**model, "parts": {**model["parts"], "transformer": ["other"]}},
        "bound": {**model, "licence": "Research-1"},
    }
    hub.put("other.safetensors", contents.setdefault("other", weights(9, 9_000)))
    files["other"] = {**files["autoencoder"], "path": "other.safetensors", "about_bytes": 9_000}
    path = tmp_path_factory.mktemp("catalog") / "catalog.json"
    path.write_text(json.dumps({"licences": licences, "files": files, "models": models}))
    monkeypatch.setattr("skyloom.hub.catalog.CATALOG_FILE", path)
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    contents["model"] = load_catalog().find("small")
    return contents
