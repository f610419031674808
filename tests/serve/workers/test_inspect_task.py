"""The viewer's process: it alone opens what the server has stored, and what it finds comes back whole."""

import pytest
import torch
from PIL import Image

from skyloom.core.errors import MediaError, UncheckedError
from skyloom.media.video import Video
from skyloom.safety.frame_moderation import perceptual_hashes
from skyloom.serve.storage.folder import FolderStorage
from skyloom.serve.workers.subprocess_tasks import view_in_child


@pytest.fixture
def storage(tmp_path):
    """A storage with nothing in it."""
    return FolderStorage(tmp_path / "assets")


def test_a_clip_is_looked_at_and_recognised_in_a_process_of_its_own(storage, tmp_path):
    frames = torch.zeros(8, 64, 64, 3, dtype=torch.uint8)
    receipt = {"skyloom": "0.1.0", "request": {"prompt": "a red cat walks"}}
    asset = storage.put(Video(frames, 16, receipt).save(tmp_path / "a.mp4"), "mp4")
    verdict, likeness = view_in_child(storage, asset, recognise=True)
    assert (verdict.allowed, likeness.description, likeness.source) == (True, "red cat", "receipt")


def test_a_refusal_and_its_time_come_back_and_nobody_is_recognised(storage, tmp_path, policy):
    noise = torch.randint(
        0, 255, (8, 8, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    )
    Image.fromarray(noise.numpy()).resize((64, 64), Image.Resampling.BICUBIC).save(
        tmp_path / "logo.png"
    )
    policy(
        f'[[pictures]]\nname = "logo"\nmessage = "No."\nlooks = {perceptual_hashes(tmp_path / "logo.png")}'
    )
    asset = storage.put(tmp_path / "logo.png", "png")
    verdict, likeness = view_in_child(storage, asset, recognise=True)
    assert (verdict.rule, verdict.at, verdict.message, likeness.description) == (
        "logo",
        0,
        "No.",
        None,
    )


def test_what_cannot_be_read_or_checked_is_told_without_a_path(storage, tmp_path, policy):
    broken = storage.put(b"\x00\x00\x00\x18ftypisom" + bytes(500), "mp4")
    with pytest.raises(MediaError, match=r"^The file cannot be read") as caught:
        view_in_child(storage, broken, recognise=True)
    assert str(tmp_path) not in str(caught.value)
    policy(
        '[[classifiers]]\nname = "own"\ncall = "no_such_thing:x"\nthresholds = { a = 1 }\nmessage = "x"'
    )
    with pytest.raises(UncheckedError, match="own cannot be loaded") as caught:
        view_in_child(storage, broken, recognise=False)
    assert (caught.value.rule, caught.value.target) == ("own", "input")
