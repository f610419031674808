"""A contact sheet shows every video's moments in order."""

import pytest
import torch

from skyloom.core.errors import MediaError, RequestError
from skyloom.media.read import read_image
from skyloom.media.sheet import write_sheet


def test_first_and_last_frames_are_at_both_ends(tmp_path):
    frames = torch.zeros(9, 16, 20, 3, dtype=torch.uint8)
    frames[0, ..., 0], frames[-1, ..., 1] = 255, 255
    sheet = read_image(
        write_sheet([("one", frames), ("two", frames)], tmp_path / "s.png", moments=3)
    )[0]
    assert sheet.shape == (2 * (16 + 14 + 2), 3 * 22 + 6, 3)
    assert sheet[20, 5].tolist() == [255, 0, 0]
    assert sheet[20, 2 * 22 + 5].tolist() == [0, 255, 0]


def test_nothing_makes_no_sheet(tmp_path):
    with pytest.raises(MediaError, match="empty"):
        write_sheet([], tmp_path / "s.png")
    with pytest.raises(RequestError, match=r"must end in \.png"):
        write_sheet([("a", torch.zeros(1, 2, 2, 3, dtype=torch.uint8))], tmp_path / "s.jpg")
