"""A model family with sound: made per window, in file, receipt, stream, edit and replay."""

import copy
import hashlib
from dataclasses import dataclass, replace
from fractions import Fraction

import pytest
import torch

import skyloom
from skyloom.core.audio import Audio, samples_at
from skyloom.generate.edit_spec import Edit
from skyloom.generate.receipt import read_receipt
from skyloom.generate.request import Request
from skyloom.media.source import open_source

LONG = Request("a red cat on the beach", seed=7, seconds=2.5)


@dataclass
class Tone:
    """Makes a tone whose loudness and pitch follow the window's latent and seed."""

    rate: int = 16_000
    channels: int = 2

    def generate(self, latent, text, samples, seed):
        """A sine of a frequency drawn from the seed, as loud as the latent is large."""
        pitch = 200 + seed % 400
        times = torch.arange(samples) / self.rate
        loudness = float(latent.square().mean().sqrt().clamp(0.2, 0.8))
        return (loudness * torch.sin(2 * torch.pi * pitch * times)).expand(self.channels, samples)


@pytest.fixture(scope="module")
def silent(tiny_model):
    return skyloom.load(str(tiny_model), dtype="float32")


@pytest.fixture(scope="module")
def pipeline(silent):
    loud = copy.copy(silent)
    loud.sound = Tone()
    return loud


def likeness(one, other):
    """The correlation of two sounds over their common length."""
    count = min(one.shape[1], other.shape[1])
    pair = torch.stack([one[0, :count], other[0, :count]])
    return float(torch.corrcoef(pair)[0, 1])


def test_every_frame_has_its_sound(pipeline, silent):
    video = pipeline.generate(LONG)
    assert torch.equal(video.frames, silent.generate(LONG).frames)
    assert video.audio.samples.shape == (2, samples_at(len(video.frames) / video.fps, 16_000))
    assert silent.generate(LONG).audio is None


def test_windows_sound_differently_and_the_start_does_not_depend_on_the_length(pipeline):
    video = pipeline.generate(LONG)
    first, second = (video.audio.samples[:, at : at + 8000] for at in (0, 17_500))
    assert abs(likeness(first, second)) < 0.9
    long = pipeline.generate(replace(LONG, seconds=4)).audio.samples
    assert torch.equal(long[:, : 17 * 1000], video.audio.samples[:, : 17 * 1000])


def test_sound_comes_before_its_frames_and_adds_up(pipeline):
    frames = 0
    pieces = []
    for step in pipeline.stream(LONG, collect=False):
        if step.audio is not None:
            pieces.append(step.audio)
        if step.frames is not None:
            frames += len(step.frames)
            heard = sum((piece.seconds for piece in pieces), Fraction(0))
            assert heard >= Fraction(frames, 16) - Fraction(1, 16_000)
    whole = pipeline.generate(LONG).audio
    assert torch.equal(Audio.concatenate(pieces).samples, whole.samples)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm"])
def test_an_exported_file_sounds_like_the_video(pipeline, tmp_path, suffix):
    path = tmp_path / f"cat{suffix}"
    receipt = pipeline.export(LONG, path)
    video = pipeline.generate(LONG)
    digest = hashlib.sha256()
    for step in pipeline.stream(LONG):
        if step.audio is not None:
            digest.update(step.audio.samples.numpy().tobytes())
    sound = {"sha256": digest.hexdigest(), "rate": 16_000, "channels": 2}
    assert receipt["notes"]["sound"] == sound
    heard = open_source(path).read_audio()
    assert heard.rate == 16_000 or suffix == ".webm"  # Opus is always at 48 kHz
    if heard.rate == 16_000:
        assert likeness(heard.samples, video.audio.samples) > 0.99
    assert abs(heard.seconds - Fraction(len(video.frames), 16)) < Fraction(1, 10)
    assert read_receipt(path).notes["sound"] == receipt["notes"]["sound"]


def test_a_resumed_video_sounds_the_same(pipeline, tmp_path):
    whole = pipeline.generate(LONG).audio
    stream = pipeline.stream(LONG, resume=tmp_path / "kept")
    for step in stream:
        if step.phase == "decode":
            break
    stream.close()
    again = pipeline.generate(LONG, resume=tmp_path / "kept").audio
    assert torch.equal(again.samples, whole.samples)


def test_an_edit_makes_sound_for_generated_spans_and_keeps_that_of_the_source(pipeline, tmp_path):
    path = tmp_path / "cat.mp4"
    pipeline.export(LONG, path)
    source = open_source(path).read_audio()
    edit = Edit("retake", (str(path),), start="1", stop="1.5")
    target = tmp_path / "edited.mp4"
    pipeline.export(Request("a dog", seed=3, num_steps=1, edit=edit), target)
    heard = open_source(target).read_audio()
    kept = slice(1_600, 14_000)  # after the first packets, which prime the decoder
    assert likeness(heard.samples[:, kept], source.samples[:, kept]) > 0.99
    assert heard.samples.shape[1] >= 40 * 1000


def test_a_storyboard_sounds_in_time(pipeline):
    cards = [
        {"at": 0, "prompt": "a cat"},
        {"at": "1.1", "prompt": "a dog"},
        {"at": 2, "prompt": "a red dog", "cut": True},
    ]
    request = Request.from_dict({"prompt": "", "seed": 7, "seconds": 3, "cards": cards})
    video = pipeline.generate(request)
    assert video.audio.samples.shape[1] == samples_at(len(video.frames) / video.fps, 16_000)
