"""Rejection sampling of windows: failing windows are sampled again and the best take is kept."""

from dataclasses import dataclass, field, replace

import pytest
import torch

import skyloom
from skyloom.core.errors import RequestError
from skyloom.generate.request import Request
from skyloom.generate.sampling import WindowScore

LONG = Request("a red cat on the beach", seed=7, seconds=2.5)


@dataclass
class DigestCritic:
    """Scores frames by their digest: every take gets another score, equal frames the same."""

    limit: float
    bounds: dict[str, float] = field(default_factory=lambda: {"digest": 1.0})
    seen: list[tuple[int, int, int]] = field(default_factory=list)

    def __call__(self, frames, first, before):
        self.seen.append((len(frames), 0 if first is None else len(first), len(before)))
        digest = int(frames.long().sum()) % 97 / 97
        return WindowScore(digest / self.limit, {"digest": digest})


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return skyloom.load(str(tiny_model), dtype="bfloat16")


def frames_of(steps):
    return torch.cat([step.frames for step in steps if step.frames is not None])


def report(video):
    return video.receipt["notes"]["critic"]["windows"]


def test_a_passing_critic_changes_no_bit(pipeline):
    plain = pipeline.generate(LONG)
    critic = DigestCritic(limit=2.0)
    video = pipeline.generate(LONG, critic=critic, retakes=3)
    assert torch.equal(video.frames, plain.frames)
    assert [one["kept"] for one in report(video)] == [0, 0, 0]
    assert critic.seen == [(17, 0, 0), (12, 17, 12), (12, 17, 12)]
    assert set(plain.receipt["notes"]) == {"schedule"}


def test_without_retakes_a_critic_only_reports(pipeline):
    video = pipeline.generate(LONG, critic=DigestCritic(limit=1e-6))
    assert torch.equal(video.frames, pipeline.generate(LONG).frames)
    assert [len(one["takes"]) for one in report(video)] == [1, 1, 1]


def test_the_best_take_wins_and_later_windows_follow_from_it(pipeline):
    video = pipeline.generate(LONG, critic=DigestCritic(limit=1e-6), retakes=3)
    assert [len(one["takes"]) for one in report(video)] == [4, 4, 4]
    start = 0
    for one, length in zip(report(video), (17, 12, 12), strict=True):
        digests = [take["measures"]["digest"] for take in one["takes"]]
        assert len(set(digests)) > 1
        assert one["kept"] == digests.index(min(digests))
        shown = video.frames[start : start + length]
        assert int(shown.long().sum()) % 97 / 97 == min(digests)
        start += length
    again = pipeline.generate(LONG, critic=DigestCritic(limit=1e-6), retakes=3)
    assert torch.equal(again.frames, video.frames)
    assert again.receipt == video.receipt


def test_it_stops_at_the_first_take_that_passes(pipeline):
    video = pipeline.generate(LONG, critic=DigestCritic(limit=0.5), retakes=9)
    for one in report(video):
        scores = [take["score"] for take in one["takes"]]
        assert all(score > 1 for score in scores[:-1])
        assert one["kept"] == scores.index(min(scores))
    assert max(len(one["takes"]) for one in report(video)) > 1


def test_a_longer_video_begins_with_the_same_takes(pipeline):
    short = pipeline.generate(LONG, critic=DigestCritic(limit=0.3), retakes=2).frames
    long = pipeline.generate(
        replace(LONG, seconds=4), critic=DigestCritic(limit=0.3), retakes=2
    ).frames
    assert torch.equal(long[: len(short)], short)


def test_stopped_after_some_steps_it_goes_on_with_the_same_takes(pipeline, tmp_path):
    request = replace(LONG, retakes=2)
    whole = pipeline.generate(request, critic=DigestCritic(limit=0.3))
    total = len(list(pipeline.stream(request, critic=DigestCritic(limit=0.3))))
    for count in range(1, total, 5):
        folder = tmp_path / str(count)
        stream = pipeline.stream(request, critic=DigestCritic(limit=0.3), resume=folder)
        for _ in range(count):
            next(stream)
        stream.close()
        again = list(pipeline.stream(request, critic=DigestCritic(limit=0.3), resume=folder))
        assert torch.equal(frames_of(again), whole.frames)
        assert again[-1].receipt == whole.receipt


def test_retakes_need_a_critic_and_a_number_in_range(pipeline):
    with pytest.raises(RequestError, match="critic must be given"):
        pipeline.stream(LONG, retakes=1)
    for number in (0, 21, -1):
        with pytest.raises(RequestError, match="retakes must be from 1 to 20"):
            pipeline.stream(LONG, retakes=number, critic=DigestCritic(limit=1.0))


def test_another_card_has_another_first_window_and_another_shot_nothing_before(pipeline):
    cards = [
        {"at": 0, "prompt": "a cat"},
        {"at": 1.5, "prompt": "a dog", "cut": True},
        {"at": 3, "prompt": "a red cat"},
    ]
    critic = DigestCritic(limit=2.0)
    pipeline.generate("", seed=7, seconds=4.5, cards=cards, critic=critic, retakes=1)
    firsts, befores = ([one[index] for one in critic.seen] for index in (1, 2))
    assert firsts[0] == befores[0] == 0
    begin = befores.index(0, 1)  # the cut
    assert firsts[begin] == 0
    assert all(befores[begin + 1 :])
    assert 0 in firsts[begin + 1 :]  # the third card, while it fades in
    assert firsts[begin + 1] == critic.seen[begin][0]
