"""A finished file is signed by its receipt and found again; what must stay private stays out."""

import pytest
import torch

from skyloom.core.errors import MediaError, SafetyError
from skyloom.generate.export import check_ready, sign_and_register, sources_of
from skyloom.generate.request import Request
from skyloom.generate.validate import resolve_defaults
from skyloom.media.write import write_picture, write_video
from skyloom.models.registry import find_model
from skyloom.safety.credentials import read
from skyloom.safety.provenance import Registry
from skyloom.safety.watermark import watermark_id_of_receipt

FRAMES = torch.full((4, 32, 32, 3), 90, dtype=torch.uint8)
RECEIPT = {
    "skyloom": "0.1.0",
    "model": "tiny",
    "weights": "w",
    "torch": "2",
    "request": {"prompt": "a secret wish", "seed": 7, "image": "/here/a.png"},
    "frames": {"sha256": "f"},
}


def test_a_file_is_signed_and_registered(tmp_path):
    path = write_video(FRAMES, 16, tmp_path / "a.mp4", RECEIPT)
    sign_and_register(path, RECEIPT, perceptual_hashes=["0" * 16])
    found = read(path)
    assert found is not None
    assert (found.state, found.generation["seed"]) == ("trusted", 7)
    (match,) = Registry().find(frames="f")
    assert match.record.identity == watermark_id_of_receipt(RECEIPT)
    assert b"secret" not in Registry().path.read_bytes()


def test_without_disclosure_the_manifest_names_only_the_model(tmp_path):
    path = write_video(FRAMES, 16, tmp_path / "a.mp4")
    sign_and_register(path, RECEIPT, disclose=False)
    assert read(path).generation == {"version": "0.1.0", "model": "tiny"}
    plain = write_video(FRAMES, 16, tmp_path / "b.mp4")
    sign_and_register(plain, RECEIPT, credentials=False)
    assert read(plain) is None
    assert len(Registry().find(frames="f")) == 2


def test_what_it_was_made_from_is_named(tmp_path):
    picture = write_picture(FRAMES[0], tmp_path / "a.png")
    receipt = {
        **RECEIPT,
        "request": {"prompt": "", "image": str(picture), "cards": [{"image": "/gone.png"}]},
    }
    assert [source.path for source in sources_of(receipt)] == [picture]
    path = write_video(FRAMES, 16, tmp_path / "a.mp4")
    sign_and_register(path, receipt)
    assert read(path).source_type == "compositeWithTrainedAlgorithmicMedia"


def test_the_id_of_a_making_hangs_on_what_makes_the_video_alone():
    same = {**RECEIPT, "torch": "3", "request": {**RECEIPT["request"], "image": "/there/a.png"}}
    other = {**RECEIPT, "request": {**RECEIPT["request"], "seed": 8}}
    assert (
        watermark_id_of_receipt(same)
        == watermark_id_of_receipt(RECEIPT)
        != watermark_id_of_receipt(other)
    )


def test_check_ready_fails_if_signing_or_registering_would(tmp_path, monkeypatch):
    check_ready()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SKYLOOM_DATA", str(tmp_path / "file"))
    with pytest.raises(MediaError, match="neither read nor created"):
        check_ready()
    with pytest.raises(MediaError, match="cannot be used"):
        check_ready(credentials=False)


@pytest.mark.parametrize(
    "cards", [(), ({"at": "0", "prompt": "a child"}, {"at": "1", "prompt": "all naked"})]
)
def test_a_refused_prompt_is_refused_where_requests_are_checked(tiny_model, cards):
    prompt = "" if cards else "a naked child"
    with pytest.raises(SafetyError, match="sexual-minors"):
        resolve_defaults(Request(prompt, cards=cards), find_model(str(tiny_model)))


def test_the_watermark_id_depends_on_loras_and_not_on_their_paths():
    def id_of(path: str, sha256: str) -> str:
        request = {**RECEIPT["request"], "loras": [{"name": path, "weight": 1.0}]}
        lora = {"name": path, "weight": 1.0, "sha256": sha256}
        return watermark_id_of_receipt({**RECEIPT, "request": request, "loras": [lora]})

    assert id_of("/a/felt.safetensors", "1") == id_of("/b/felt.safetensors", "1")
    assert len({watermark_id_of_receipt(RECEIPT), id_of("felt", "1"), id_of("felt", "2")}) == 3
