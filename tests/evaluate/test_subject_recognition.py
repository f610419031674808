"""The subject of a clip: from its receipt, else from a confident probe."""

import pytest
import torch

from skyloom.evaluate.subject_recognition import (
    classify_subject,
    first_subject,
    recognize_subject,
    subject_in_receipt,
)
from skyloom.media.video import Video
from skyloom.models.diorama.probe import NONE, Probe, ProbeOutput, load_probe


@pytest.mark.parametrize(
    ("text", "thing"),
    [
        ("A big red cat runs after a blue dog", ("cat", "red")),
        ("a red and very old dog", ("dog", None)),
        ("an orange cat", ("cat", "orange")),
        ("an orange on the table", ("orange", None)),
        ("it kicks a blue soccer ball", ("soccer ball", "blue")),
        ("the sun sets over nothing", ("sun", None)),
        ("something walks by", None),
        ("catalogue, dogged", None),
        ("", None),
    ],
)
def test_the_first_subject_of_a_text(text, thing):
    assert first_subject(text) == thing


def test_receipts_of_any_shape_are_read():
    cards = [{"prompt": "nothing"}, {"prompt": "a white owl"}]
    assert subject_in_receipt({"request": {"prompt": "", "cards": cards}}) == ("owl", "white")
    assert subject_in_receipt({"request": {"prompt": "a red bus", "cards": cards}}) == (
        "bus",
        "red",
    )
    for broken in (
        {},
        {"request": 7},
        {"request": {"prompt": 7, "cards": "x"}},
        {"request": {"cards": [7, {}]}},
    ):
        assert subject_in_receipt(broken) is None


def test_the_receipt_is_believed(tmp_path):
    frames = torch.zeros(8, 64, 64, 3, dtype=torch.uint8)
    receipt = {"skyloom": "0.1.0", "request": {"prompt": "a purple octopus swims"}}
    found = recognize_subject(Video(frames, 16, receipt).save(tmp_path / "own.mp4"))
    assert (found.noun, found.colour, found.source, found.scores) == (
        "octopus",
        "purple",
        "receipt",
        {},
    )


def test_noise_and_black_frames_have_no_subject(tmp_path):
    noise = torch.randint(
        0, 256, (8, 96, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    for name, frames in (("noise", noise), ("nothing", torch.zeros_like(noise))):
        found = recognize_subject(Video(frames, 16).save(tmp_path / f"{name}.mp4"))
        assert (found.noun, found.colour, found.source) == (None, None, None)
        assert all(0 <= score <= 1 for score in found.scores.values())
        assert len(found.scores) == 3


class FixedProbe(Probe):
    """A probe with given scores."""

    def __init__(self, noun: float, thing: float, other: float, colour: float) -> None:
        super().__init__(load_probe().config)
        self._scores = (noun, thing, other, colour)

    def forward(self, video):
        config = self.config
        noun, thing, other, colour = self._scores
        nouns = torch.zeros(1, len(config.nouns))
        things = torch.full((1, len(config.nouns)), -9.0)
        nouns[0, 0] = noun
        things[0, 0] = thing
        things[0, 1] = other
        colours = torch.zeros(1, len(config.labels("colour")))
        colours[0, 1 if colour else 0] = colour or 20
        return ProbeOutput({"noun": nouns, "colour": colours}, torch.zeros(1, 1, 1), things)


@pytest.mark.parametrize(
    ("scores", "noun", "coloured"),
    [
        ((20, 3, -3, 20), True, True),
        ((20, 3, -3, 1), True, False),  # a colour, but not for sure
        ((20, 3, -3, 0), True, False),  # surely none
        ((1, 3, -3, 20), False, False),  # no thing stands out
        ((20, -1, -3, 20), False, False),  # it is not there
        ((20, 1, 3, 20), False, False),  # something else is, more so
    ],
)
def test_both_heads_must_agree(scores, noun, coloured):
    probe = FixedProbe(*scores)
    found = classify_subject(probe, torch.zeros(5, 64, 64, 3, dtype=torch.uint8))
    assert found.noun == (probe.config.nouns[0] if noun else None)
    assert found.colour == (probe.config.labels("colour")[1] if coloured else None)
    assert found.colour != NONE
