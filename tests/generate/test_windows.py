"""Window planner: windows generate every latent frame once, fit the model and see known frames."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyloom.core.errors import RequestError
from skyloom.core.types import ScaleFactors
from skyloom.generate.timeline import Generate, SourceClip
from skyloom.generate.windows import plan_prompts, plan_span
from skyloom.models.registry import Rollout

SCALE = ScaleFactors(4, 16)


def span(frames, before, after):
    sides = (
        SourceClip(0, 0, before) if before else None,
        SourceClip(0, before + frames, before + frames + after),
    )
    return Generate(frames, "a cat", "retake", sides[0], sides[1] if after else None)


@given(
    st.integers(1, 300),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(3, 12),
    st.one_of(st.none(), st.integers(1, 4)),
)
def test_windows_make_every_cell_once_and_see_what_is_known(frames, before, after, native, size):
    rollout = None if size is None else Rollout(2, 3, size)
    run = plan_span(span(frames, before, after), SCALE, native, rollout)
    generated = sorted(cell for one in run.windows for cell in range(*one.generated))
    known = {
        *range(run.known_before),
        *range(run.known_before + run.generated, run.latent_frames),
    }
    expected = list(range(run.known_before, run.known_before + run.generated))
    assert generated[: len(expected)] == expected
    assert generated == list(range(run.known_before, run.known_before + len(generated)))
    assert len(generated) - len(expected) < (size or 1)
    for number, window in enumerate(run.windows):
        first, end = window.generated
        assert window.start <= first < end <= window.stop
        assert window.stop - window.start <= native or (
            run.uses_cache and (number or run.known_before) and window.stop - window.start == size
        )
        seen = {*range(window.start, first), *range(end, window.stop)}
        assert seen <= known
        assert (
            seen
            or run.uses_cache
            or (number == 0 and not before and not after)
            or not (run.known_before or run.known_after)
        )
        known |= set(range(first, end))


def test_a_model_of_two_latent_frames_edits_nothing():
    with pytest.raises(RequestError, match="must be >= 9 frames for edits, got 5") as caught:
        plan_span(span(8, 9, 9), SCALE, 2, None)
    assert caught.value.field == "model"


@given(st.integers(1, 300), st.integers(0, 40), st.integers(0, 40))
def test_the_frames_of_a_span_lie_on_its_cells(frames, before, after):
    run = plan_span(span(frames, before, after), SCALE, 9, Rollout(2, 3, 3))
    first = SCALE.video_frames(run.known_before) if run.known_before else 0
    assert run.lead_frames == first, "a boundary of latent frames falls on the first frame"
    assert SCALE.video_frames(run.known_before + run.generated) >= run.lead_frames + frames
    assert (
        SCALE.video_frames(run.known_before + run.generated - 1) < run.lead_frames + frames
        or run.generated == 1
    )


@given(st.integers(1, 20), st.integers(9, 40), st.integers(12, 40))
def test_a_short_span_between_two_sides_takes_one_window(frames, before, after):
    run = plan_span(span(frames, before, after), SCALE, 9, Rollout(2, 3, 3))
    assert len(run.windows) == 1
    assert run.known_before
    assert run.known_after


def test_what_goes_on_has_a_memory_and_what_meets_something_has_not():
    assert plan_span(span(160, 33, 0), SCALE, 9, Rollout(2, 3, 3)).uses_cache
    assert not plan_span(span(160, 33, 33), SCALE, 9, Rollout(2, 3, 3)).uses_cache
    backward = plan_span(span(160, 0, 33), SCALE, 9, Rollout(2, 3, 3))
    firsts = [window.generated[0] for window in backward.windows]
    assert firsts == sorted(firsts, reverse=True)


@given(
    st.lists(st.integers(1, 100), min_size=2, max_size=5), st.integers(0, 40), st.integers(0, 40)
)
def test_prompts_of_one_shot_share_its_latent_frames(lengths, before, after):
    spans = tuple(
        replace(span(count, before, after), continues=index > 0, fade_frames=min(8, count))
        for index, count in enumerate(lengths)
    )
    run = plan_prompts(spans, SCALE, 9)
    assert run.frames == sum(lengths)
    cells = [cell for window in run.windows for cell in range(*window.generated)]
    assert cells == list(range(run.known_before, run.known_before + run.generated))
    assert all(window.stop - window.start <= 9 for window in run.windows)
    assert run.windows[-1].stop == run.latent_frames, "it sees the frames after the shot"
    for window in run.windows[1:]:
        assert window.start < window.generated[0]
    order = [window.span for window in run.windows]
    assert order == sorted(order)
