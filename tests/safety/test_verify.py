"""Three layers in one answer, and what is left of it when one of them is lost."""

import json

import pytest
import torch

from skyloom.core.errors import MediaError
from skyloom.media.source import open_source
from skyloom.media.write import write_picture, write_video
from skyloom.safety.credentials import sign
from skyloom.safety.provenance import ProvenanceRecord, Registry, sha256_file
from skyloom.safety.signer import find_signer
from skyloom.safety.verify import check
from skyloom.safety.watermark import embed, watermark_id

ID = watermark_id("a cat")


@pytest.fixture
def made(scene, tmp_path):
    """A file as `generate` leaves it: marked, signed, registered."""
    path = write_video(embed(scene(1), ID), 16, tmp_path / "a.mp4")
    sign(path, {"seed": 7}, find_signer())
    Registry().add(ProvenanceRecord("a.mp4", sha256_file(path), "", ID, {"seed": 7}))
    return path


def test_all_three_layers_are_told(made):
    told = json.loads(json.dumps(check(made).to_dict()))
    assert told["generated"] is True
    assert (told["c2pa"]["state"], told["c2pa"]["generation"]) == ("trusted", {"seed": 7})
    assert [mark["identity"] for mark in told["watermark"]] == [ID]
    assert [(match["by"], match["generation"]) for match in told["registry"]] == [
        ("file", {"seed": 7})
    ]


def test_the_mark_leads_to_the_registry_when_the_manifest_is_gone(made, tmp_path):
    frames = [*open_source(made).read()]
    stripped = write_video(torch.stack(frames), 16, tmp_path / "b.webm")
    found = check(stripped)
    assert (found.credentials, found.generated) == (None, True)
    assert [match.by for match in found.matches] == ["watermark"]


def test_a_broken_manifest_says_nothing_about_the_file(scene, tmp_path):
    path = write_video(scene(3), 16, tmp_path / "a.mp4")
    sign(path, {}, find_signer())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = check(path)
    assert found.credentials is not None
    assert (found.credentials.state, found.generated) == ("invalid", False)


def test_a_picture_and_an_unmarked_video(scene, tmp_path):
    picture = write_picture(embed(scene(1), ID)[0], tmp_path / "a.png")
    assert [mark.identity for mark in check(picture).marks] == [ID]
    assert not check(write_video(scene(4), 16, tmp_path / "a.gif")).generated


def test_what_is_no_media_is_told(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(MediaError, match="cannot be read as a video"):
        check(tmp_path / "a.mp4")
