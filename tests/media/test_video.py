"""A video tells its length, saves itself and plays in a notebook."""

import base64
import re
from fractions import Fraction

import torch

import skyloom
from skyloom.media import video as module
from skyloom.media.source import open_source


def _video(height=32, width=48):
    return skyloom.Video(torch.full((8, height, width, 3), 90, dtype=torch.uint8), Fraction(16))


def test_length_and_name():
    assert _video().seconds == 0.5
    assert repr(_video()) == "Video(8 frames of 48x32, 16 fps)"


def test_the_notebook_plays_the_same_frames(tmp_path):
    html = _video()._repr_html_()
    assert "loop" in html
    path = tmp_path / "embedded.mp4"
    path.write_bytes(base64.b64decode(re.search(r"base64,([^\"]+)", html)[1]))
    assert (open_source(path).read().float() - 90).abs().max() < 4


def test_what_is_too_large_or_odd_is_only_described(monkeypatch):
    assert "47x32, 0.50 s at 16 fps" in _video(width=47)._repr_html_()
    monkeypatch.setattr(module, "_MAX_EMBED_BYTES", 10)
    assert "too large to embed" in _video()._repr_html_()


def test_saving_takes_text_and_gives_the_path(tmp_path):
    assert _video().save(str(tmp_path / "x.gif")) == tmp_path / "x.gif"
