"""Masks: parsing of regions, masks in files, feathering."""

from fractions import Fraction

import pytest
import torch

from skyloom.core.errors import MediaError, RequestError
from skyloom.core.types import VideoShape
from skyloom.media.masks import feather, open_mask, parse_region
from skyloom.media.write import open_video, write_picture

SHAPE = VideoShape(9, 32, 48)
FPS = Fraction(4)


def mask_of(region):
    """Return all frames of a mask of a video of SHAPE."""
    return open_mask(region, SHAPE, FPS).read(0, SHAPE.frames)


def boxes(text: str) -> list[tuple[int, ...] | None]:
    """Return left, top, right, bottom of a region in each frame; check that it is a full box."""
    found = []
    for mask in mask_of(parse_region(text)):
        if not mask.any():
            found.append(None)
            continue
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        edges = int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
        assert mask.sum() == (edges[2] - edges[0]) * (edges[3] - edges[1])
        found.append(edges)
    return found


def test_a_box_in_pixels_or_percent():
    assert boxes("4,8,16,10") == boxes("4, 8, 16, 10 ;") == [(4, 8, 20, 18)] * 9
    assert boxes("25%,50%,50%,25%") == [(12, 16, 36, 24)] * 9
    assert boxes("-4,20,16,99") == [(0, 20, 12, 32)] * 9


def test_a_box_for_a_while():
    assert boxes("4,8,16,10@0.5-1.25") == [None] * 2 + [(4, 8, 20, 18)] * 3 + [None] * 4
    assert boxes("0,0,8,8@0-1;8,8,8,8@1-9") == [(0, 0, 8, 8)] * 4 + [(8, 8, 16, 16)] * 5


def test_a_box_that_moves_from_key_to_key():
    assert boxes("0,0,8,8@0.5; 16,8,8,16@1.5") == [
        *[(0, 0, 8, 8)] * 3,
        (4, 2, 12, 12),
        (8, 4, 16, 16),
        (12, 6, 20, 20),
        *[(16, 8, 24, 24)] * 3,
    ]


@pytest.mark.parametrize(
    "text", ["", "1,2,3", "a,b,c,d", "1,2,3,4@x", "1,2,nan,4", "1,2,3,4@1-2-3", "1,2,3,4@2-1"]
)
def test_what_is_no_region_says_how_to_write_one(text):
    with pytest.raises(RequestError, match="x,y,w,h"):
        parse_region(text)


def test_regions_that_cannot_be_meant_are_refused():
    for text, message in {
        "0,0,0,8": "must be above 0",
        "0,0,8,8@1;0,0,8,8@1-2": "must not mix",
        "0,0,8,8@2;0,0,8,8@1": "must rise",
    }.items():
        with pytest.raises(RequestError, match=message):
            parse_region(text)
    for text in ("48,0,8,8", "0,0,8,8@3-4"):
        with pytest.raises(RequestError, match=r"must overlap the video \(48x32, 2\.25 s\)"):
            mask_of(parse_region(text))


def test_masks_in_files(tmp_path):
    white = torch.zeros(9, 32, 48, 3, dtype=torch.uint8)
    for number in range(9):
        white[number, 4:12, number : number + 9] = 255
    write_picture(white[3], tmp_path / "mask.png")
    with open_video(tmp_path / "mask.mkv", 16) as writer:
        writer.append(white)
    drawn = white[..., 0] > 0
    assert torch.equal(mask_of(tmp_path / "mask.png"), drawn[3].expand(9, -1, -1))
    assert torch.equal(mask_of(tmp_path / "mask.mkv"), drawn)
    assert torch.equal(open_mask(tmp_path / "mask.mkv", SHAPE, FPS).read(2, 5), drawn[2:5])


def test_masks_of_wrong_size_or_length_are_refused(tmp_path):
    write_picture(torch.zeros(32, 48, 3, dtype=torch.uint8), tmp_path / "black.png")
    write_picture(torch.full((32, 32, 3), 255, dtype=torch.uint8), tmp_path / "square.png")
    with open_video(tmp_path / "short.mkv", 4) as writer:
        writer.append(torch.zeros(5, 32, 48, 3, dtype=torch.uint8))
    (tmp_path / "text.png").write_text("hello")
    for name, message in {
        "black.png": "is empty. Paint white",
        "square.png": "must be 48x32 like the video, got 32x32",
        "short.mkv": "must have 9 frames like the video, got 5",
        "text.png": "cannot be read as a video",
        "none.png": "cannot be read",
    }.items():
        with pytest.raises(MediaError, match=message):
            mask_of(tmp_path / name)


def test_feather_rises_inwards_and_is_zero_outside():
    mask = mask_of(parse_region("8,4,40,20"))
    weight = feather(mask, 3)
    assert (weight[~mask] == 0).all()
    assert weight[0, 10, 8:13].tolist() == [0.25, 0.5, 0.75, 1, 1]
    assert weight[0, 10, -1] == 1, "the border of the frame is not feathered"
    assert torch.equal(feather(mask, 0), mask.float())
    with pytest.raises(RequestError, match="256"):
        feather(mask, 1000)
