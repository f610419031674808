"""Watermark: invisible, robust to codecs, resizing and crops, no false positives."""

import io
import math

import av
import pytest
import torch
import torch.nn.functional as F

from skyloom.core.seeds import derive_seed
from skyloom.media.source import open_source
from skyloom.media.write import write_video
from skyloom.safety import watermark
from skyloom.safety.watermark import SpreadSpectrumWatermarker, embed, watermark_id
from skyloom.safety.watermark_detector import (
    SEARCHES,
    CropRegion,
    detect,
    find_watermarks,
    highest_scores,
)
from skyloom.safety.watermark_layout import ID_BITS

ID = watermark_id("a cat")
OTHER = watermark_id("a dog")


def coded(frames, crf, folder):
    """Encode with x264 and decode."""
    content = io.BytesIO()
    with av.open(content, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for picture in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    path = folder / "coded.mkv"
    path.write_bytes(content.getvalue())
    return open_source(path).read()


def resized(frames, height, width):
    pictures = frames.permute(0, 3, 1, 2).float()
    pictures = F.interpolate(
        pictures, (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return pictures.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def test_watermark_is_faint_and_detected(scene):
    frames = scene(1)
    marked = embed(frames, ID)
    error = (marked.float() - frames.float()).square().mean()
    assert 0 < error <= 255**2 / 10**4.2  # 42 dB
    found = detect(marked)
    assert found is not None
    assert (found.identity, found.region) == (ID, CropRegion())


@pytest.mark.parametrize("seed", range(3))
def test_watermark_survives_codecs_gif_and_resizing(scene, tmp_path, seed):
    marked = embed(scene(seed), ID)
    gif = open_source(write_video(marked, 16, tmp_path / "a.gif")).read()
    codecs = [coded(marked, crf, tmp_path) for crf in (23, 28)]
    attacked = [*codecs, gif, resized(marked, 64, 64), resized(marked, 150, 192)]
    assert [found and found.identity for found in map(detect, attacked)] == [ID] * 5


@pytest.mark.parametrize(("side", "count"), [(128, 12), (256, 6), (512, 3)])
def test_crops_are_detected_and_located(scene, tmp_path, side, count):
    marked = embed(scene(2, count=count, side=side), ID)
    kept, top, left = round(side * 0.45) * 2, side // 20, side // 12
    found = detect(coded(marked[:, top : top + kept, left : left + kept], 23, tmp_path))
    assert found is not None
    assert found.identity == ID
    seen = (found.region.width, found.region.height, found.region.left, found.region.top)
    assert seen == pytest.approx((kept / side, kept / side, left / side, top / side), abs=0.02)


def test_watermark_in_large_frames(scene):
    frames = scene(3, count=4, side=320)
    marked = embed(frames, ID)
    assert (marked.float() - frames.float()).square().mean() < 255**2 / 10**4.29  # 42.9 dB
    found = detect(marked)
    assert found is not None
    assert found.identity == ID


def test_flat_areas_are_marked_less(scene):
    frames = torch.full((1, 128, 128, 3), 120, dtype=torch.uint8)
    frames[:, :, 64:] = scene(1, count=1)[:, :, 64:]
    frames[:, :, 64:] = frames[:, :, 64:] // 2 + 60 * ((torch.arange(64) // 4) % 2)[:, None].to(
        torch.uint8
    )
    added = (embed(frames, ID).float() - frames.float()).square().mean((0, 1, 3)).sqrt()
    assert added[:48].mean() < 0.85 * added[80:].mean()


def test_unmarked_frames_have_no_watermark(scene):
    assert not any(detect(scene(seed, count=2)) for seed in range(20, 22))
    assert detect(torch.zeros(3, 128, 128, 3, dtype=torch.uint8)) is None


def test_another_key_finds_nothing(scene):
    assert detect(embed(scene(1), ID), key="another") is None
    assert detect(embed(scene(1), ID, key="another"), key="another").identity == ID


def test_scores_of_unmarked_frames():
    """The best of 2^60 random words scores about sqrt(2 ln 2^60) = 9.1; Viterbi finds less."""
    scores = []
    for seed in range(100):
        noise = torch.randn(
            1, 32, 32, 1, generator=torch.Generator().manual_seed(derive_seed(seed, "luck"))
        )
        frames = (noise * 40 + 128).clamp(0, 255).to(torch.uint8).expand(-1, -1, -1, 3)
        scores.append(highest_scores(resized(frames, 128, 128)))
    for search, of_band in zip(SEARCHES, zip(*scores, strict=True), strict=True):
        assert 7 < sum(of_band) / len(of_band) < 9.1
        assert max(of_band) < search.threshold


def test_false_positive_bound_of_the_docs():
    """Hoeffding: P(score) <= exp(-score^2 / 2) for random signs; 2^48 ids in each crop."""
    total = per_window = 0.0
    for search in SEARCHES:
        whole, elsewhere = (
            2**ID_BITS * math.exp(-(score**2) / 2) for score in (search.threshold, search.cropped)
        )
        total += whole + search.max_crops * elsewhere
        per_window += elsewhere
    assert total == pytest.approx(6.9e-7, rel=0.02)
    assert per_window == pytest.approx(1.03e-9, rel=0.02)
    minute = 60 * 60 // 32  # windows at 60 frames a second
    assert total + minute * per_window < 1e-6


def test_watermark_does_not_depend_on_batches(scene):
    frames = scene(4, count=70, side=64)
    marker = SpreadSpectrumWatermarker(ID)
    parts = [marker.mark(part) for part in frames.split([1, 5, 57, 7])]
    assert torch.equal(torch.cat(parts), embed(frames, ID))


def test_pixels_outside_the_mask_are_unchanged(scene):
    frames = scene(5)
    where = torch.zeros(frames.shape[:3], dtype=torch.bool)
    where[8:, :, 40:] = True
    marked = SpreadSpectrumWatermarker(ID).mark(frames, where)
    assert torch.equal(marked[~where], frames[~where])
    assert not torch.equal(marked[where], frames[where])


def test_small_frames_are_unchanged(scene):
    frames = scene(6, side=48)
    assert torch.equal(embed(frames, ID), frames)
    assert detect(frames[:, :20, :20]) is None


def test_spliced_videos_have_several_ids(scene):
    video = torch.cat([embed(scene(7, count=64), ID), embed(scene(8, count=64), OTHER)])
    found = find_watermarks(video.split(10))
    assert [(mark.identity, mark.start, mark.stop) for mark in found] == [
        (ID, 0, 64),
        (OTHER, 64, None),
    ]


def test_no_frames_have_no_watermarks():
    assert find_watermarks(iter(())) == []


@pytest.mark.parametrize(("height", "width"), [(480, 832), (704, 1280)])
@pytest.mark.parametrize("attack", ["crf 28", "half", "720p", "480p", "crop 90", "crop 70"])
def test_watermark_in_real_sizes(texture, tmp_path, height, width, attack):
    frames = texture(height, width, 12 if attack == "crop 70" else 30)
    attacked = {
        "crf 28": lambda video: coded(video, 28, tmp_path),
        "half": lambda video: coded(resized(video, height // 2, width // 2), 23, tmp_path),
        "720p": lambda video: coded(resized(video, 720, 1280), 23, tmp_path),
        "480p": lambda video: coded(resized(video, 480, 854), 23, tmp_path),
        "crop 90": lambda video: coded(crop(video, 0.9), 23, tmp_path),
        "crop 70": lambda video: coded(crop(video, 0.7), 23, tmp_path),
    }[attack]
    found = detect(attacked(embed(frames, ID)))
    assert found is not None
    assert found.identity == ID
    if attack.startswith("crop"):
        share = int(attack[-2:]) / 100
        assert (found.region.width, found.region.height) == pytest.approx((share, share), abs=0.01)
    else:
        assert found.region == CropRegion()


def test_unmarked_frames_of_real_sizes_have_no_watermark(texture):
    assert detect(texture(480, 832)) is None
    assert detect(texture(704, 1280)) is None


def test_large_frames_marked_by_older_versions_are_detected(scene, monkeypatch, tmp_path):
    frames = scene(3, count=4, side=480)
    monkeypatch.setattr(watermark, "LARGE_SIDE", 10_000)
    marked = embed(frames, ID)
    found = detect(coded(marked[:, 24:456, 24:456], 23, tmp_path))
    assert found is not None
    assert found.identity == ID


def test_the_content_of_large_frames_hides_a_stronger_watermark(texture):
    frames = texture(480, 832)
    frames[:, :, :400] = 120
    added = (embed(frames, ID).float() - frames.float()).square().mean((0, 1, 3)).sqrt()
    assert 1.2 < added[:300].mean() < 1.8
    assert added[500:].mean() > 1.5 * added[:300].mean()
    assert added.max() < 6


def test_marking_clamps_to_the_range_of_bytes(scene):
    frames = torch.cat([torch.full_like(scene(1, count=1), level) for level in (0, 1, 254, 255)])
    pattern = (embed(torch.full_like(frames, 128), ID).int() - 128)[:1]
    marker = SpreadSpectrumWatermarker(ID)
    marker.mark(torch.full_like(frames[:1], 128))  # the pattern is kept for 32 frames
    assert torch.equal(marker.mark(frames).int(), (frames.int() + pattern).clamp(0, 255))


def crop(frames, share):
    """Cut out a share of both sides, off the centre."""
    height, width = (round(side * share / 2) * 2 for side in frames.shape[1:3])
    top, left = (frames.shape[1] - height) // 3, (frames.shape[2] - width) // 2
    return frames[:, top : top + height, left : left + width]
