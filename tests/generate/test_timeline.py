"""Timelines: what is there follows in order, and where a source's own time goes by."""

from fractions import Fraction

import pytest

from skyloom.core.errors import RequestError
from skyloom.generate.timeline import Generate, Interpolate, Keep, SourceClip, make_timeline


def test_empty_spans_vanish_and_clips_that_follow_are_one():
    timeline = make_timeline(
        [
            None,
            Keep(SourceClip(0, 0, 4)),
            Keep(SourceClip(0, 4, 4)),
            Keep(SourceClip(0, 4, 9)),
            Keep(SourceClip(1, 9, 12)),
        ]
    )
    assert timeline.spans == (Keep(SourceClip(0, 0, 9)), Keep(SourceClip(1, 9, 12)))
    assert (timeline.frames, timeline.seams, timeline.generated_spans) == (12, (9,), ())


def test_what_may_not_move_from_its_source_is_kept():
    part = SourceClip(0, 3, 8)
    still = Generate(5, "a cat", "retake", init_clips=(part,), strength=0.0)
    assert make_timeline([Keep(SourceClip(0, 0, 3)), still, Keep(SourceClip(0, 8, 9))]).spans == (
        Keep(SourceClip(0, 0, 9)),
    )


def test_an_empty_timeline_is_refused():
    with pytest.raises(RequestError, match="at least one frame"):
        make_timeline([None, Keep(SourceClip(0, 5, 5))])


def test_sound_runs_where_the_time_of_a_source_goes_by():
    whole, remade = (
        SourceClip(0, 4, 8),
        Generate(4, "a cat", "retake", init_clips=(SourceClip(0, 4, 8),)),
    )
    retake = make_timeline([Keep(SourceClip(0, 0, 4)), remade, Keep(SourceClip(0, 8, 20))])
    assert retake.sound_clips == ((0, SourceClip(0, 0, 20)),)
    stitched = make_timeline(
        [Keep(whole), Generate(3, "a cat", "stitch 1"), Keep(SourceClip(1, 0, 5))]
    )
    assert stitched.sound_clips == ((0, whole), (7, SourceClip(1, 0, 5)))
    apart = make_timeline([Keep(whole), Generate(3, "a cat", "x"), Keep(SourceClip(0, 8, 9))])
    assert apart.sound_clips == ((0, whole), (7, SourceClip(0, 8, 9)))


@pytest.mark.parametrize(
    ("factor", "frames"), [(Fraction(2), 18), (Fraction(3, 2), 14), (Fraction(1), 9)]
)
def test_interpolation_makes_as_many_frames_as_the_time_holds(factor, frames):
    assert Interpolate(SourceClip(0, 1, 10), factor).frames == frames
