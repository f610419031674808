"""Writing videos: round trips, atomic output, pipes, early errors."""

import errno
import io
import tempfile
from fractions import Fraction

import pytest
import torch
from PIL import Image

from skyloom.core.errors import CapacityError, MediaError, RequestError
from skyloom.media.read import read_image
from skyloom.media.source import open_source
from skyloom.media.write import (
    atomic_output,
    check_target,
    open_pipe,
    open_video,
    write_picture,
    write_video,
)


@pytest.fixture
def frames():
    made = torch.zeros(5, 32, 48, 3, dtype=torch.uint8)
    made[..., 0] = torch.arange(5)[:, None, None] * 50
    made[:, 16:, :, 2] = 220
    return made


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "A.MP4"])
def test_frames_survive_the_file(tmp_path, frames, name):
    path = write_video(frames, Fraction(10), tmp_path / name, {"skyloom": "0", "seed": 7})
    back = open_source(path)
    assert back.read().shape == frames.shape
    assert back.fps == 10
    assert (back.read().float() - frames.float()).abs().mean() < 6
    assert back.receipt == {"skyloom": "0", "seed": 7}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_gif_keeps_the_time_although_it_counts_in_hundredths(tmp_path, frames):
    path = write_video(frames, Fraction(16), tmp_path / "a.gif")
    with Image.open(path) as gif:
        durations = []
        for index in range(gif.n_frames):
            gif.seek(index)
            durations.append(gif.info["duration"])
    assert sum(durations) == round(100 * 5 / 16) * 10


def test_the_index_comes_first_so_that_browsers_start_at_once(tmp_path, frames):
    content = write_video(frames, Fraction(16), tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def test_pictures_are_exact(tmp_path, frames):
    assert torch.equal(read_image(write_picture(frames[3], tmp_path / "a.png"))[0], frames[3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda frames: frames[:0], "0 frames"),
        (lambda frames: frames[:, :31], "must be even for mp4, got 48x31"),
        (lambda frames: frames[..., :1], "frames must be uint8"),
        (lambda frames: frames.float(), r"torch\.float32"),
    ],
)
def test_invalid_frames_are_refused(tmp_path, frames, change, message):
    with pytest.raises(MediaError, match=message):
        write_video(change(frames), Fraction(16), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_odd_sizes_are_fine_in_a_gif(tmp_path, frames):
    path = write_video(frames[:, :31, :47], Fraction(16), tmp_path / "a.gif")
    assert open_source(path).read().shape == (5, 31, 47, 3)


def test_a_rate_must_be_above_zero(tmp_path, frames):
    with pytest.raises(MediaError, match="0 fps"):
        write_video(frames, Fraction(0), tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif"])
def test_a_full_disk_leaves_the_old_file_and_no_half_one(tmp_path, frames, name, monkeypatch):
    path = tmp_path / name
    path.write_text("old")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for writer in ("_remux", "_write_gif"):
        monkeypatch.setattr(f"skyloom.media.write.{writer}", fail)
    with pytest.raises(CapacityError, match=r"disk .* is full"):
        write_video(frames, Fraction(16), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_left_midway_vanishes(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_output(tmp_path / "a.mp4") as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_bad_targets_are_refused_before_work(tmp_path):
    (tmp_path / "d.mp4").mkdir()
    with pytest.raises(RequestError, match=r"must end in \.mp4, \.webm, \.mkv, \.gif"):
        check_target(tmp_path / "a.avi")
    with pytest.raises(MediaError, match="none does not exist"):
        check_target(tmp_path / "none" / "a.mp4")
    with pytest.raises(MediaError, match="is a folder"):
        check_target(tmp_path / "d.mp4")
    with pytest.raises(RequestError, match="too long"):
        check_target(tmp_path / f"{'x' * 300}.mp4")
    check_target(tmp_path / "a.mp4")
    assert [path.name for path in tmp_path.iterdir()] == ["d.mp4"]


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [(errno.EROFS, MediaError, "Choose another folder"), (errno.ENOSPC, CapacityError, "is full")],
)
def test_a_folder_that_takes_no_files_is_refused(tmp_path, monkeypatch, number, kind, message):
    def fail(**_):
        raise OSError(number, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(kind, match=message):
        check_target(tmp_path / "a.mp4")


def test_frames_may_come_in_parts(tmp_path):
    ramp = torch.arange(48)[None, None, :, None] * 4 + torch.arange(20)[:, None, None, None]
    frames = ramp.expand(20, 32, 48, 3).to(torch.uint8)
    write_video(frames, 16, tmp_path / "whole.mp4", {"skyloom": "1", "seed": 1})
    with open_video(tmp_path / "parts.mp4", 16) as writer:
        for part in frames.split(7):
            writer.append(part)
        assert not (tmp_path / "parts.mp4").exists()
        writer.receipt = {"skyloom": "1", "seed": 1}
    whole, parts = (open_source(tmp_path / name) for name in ("whole.mp4", "parts.mp4"))
    assert torch.equal(whole.read(), parts.read())
    assert whole.receipt == parts.receipt == {"skyloom": "1", "seed": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.mp4", "whole.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_what_stops_half_way_leaves_nothing(tmp_path, suffix):
    with pytest.raises(KeyboardInterrupt), open_video(tmp_path / f"a{suffix}", 16) as writer:
        writer.append(torch.zeros(3, 32, 32, 3, dtype=torch.uint8))
        raise KeyboardInterrupt
    with (
        pytest.raises(MediaError, match="at least one frame"),
        open_video(tmp_path / f"a{suffix}", 16),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_player_at_a_pipe_sees_every_frame(tmp_path):
    frames = (torch.rand(40, 32, 48, 3) * 255).to(torch.uint8)
    pipe, lengths = io.BytesIO(), []
    with open_pipe(pipe, 16) as writer:
        for part in frames.split(10):
            writer.append(part)
            lengths.append(pipe.tell())
    assert lengths[-2] > lengths[0]  # it does not wait for the end
    (tmp_path / "x.mp4").write_bytes(pipe.getvalue())
    assert open_source(tmp_path / "x.mp4").read().shape == frames.shape


def test_a_player_that_goes_away_stops_nothing():
    class Gone(io.RawIOBase):
        def write(self, data):
            raise BrokenPipeError

        def writable(self):
            return True

    with open_pipe(Gone(), 16) as writer:
        for _ in range(3):
            writer.append(torch.zeros(20, 32, 32, 3, dtype=torch.uint8))
