"""Clips: bytes that depend on the seed alone, and tracks that agree with frames and words."""

import dataclasses

import numpy as np
import pytest
import torch

from diorama.world.assets import builtin_atlas
from diorama.world.make import contact_sheet, make_clip
from diorama.world.motion import Path, pose_at
from diorama.world.places import PLACES
from diorama.world.render import boxes_of, render
from diorama.world.style import STYLES
from diorama.world.vocabulary import FULL, TINY
from diorama.world.weather import WEATHERS

ATLAS = builtin_atlas()
RICH = dataclasses.replace(FULL, nouns=TINY.nouns, weather=0.6, style=0.4, two_objects=0.5)


def clip_of(seed, vocabulary=TINY, **settings):
    return make_clip(
        seed,
        vocabulary,
        ATLAS,
        **{"frames": 9, "height": 48, "width": 48, "split": "all"} | settings,
    )


@pytest.mark.parametrize("seed", range(4))
def test_the_same_seed_gives_the_same_bytes_on_any_number_of_threads(seed):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = clip_of(seed, RICH, height=97, width=131)
        torch.set_num_threads(2)
        double = clip_of(seed, RICH, height=97, width=131)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(single.frames, double.frames)
    assert torch.equal(single.masks, double.masks)
    assert single.captions == double.captions


@pytest.mark.parametrize("seed", range(12))
def test_a_still_is_exactly_a_frame_of_its_clip(seed):
    clip = clip_of(seed, RICH)
    still = clip_of(seed, RICH, times=np.array([5 / 16]))
    assert torch.equal(still.frames[0], clip.frames[5])
    assert torch.equal(still.masks[:, 0], clip.masks[:, 5])


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(1, 64, 64), (1, 36, 64), (5, 64, 36), (17, 33, 47), (2, 16, 16)],
)
def test_any_size_and_length_works(frames, height, width):
    for seed in range(4):
        clip = clip_of(seed, RICH, frames=frames, height=height, width=width)
        assert clip.frames.shape == (frames, height, width, 3)
        assert clip.frames.dtype == torch.uint8
        assert clip.masks.shape == (len(clip.scene.subjects), frames, height, width)
        assert clip.tracks.shape == (len(clip.scene.subjects), frames, 4)


@pytest.mark.parametrize("seed", range(16))
def test_the_track_goes_where_the_caption_says(seed):
    clip = clip_of(seed, frames=17, height=64, width=64)
    first, last = clip.tracks[0, 0], clip.tracks[0, -1]
    shift = float((last[0] + last[2]) - (first[0] + first[2])) / 2 / 64
    if clip.facts.direction and first.any() and last.any():
        assert (shift > 0) == (clip.facts.direction == "right")
        assert abs(shift) > 0.25
        assert any(
            word in clip.captions.medium
            for word in (clip.facts.direction, clip.facts.direction + "ward")
        )


def test_subjects_are_large_and_in_the_frame():
    for seed in range(15):
        clip = clip_of(seed, frames=9, height=64, width=64)
        left, top, right, bottom = (clip.tracks[0, 4] / 64).tolist()
        assert 0.2 < max(right - left, bottom - top) < 0.85
        assert clip.masks[0].flatten(1).any(1).float().mean() > 0.7


def test_masks_are_where_the_subject_changes_the_picture():
    clip = clip_of(2)
    empty = render(
        dataclasses.replace(clip.scene, subjects=clip.scene.subjects[:1], props=()), ATLAS
    )
    hidden = dataclasses.replace(
        clip.scene.subjects[0],
        path=dataclasses.replace(clip.scene.subjects[0].path, base=-40.0),
        submerged=True,
    )
    without = render(dataclasses.replace(clip.scene, subjects=(hidden,), props=()), ATLAS)
    changed = (empty.frames.int() - without.frames.int()).abs().sum(-1) > 24
    inside = changed[empty.masks[0]].float().mean()
    far_outside = changed[
        ~torch.nn.functional.max_pool2d(empty.masks[0][:, None].float(), 25, 1, 12)[:, 0].bool()
    ]
    assert inside > 0.9
    assert far_outside.float().mean() < 0.05


def test_boxes_are_the_smallest_around_masks():
    masks = torch.zeros(1, 2, 8, 10, dtype=torch.bool)
    masks[0, 0, 2:5, 3:9] = True
    assert boxes_of(masks).tolist() == [[[3, 2, 9, 5], [0, 0, 0, 0]]]


@pytest.mark.parametrize("weather", WEATHERS)
def test_weather_can_be_seen(weather):
    scene = clip_of(1, frames=2).scene
    wet = render(dataclasses.replace(scene, weather=weather), ATLAS).frames
    dry = render(scene, ATLAS).frames
    assert (wet.int() - dry.int()).abs().float().mean() > 0.3


@pytest.mark.parametrize("style", STYLES)
def test_styles_change_the_whole_picture(style):
    scene = clip_of(1, frames=2).scene
    styled = render(dataclasses.replace(scene, style=style), ATLAS).frames
    assert (styled.int() - render(scene, ATLAS).frames.int()).abs().float().mean() > 3


@pytest.mark.parametrize("camera", [camera for camera in FULL.cameras if camera != "static"])
def test_cameras_move_the_background(camera):
    scene = dataclasses.replace(
        clip_of(0, frames=9).scene, place="meadow", time_of_day="day", props=()
    )
    moved = render(dataclasses.replace(scene, camera=camera), ATLAS).frames[:, :, :12]
    still = render(scene, ATLAS).frames[:, :, :12]
    assert torch.equal(still[0], still[-1]) or scene.subjects[0].direction
    assert (moved[0].int() - moved[-1].int()).abs().float().mean() > 0.2


@pytest.mark.parametrize("place", FULL.places)
def test_every_place_can_be_painted(place):
    scene = clip_of(0, frames=2).scene
    for hour in PLACES[place].times or (None,):
        frames = render(dataclasses.replace(scene, place=place, time_of_day=hour), ATLAS).frames
        assert frames.float().std() > 5


def test_a_contact_sheet_has_a_row_per_clip():
    sheet = contact_sheet([clip_of(0), clip_of(1)], columns=3)
    assert sheet.shape == (2 * 48, 3 * 48, 3)


@pytest.mark.parametrize("seed", range(6))
def test_a_long_scene_begins_like_a_short_one_and_comes_back(seed):
    """An act takes two seconds; after two acts, all moved objects are back at their start."""
    vocabulary = dataclasses.replace(TINY, two_objects=0.3)
    long = clip_of(seed, vocabulary, frames=73, fps=16)
    short = clip_of(seed, vocabulary, frames=33, fps=16)
    assert torch.equal(long.frames[:33], short.frames)


def test_who_went_there_comes_back_the_other_way_round():
    times = np.linspace(0, 6, 61)
    path = Path(0.5, 0.8, 0.5, 1, 0.0, (0.5, 0.5))
    walk = pose_at("walk", path, times, 2.0)
    assert np.allclose(walk.x[:21], walk.x[40:])
    assert np.allclose(walk.x[20:41], walk.x[20::-1])
    assert (np.sign(walk.stretch_x[1:20]) == 1).all()
    assert (np.sign(walk.stretch_x[21:40]) == -1).all()
    fall = pose_at("fall", path, times, 2.0)
    assert (fall.height[20:] == fall.height[20]).all()
