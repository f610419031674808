"""What every test may use: one thread, no network, a model in miniature, the command line."""

import importlib
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from skyloom.cli.app import main
from skyloom.models.checkpoint import save_part, write_manifest
from skyloom.models.diorama.config import TextConfig
from skyloom.models.diorama.text_encoder import DioramaTextEncoder, save_text_encoder
from skyloom.models.diorama.v1.autoencoder import Vae, VaeConfig
from skyloom.models.diorama.v1.transformer import Dit, DitConfig

PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "cat",
    "dog",
    "red",
    "on",
    "the",
    "beach",
    "##s",
    "c",
    "##a",
    "##t",
]


@pytest.fixture(autouse=True)
def one_thread():
    """Two cores run two test processes better than one with two threads."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A test that reaches for the network fails."""

    def refuse(self, address):
        raise AssertionError(f"a test tried to reach {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path_factory):
    """What is learned of this machine, and kept on it, stays in the test."""
    monkeypatch.setenv("SKYLOOM_STATE", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setenv("SKYLOOM_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("SKYLOOM_DATA", str(tmp_path_factory.mktemp("data") / "skyloom"))


CLASSIFIER = """
seen, allowed = [], 0
def classify(frames):
    seen.append(frames)
    return {"bad": float(len(seen) > allowed)}
"""


@pytest.fixture
def policy(monkeypatch, tmp_path_factory) -> Callable[[str], Path]:
    """Makes a text the operator's policy file."""

    def write(text: str) -> Path:
        path = tmp_path_factory.mktemp("policy") / "own.toml"
        path.write_text(text)
        monkeypatch.setenv("SKYLOOM_POLICY", str(path))
        return path

    return write


@pytest.fixture
def classifier(policy, monkeypatch, tmp_path_factory) -> ModuleType:
    """A policy's classifier; it records frames in `seen` and rejects those after `allowed`."""
    folder = tmp_path_factory.mktemp("classifier")
    name = f"classifier_of_{folder.name}"
    (folder / f"{name}.py").write_text(CLASSIFIER)
    monkeypatch.syspath_prepend(folder)
    policy(
        f'[[classifiers]]\nname = "own"\ncall = "{name}:classify"\n'
        'thresholds = { bad = 0.5 }\nmessage = "Not here."'
    )
    return importlib.import_module(name)


class Ran(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def skyloom(capsys, monkeypatch, tmp_path) -> Callable[..., Ran]:
    """`skyloom("generate", "a cat")` in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words: object) -> Ran:
        code = 0
        os.umask(mask := os.umask(0))  # verbs of the server narrow it for their process
        try:
            main([str(word) for word in words])
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            os.umask(mask)
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A model folder with every part, random weights and a few thousand numbers."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    text_config = TextConfig(
        vocabulary=len(PIECES),
        width=16,
        layers=1,
        heads=2,
        ffn=32,
        positions=20,
        max_tokens=12,
        lexical=True,
    )
    dit_config = DitConfig(
        in_channels=4,
        out_channels=4,
        width=32,
        heads=2,
        layers=2,
        ffn=64,
        text_width=text_config.context_width,
        pooled_text=True,
        span=True,
        places=True,
        horizon=5,
        detail=8,
        prediction="angular",
    )
    vae_config = VaeConfig(latent_channels=4, decoder_widths=(8, 8, 8, 8))
    text, dit, vae = DioramaTextEncoder(text_config, PIECES), Dit(dit_config), Vae(vae_config)
    for module in (text, dit, vae):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    save_text_encoder(folder, text, {})
    save_part(folder, "dit", dit_config, dit.state_dict(), dtype=torch.bfloat16)
    save_part(folder, "vae", vae_config, vae.state_dict(), dtype=torch.bfloat16)
    info = {
        "name": "tiny",
        "family": "diorama",
        "licence": "Apache-2.0",
        "description": "random weights",
        "sizes": ["32x32", "64x32", "64x64"],
        "fps": 16,
        "frames": 17,
        "num_steps": 2,
        "guidance_scale": 2.0,
        "student_steps": 2,
        "rollout": {"sink": 2, "recent": 3, "window": 3},
        "shift": 2.0,
        "parameters": 1,
    }
    write_manifest(folder, info)
    return folder
