"""Verification by manifest, watermark and registry, and with some of them removed."""

import json

import pytest
import torch

from skyloom.core.errors import MediaError
from skyloom.media.source import open_source
from skyloom.media.write import write_picture, write_video
from skyloom.safety.credentials import sign
from skyloom.safety.provenance import ProvenanceRecord, Registry, content_sha256
from skyloom.safety.signer import find_signer
from skyloom.safety.verify import check
from skyloom.safety.watermark import embed, watermark_id

ID = watermark_id("a cat")


@pytest.fixture
def made(scene, tmp_path):
    """Write a file with watermark, manifest and registry entry."""
    path = write_video(embed(scene(1), ID), 16, tmp_path / "a.mp4")
    sign(path, {"seed": 7}, find_signer())
    Registry().add(ProvenanceRecord("a.mp4", content_sha256(path), "", ID, {"seed": 7}))
    return path


def test_all_three_layers_are_reported(made):
    result = json.loads(json.dumps(check(made).to_dict()))
    assert result["generated"] is True
    assert (result["c2pa"]["state"], result["c2pa"]["generation"]) == ("trusted", {"seed": 7})
    assert [mark["identity"] for mark in result["watermark"]] == [ID]
    assert [(match["by"], match["generation"]) for match in result["registry"]] == [
        ("file", {"seed": 7})
    ]


def test_watermark_finds_the_record_without_manifest(made, tmp_path):
    frames = [*open_source(made).read()]
    stripped = write_video(torch.stack(frames), 16, tmp_path / "b.webm")
    found = check(stripped)
    assert (found.credentials, found.generated) == (None, True)
    assert [match.by for match in found.matches] == ["watermark"]


def test_invalid_manifest_is_no_evidence(scene, tmp_path):
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


def test_other_files_raise_media_error(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(MediaError, match="cannot be read as a video"):
        check(tmp_path / "a.mp4")
