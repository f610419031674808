"""A marked video tells its id after what happens to videos; an unmarked one tells none; what is kept stays as it is."""

import io
import math

import av
import pytest
import torch
import torch.nn.functional as F

from skyloom.core.seeds import derive_seed
from skyloom.media.read import read_video
from skyloom.media.write import write_video
from skyloom.safety import watermark
from skyloom.safety.watermark import Marker, detect, embed, find_marks, identity_of

ID = identity_of("a cat")
OTHER = identity_of("a dog")


def coded(frames, crf, folder):
    """Through x264 and back."""
    content = io.BytesIO()
    with av.open(content, "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for picture in frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    path = folder / "coded.mkv"
    path.write_bytes(content.getvalue())
    return read_video(path).frames


def resized(frames, height, width):
    pictures = frames.permute(0, 3, 1, 2).float()
    pictures = F.interpolate(pictures, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return pictures.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def test_the_mark_is_faint_and_reads_back(scene):
    frames = scene(1)
    marked = embed(frames, ID)
    error = (marked.float() - frames.float()).square().mean()
    assert 0 < error <= 255**2 / 10**4.2  # 42 dB
    found = detect(marked)
    assert found is not None
    assert (found.identity, found.region) == (ID, watermark.Region())


@pytest.mark.parametrize("seed", range(2))
def test_it_survives_a_codec_a_gif_and_other_sizes(scene, tmp_path, seed):
    marked = embed(scene(seed), ID)
    gif = read_video(write_video(marked, 16, tmp_path / "a.gif")).frames
    attacked = [coded(marked, 23, tmp_path), gif, resized(marked, 64, 64), resized(marked, 150, 192)]
    assert [found and found.identity for found in map(detect, attacked)] == [ID] * 4


def test_it_survives_a_crop_and_tells_where_it_was(scene):
    found = detect(embed(scene(2), ID)[:, 6:122, 9:125])
    assert found is not None
    assert found.identity == ID
    assert found.region.width == pytest.approx(116 / 128, abs=0.02)
    assert found.region.left == pytest.approx(9 / 128, abs=0.02)


def test_it_reads_in_large_frames_too(scene):
    frames = scene(3, count=4, side=320)
    marked = embed(frames, ID)
    assert (marked.float() - frames.float()).square().mean() < 255**2 / 10**4.39
    found = detect(marked)
    assert found is not None
    assert found.identity == ID


def test_nothing_is_found_where_nothing_is_marked(scene):
    assert not any(detect(scene(seed, count=2)) for seed in range(20, 22))
    assert detect(torch.zeros(3, 128, 128, 3, dtype=torch.uint8)) is None


def test_another_key_finds_nothing(scene):
    assert detect(embed(scene(1), ID), key="another") is None
    assert detect(embed(scene(1), ID, key="another"), key="another").identity == ID


def test_check_bits_agree_by_luck_as_often_as_luck_says():
    agreed = 0
    for seed in range(200):
        noise = torch.randn(1, 32, 32, 1, generator=torch.Generator().manual_seed(derive_seed(seed, "luck")))
        frames = (noise * 40 + 128).clamp(0, 255).to(torch.uint8).expand(-1, -1, -1, 3)
        identity, check = watermark.read_word(resized(frames, 128, 128))
        agreed += check >> 17 == watermark.check_of(identity) >> 17
    assert 6 <= agreed <= 44  # of 200, an eighth: 25 +- 4.7, four standard deviations


def test_the_false_positive_bound_is_what_the_page_says():
    whole = math.exp(-(watermark.SURE**2) / 2)
    crops = watermark.PLACES * math.exp(-(watermark.SURE_OF_CROP**2) / 2)
    assert (whole + crops) * 2**-watermark.CHECK_BITS < 1e-6
    sides = [round(128 * (1 - step / 100)) for step in range(17)]
    assert sum((129 - tall) * (129 - wide) for tall in sides for wide in sides) < watermark.PLACES


def test_marking_does_not_depend_on_how_a_video_is_cut(scene):
    frames = scene(4, count=70, side=64)
    marker = Marker(ID)
    parts = [marker.mark(part) for part in frames.split([1, 5, 57, 7])]
    assert torch.equal(torch.cat(parts), embed(frames, ID))


def test_what_is_kept_stays_bit_for_bit(scene):
    frames = scene(5)
    where = torch.zeros(frames.shape[:3], dtype=torch.bool)
    where[8:, :, 40:] = True
    marked = Marker(ID).mark(frames, where)
    assert torch.equal(marked[~where], frames[~where])
    assert not torch.equal(marked[where], frames[where])


def test_frames_too_small_for_a_mark_are_left_alone(scene):
    frames = scene(6, side=48)
    assert torch.equal(embed(frames, ID), frames)
    assert detect(frames[:, :20, :20]) is None


def test_parts_that_were_made_apart_tell_their_own_ids(scene):
    video = torch.cat([embed(scene(7, count=64), ID), embed(scene(8, count=64), OTHER)])
    found = find_marks(video.split(10))
    assert [(mark.identity, mark.start, mark.stop) for mark in found] == [(ID, 0, 64), (OTHER, 64, None)]


def test_no_frames_have_no_marks():
    assert find_marks(iter(())) == []
