"""Seam blending: seams match in light for any chunking; other frames do not change."""

import pytest
import torch

from skyloom.generate.seam_blending import BLEND_FRAMES, SeamBlender
from skyloom.media.seam_metric import SeamMetric

COUNT = 20


def flat(value: int, count: int = COUNT) -> torch.Tensor:
    return torch.full((count, 32, 48, 3), value, dtype=torch.uint8)


def textured(seed: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (COUNT, 32, 48, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def run(frames: torch.Tensor, before=None, after=None, sizes=(COUNT,)) -> torch.Tensor:
    blender = SeamBlender(len(frames), before, after)
    return torch.cat([blender.blend(part) for part in frames.split(sizes)])


def test_another_light_is_faded_out_and_in():
    made = run(flat(100), flat(40)[0], flat(190)[0])[:, 0, 0, 0].tolist()
    assert made[:BLEND_FRAMES] == [40, 55, 70, 85]
    assert made[BLEND_FRAMES:-BLEND_FRAMES] == [100] * (COUNT - 2 * BLEND_FRAMES)
    assert made[-BLEND_FRAMES:] == [122, 145, 168, 190]


@pytest.mark.parametrize("sides", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("sizes", [(1,) * COUNT, (9, 0, 11), (3, 12, 5)])
def test_the_runs_that_frames_come_in_make_no_difference(sides, sizes):
    beside = [one if here else None for one, here in zip(textured(2)[:2], sides, strict=True)]
    frames = textured(1)
    assert torch.equal(run(frames, *beside, sizes=list(sizes)), run(frames, *beside))


def test_what_is_further_in_and_what_has_nothing_beside_it_stays():
    frames, (before, after) = textured(1), textured(2)[:2]
    made = run(frames, before, after)
    assert torch.equal(made[BLEND_FRAMES:-BLEND_FRAMES], frames[BLEND_FRAMES:-BLEND_FRAMES])
    assert not torch.equal(made[0], frames[0])
    assert not torch.equal(made[-1], frames[-1])
    assert torch.equal(run(frames), frames)
    assert torch.equal(run(frames, after=after)[:-BLEND_FRAMES], frames[:-BLEND_FRAMES])
    assert torch.equal(run(frames, before)[BLEND_FRAMES:], frames[BLEND_FRAMES:])


def test_edges_of_the_frame_beside_do_not_show():
    before = flat(100)[0].clone()
    before[:, 24:] = 200
    step = run(flat(100), before)[0, 16, :, 0].int().diff().abs().max()
    assert step < 100 / 4


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_short_spans_have_room_for_both_sides(count):
    made = run(flat(100, count), flat(40)[0], flat(190)[0], sizes=[1] * count)[:, 0, 0, 0].tolist()
    assert len(made) == count
    assert made == sorted(made)
    assert count == 1 or (made[0], made[-1]) == (40, 190)


def test_a_blended_join_changes_like_an_ordinary_step():
    def worst(made):
        meter = SeamMetric([COUNT])
        meter.take(torch.cat([moving(60), made]))
        return meter.ratios()[COUNT]

    def moving(level):
        return torch.stack([flat(level + number, 1)[0] for number in range(COUNT)])

    made = moving(140)
    assert worst(made) > 50
    assert worst(run(made, moving(60)[-1])) < 1.1
