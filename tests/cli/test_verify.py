"""`skyloom verify`: report and exit code."""

import json

import torch

from skyloom.media.write import write_video
from skyloom.safety.credentials import sign
from skyloom.safety.signer import find_signer


def test_reports_as_text_and_json(skyloom, tmp_path):
    frames = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    path = write_video(frames, 16, tmp_path / "a.mp4")
    ran = skyloom("verify", str(path))
    assert (ran.code, ran.out.splitlines()[-1]) == (0, "no evidence of generation")
    sign(path, {"seed": 7}, find_signer())
    ran = skyloom("verify", str(path))
    assert ran.code == 0
    assert "intact, signed by this machine" in ran.out
    assert "seed 7" in ran.out
    assert json.loads(skyloom("verify", str(path), "--json").out)["c2pa"]["generation"] == {
        "seed": 7
    }
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert skyloom("verify", str(path)).code == 1


def test_missing_file_is_an_error(skyloom, tmp_path):
    ran = skyloom("verify", str(tmp_path / "gone.mp4"))
    assert ran.code == 1
    assert "cannot be read" in ran.err
