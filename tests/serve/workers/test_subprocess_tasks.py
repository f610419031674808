"""Tasks in child processes: requests, responses and errors come back without local paths."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from skyloom.core.errors import MediaError, SkyloomError, UncheckedError
from skyloom.media.video import Video
from skyloom.safety.frame_moderation import perceptual_hashes
from skyloom.serve.storage import FolderStorage
from skyloom.serve.workers import subprocess_tasks
from skyloom.serve.workers.subprocess_tasks import inspect_in_subprocess, plan_in_subprocess


@pytest.fixture
def storage(tmp_path):
    """An empty storage."""
    return FolderStorage(tmp_path / "assets")


def test_a_video_is_moderated_and_its_subject_identified(storage, tmp_path):
    frames = torch.zeros(8, 64, 64, 3, dtype=torch.uint8)
    receipt = {"skyloom": "0.1.0", "request": {"prompt": "a red cat walks"}}
    asset = storage.put(Video(frames, 16, receipt).save(tmp_path / "a.mp4"), "mp4")
    verdict, likeness = inspect_in_subprocess(storage, asset, recognise=True)
    assert (verdict.allowed, likeness.description, likeness.source) == (True, "red cat", "receipt")


def test_a_refused_picture_has_a_rule_and_no_subject(storage, tmp_path, policy):
    noise = torch.randint(
        0, 255, (8, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    picture = Image.fromarray(noise.numpy()).resize((64, 64), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "logo.png")
    looks = perceptual_hashes(tmp_path / "logo.png")
    policy(f'[[pictures]]\nname = "logo"\nmessage = "No."\nlooks = {looks}')
    asset = storage.put(tmp_path / "logo.png", "png")
    verdict, likeness = inspect_in_subprocess(storage, asset, recognise=True)
    assert (verdict.rule, verdict.at, verdict.message) == ("logo", 0, "No.")
    assert likeness.description is None


def test_errors_are_raised_again_without_local_paths(storage, tmp_path, policy):
    broken = storage.put(b"\x00\x00\x00\x18ftypisom" + bytes(500), "mp4")
    with pytest.raises(MediaError, match=r"^The file cannot be read") as caught:
        inspect_in_subprocess(storage, broken, recognise=True)
    assert str(tmp_path) not in str(caught.value)
    policy(
        '[[classifiers]]\nname = "own"\ncall = "no_such_thing:x"\nthresholds = { a = 1 }\n'
        'message = "x"'
    )
    with pytest.raises(UncheckedError, match="own cannot be loaded") as caught:
        inspect_in_subprocess(storage, broken, recognise=False)
    assert (caught.value.rule, caught.value.target) == ("own", "input")


def test_a_child_that_writes_no_response_is_an_error(monkeypatch):
    monkeypatch.setattr(subprocess_tasks, "_MODULE", "this")  # the Zen of Python, which is no JSON
    from skyloom.generate.request import Request

    with pytest.raises(SkyloomError, match="The plan task failed"):
        plan_in_subprocess(Request("a cat"))


def test_the_parent_loads_no_model_library():
    program = (
        "import sys\n"
        "import skyloom.serve.workers.subprocess_tasks\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'av', 'PIL')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
