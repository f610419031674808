"""Receipts: round trip, chunk-independent digests, damaged receipts."""

import hashlib
import json
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from PIL import Image

from skyloom.core.errors import MediaError
from skyloom.core.types import ScaleFactors
from skyloom.core.version import __version__
from skyloom.generate.plan import make_plan
from skyloom.generate.receipt import (
    FramesHash,
    Parent,
    Receipt,
    make_receipt,
    read_receipt,
    weights_digest,
)
from skyloom.generate.request import Request
from skyloom.media.write import sidecar_of, write_sidecar, write_video
from skyloom.models.registry import read_model

FRAMES = (
    torch.arange(5 * 16 * 32 * 3, dtype=torch.int64)
    .remainder(251)
    .to(torch.uint8)
    .view(5, 16, 32, 3)
)


def hashed(frames, *, at_a_time=5, fps=8):
    """The digest of frames that come some at a time."""
    taken = FramesHash(Fraction(fps))
    for part in frames.split(at_a_time):
        taken.add(part)
    return taken.digest()


def receipt_of(tiny_model, request):
    """The receipt of a pipeline on the CPU."""
    info = read_model(tiny_model)
    plan = make_plan(request, info, ScaleFactors(4, 16))
    return make_receipt(plan, info, torch.device("cpu"), torch.float32, hashed(FRAMES))


@pytest.fixture
def receipt(tiny_model):
    made = receipt_of(tiny_model, Request("a cat", seed=3, fps=4))
    return replace(made, parents=(Parent("ab", "video", "extend"),))


def test_a_receipt_says_everything_that_was_left_open(receipt, tiny_model):
    filled = receipt.request
    assert None not in (
        filled.model,
        filled.seconds,
        filled.size,
        filled.fps,
        filled.num_steps,
        filled.quality,
    )
    assert (filled.seed, filled.size, filled.fps) == (3, "32x32", 4.0)
    assert (receipt.skyloom, receipt.torch, receipt.device) == (
        __version__,
        torch.__version__,
        "cpu",
    )
    again = make_plan(replace(filled, model=None), read_model(tiny_model), ScaleFactors(4, 16))
    assert receipt.request == receipt_of(tiny_model, again.request).request


def test_dicts_and_json_are_inverse(receipt):
    assert Receipt.from_dict(receipt.to_dict()) == receipt
    assert Receipt.from_dict(json.loads(json.dumps(receipt.to_dict()))) == receipt


def test_what_a_newer_version_adds_is_kept(receipt):
    values = {**receipt.to_dict(), "mood": {"light": [1, 2]}}
    read = Receipt.from_dict(values)
    assert read.extra == {"mood": {"light": [1, 2]}}
    assert read.to_dict() == values


def test_a_receipt_of_version_0_1_is_read(tiny_model):
    files = read_model(tiny_model).manifest["files"]
    read = Receipt.from_dict(
        {"skyloom": "0.1.0", "request": {"prompt": "a cat", "model": "tiny"}, "weights": files}
    )
    assert read.weights == weights_digest(files)
    assert (read.model, read.frames, read.torch) == ("tiny", None, "")


def test_the_digest_is_of_the_raw_frames_however_they_come():
    whole = hashed(FRAMES)
    assert whole.sha256 == hashlib.sha256(FRAMES.numpy().tobytes()).hexdigest()
    assert whole.shape == (5, 16, 32, 3)
    for at_a_time in (1, 2, 3):
        assert hashed(FRAMES, at_a_time=at_a_time) == whole
    turned = FRAMES.transpose(1, 2).contiguous().transpose(1, 2)
    assert hashed(turned) == whole
    changed = FRAMES.clone()
    changed[4, 15, 31, 2] ^= 1
    assert hashed(changed).sha256 != whole.sha256
    assert hashed(FRAMES.flip(0)).sha256 != whole.sha256


def test_the_digest_of_weights_is_of_names_and_hashes_in_any_order():
    files = {"a": "1", "b": "2"}
    assert weights_digest(files) == weights_digest({"b": "2", "a": "1"})
    assert (
        len(
            {
                weights_digest(files),
                weights_digest({"a": "2", "b": "1"}),
                weights_digest({"a": "1"}),
            }
        )
        == 3
    )


def test_the_picture_it_started_from_is_known_by_its_content(tiny_model, tmp_path):
    path = tmp_path / "first.png"
    Image.new("RGB", (8, 8), "red").save(path)
    receipt = receipt_of(tiny_model, Request("a cat", image=str(path)))
    assert receipt.image == hashlib.sha256(path.read_bytes()).hexdigest()
    path.unlink()
    with pytest.raises(MediaError, match=r"first\.png does not exist"):
        receipt_of(tiny_model, Request("a cat", image=str(path)))


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif"])
def test_every_format_carries_it(receipt, tmp_path, name):
    path = write_video(FRAMES, 8, tmp_path / name, receipt.to_dict())
    assert read_receipt(path) == receipt


def test_a_sidecar_stands_in_for_a_stripped_file(receipt, tmp_path):
    path = write_video(FRAMES, 8, tmp_path / "a.mp4")
    with pytest.raises(MediaError, match=r"a\.mp4 holds no receipt"):
        read_receipt(path)
    sidecar = write_sidecar(path, receipt.to_dict())
    assert sidecar == sidecar_of(path) == tmp_path / "a.mp4.receipt.json"
    assert read_receipt(path) == read_receipt(sidecar) == receipt
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.mp4", "a.mp4.receipt.json"]


def test_the_file_is_believed_before_the_sidecar(receipt, tmp_path):
    path = write_video(FRAMES, 8, tmp_path / "a.mp4", receipt.to_dict())
    write_sidecar(path, replace(receipt, weights="other").to_dict())
    assert read_receipt(path) == receipt


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"request": "a cat"}, "must be a table"),
        ({"request": {"seed": 1}}, "prompt must be given"),
        ({"request": {"prompt": "a cat", "mood": "blue"}}, "has no field 'mood'"),
        ({"weights": 7}, "must be a table"),
        ({"frames": {"sha256": "a", "shape": [1, 2], "fps": "8"}}, "frames.shape must be"),
        ({"frames": {"sha256": "a", "shape": [1, 2, 2, 3], "fps": "8/0"}}, "damaged"),
        ({"frames": {"shape": [1, 2, 2, 3], "fps": "8"}}, "no 'sha256'"),
        ({"torch": 2}, "must be text"),
        ({"parents": [{"sha256": "a"}]}, "damaged"),
        ({"parents": 5}, "damaged"),
        ({"notes": []}, "must be a table"),
    ],
)
def test_a_damaged_receipt_is_one_clear_error(receipt, change, message):
    with pytest.raises(MediaError, match=message):
        Receipt.from_dict({**receipt.to_dict(), **change})


def test_a_receipt_without_its_main_parts_is_damaged(receipt):
    for name in ("skyloom", "request", "weights"):
        values = receipt.to_dict()
        del values[name]
        with pytest.raises(MediaError, match=f"no '{name}'"):
            Receipt.from_dict(values)


@pytest.mark.parametrize(
    "content",
    [b"hello", b"", b"[1]", b'{"a": 1}', b'{"skyloom": "' + b"x" * 2**20 + b'"}', b"\xff"],
)
def test_a_sidecar_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "a.mp4.receipt.json"
    path.write_bytes(content)
    with pytest.raises(MediaError, match="is not a skyloom receipt"):
        read_receipt(path)
