"""Edits as values: they survive JSON, and what is wrong, missing or without effect is told."""

import json
from pathlib import Path

import pytest

from skyloom.core.errors import RequestError
from skyloom.generate.edit_spec import STRENGTHS, Edit
from skyloom.generate.request import Request

GOOD = [
    Edit("remix", ("a.mp4",), strength="mild"),
    Edit("retake", ("a.mp4",), start="1", stop="1:02.5", strength=0),
    Edit("inpaint", ("a.mp4",), region="1,2,3,4", feather=2),
    Edit("extend", ("a.mp4",), seconds=2, backward=True),
    Edit("stitch", ("a.mp4", "b.mp4", "c.mp4"), morph="0", strict=True),
    Edit("interpolate", ("a.mp4",), fps=32),
]


@pytest.mark.parametrize("edit", GOOD, ids=lambda edit: edit.verb)
def test_edits_survive_json(edit):
    request = Request("a cat", edit=edit)
    again = Request.from_dict(json.loads(request.to_json()))
    assert again == request
    assert again.edit == edit


def test_words_for_strengths_are_numbers_that_rise():
    assert [Edit("remix", ("a.mp4",), strength=word).strength for word in STRENGTHS] == sorted(
        STRENGTHS.values()
    )


def test_paths_may_be_paths():
    assert Edit("remix", (Path("a.mp4"),)) == Edit("remix", ("a.mp4",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"verb": "retkae", "videos": ["a"]}, "Did you mean retake"),
        ({"verb": "remix", "videos": "a.mp4"}, "a list of paths"),
        ({"verb": "remix", "videos": ["a", "b"]}, "takes 1 videos, not 2"),
        ({"verb": "blend", "videos": ["a"]}, "takes 2 videos, not 1"),
        ({"verb": "remix", "videos": ["a"], "morph": "1"}, "no use for morph"),
        ({"verb": "remix", "videos": ["a"], "strength": 1.5}, r"strength of 1\.5"),
        ({"verb": "remix", "videos": ["a"], "strength": "nan"}, "strength of 'nan'"),
        ({"verb": "remix", "videos": ["a"], "strength": True}, "strength is True"),
        ({"verb": "retake", "videos": ["a"], "start": "soon"}, "no time"),
        ({"verb": "retake", "videos": ["a"], "start": "-1"}, "no time"),
        ({"verb": "inpaint", "videos": ["a"]}, "a region or a mask"),
        (
            {"verb": "inpaint", "videos": ["a"], "region": "0,0,1,1", "mask": "m.png"},
            "a region or a mask",
        ),
        ({"verb": "inpaint", "videos": ["a"], "region": "0,0,1,1", "feather": -1}, "feather of -1"),
        ({"verb": "recut", "videos": ["a"]}, "recut needs seconds"),
        ({"verb": "restyle", "videos": ["a"]}, "restyle needs style"),
        ({"verb": "remix", "videos": ["a"], "volume": 3}, "no field 'volume'"),
        ({"verb": "remix"}, "needs videos"),
    ],
)
def test_what_is_wrong_is_told(values, message):
    with pytest.raises(RequestError, match=message):
        Edit.from_dict(values)
