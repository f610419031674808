"""Replay: bit-exact frames, differences explained by the codec, and other videos."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from PIL import Image

from skyloom.core.errors import CheckpointError, MediaError, RequestError
from skyloom.core.types import ScaleFactors
from skyloom.generate.plan import make_plan
from skyloom.generate.receipt import FramesHash, make_receipt
from skyloom.generate.replay import (
    Difference,
    ReplayComparison,
    check_weights,
    compare,
    compare_file,
    is_exact,
    request_from_receipt,
)
from skyloom.generate.request import Request
from skyloom.media.video import Video
from skyloom.models.registry import read_model

CPU = torch.device("cpu")


def ramp(start=0):
    """Six smooth frames that move, which a codec keeps well."""
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(48), indexing="ij")
    frames = [
        torch.stack([rows * 4 + start, columns * 3 + 8 * t, rows + columns], -1) for t in range(6)
    ]
    return torch.stack(frames).clamp(0, 255).to(torch.uint8)


def receipt_of(tiny_model, frames, request=None):
    """The receipt that these frames would have."""
    info, taken = read_model(tiny_model), FramesHash(Fraction(8))
    taken.add(frames)
    plan = make_plan(request or Request("a cat", seed=1), info, ScaleFactors(4, 16))
    return make_receipt(plan, info, CPU, torch.float32, taken.digest())


def test_differences_are_of_pixel_values():
    made, decoded = ramp(), ramp().clone()
    assert compare(made, decoded, "x") == Difference(0, 0.0)
    decoded[2, 3, 4, 1] ^= 255
    change = abs(int(decoded[2, 3, 4, 1]) - int(made[2, 3, 4, 1]))
    assert compare(made, decoded, "x") == Difference(change, change / made.numel())
    assert compare(decoded, made, "x") == compare(made, decoded, "x")


@pytest.mark.parametrize(
    ("decoded", "message"),
    [
        (ramp()[:5], "x has 5 of 6"),
        (torch.cat([ramp(), ramp()]), "more than the 6"),
        (ramp()[:, :30], "48x30, not"),
    ],
)
def test_frames_of_another_number_or_size_are_errors(decoded, message):
    with pytest.raises(MediaError, match=message):
        compare(ramp(), decoded, "x")


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_a_file_of_the_same_frames_is_as_far_as_its_codec(tiny_model, tmp_path, suffix):
    video = Video(ramp(), Fraction(8))
    comparison = compare_file(
        video.save(tmp_path / f"a{suffix}"), receipt_of(tiny_model, ramp()), video
    )
    assert comparison.exact
    assert comparison.file.mean == pytest.approx(comparison.codec.mean, abs=0.5)
    assert comparison.same


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_a_file_of_other_frames_is_found_out_although_the_receipt_is_right(
    tiny_model, tmp_path, suffix
):
    path = Video(ramp(start=40), Fraction(8)).save(tmp_path / f"a{suffix}")
    comparison = compare_file(path, receipt_of(tiny_model, ramp()), Video(ramp(), Fraction(8)))
    assert comparison.exact
    assert not comparison.same
    assert comparison.file.mean > 10 > comparison.codec.mean


def test_one_changed_bit_is_not_exact_yet_the_same_to_the_eye(tiny_model, tmp_path):
    changed = ramp()
    changed[0, 0, 0, 0] ^= 1
    path = Video(ramp(), Fraction(8)).save(tmp_path / "a.mp4")
    comparison = compare_file(path, receipt_of(tiny_model, ramp()), Video(changed, Fraction(8)))
    assert not comparison.exact
    assert comparison.same
    assert comparison.to_dict()["exact"] is False


def test_exactness_needs_a_digest_and_the_same_rate(tiny_model):
    receipt = receipt_of(tiny_model, ramp())
    assert is_exact(receipt, Video(ramp(), Fraction(8))) is True
    assert is_exact(receipt, Video(ramp(), Fraction(16))) is False
    assert is_exact(replace(receipt, frames=None), Video(ramp(), Fraction(8))) is None


def test_a_local_change_is_not_what_a_codec_does():
    comparison = ReplayComparison(True, Difference(200, 0.4), Difference(20, 0.4))
    assert not comparison.same
    assert replace(comparison, file=Difference(30, 0.5)).same


def test_other_weights_are_refused_by_both_their_names(tiny_model):
    receipt, info = receipt_of(tiny_model, ramp()), read_model(tiny_model)
    check_weights(receipt, info)
    with pytest.raises(
        CheckpointError,
        match=f"weights ffffffffffff of tiny; tiny in .* has {receipt.weights[:12]}",
    ):
        check_weights(replace(receipt, weights="f" * 64), info)


def test_the_picture_must_be_the_one_it_started_from(tiny_model, tmp_path):
    first, other = tmp_path / "first.png", tmp_path / "other.png"
    Image.new("RGB", (8, 8), "red").save(first)
    Image.new("RGB", (8, 8), "blue").save(other)
    receipt = receipt_of(tiny_model, ramp(), Request("a cat", seed=1, image=str(first)))
    assert request_from_receipt(receipt).image == str(first)
    with pytest.raises(RequestError, match=r"other\.png is not the picture"):
        request_from_receipt(receipt, other)
    moved = first.rename(tmp_path / "moved.png")
    with pytest.raises(MediaError, match=r"first\.png cannot be read"):
        request_from_receipt(receipt)
    assert request_from_receipt(receipt, moved).image == str(moved)
    with pytest.raises(RequestError, match="did not start from a picture"):
        request_from_receipt(receipt_of(tiny_model, ramp()), moved)
