"""Edit: JSON round trip, validation against the table of verbs and against the source video."""

import json
import subprocess
import sys
from dataclasses import fields
from fractions import Fraction
from pathlib import Path

import pytest

from skyloom.core.errors import RequestError
from skyloom.generate.edit_spec import Edit, check_source_limits
from skyloom.generate.edit_verbs import EDIT_VERBS, STRENGTHS
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


def test_named_strengths_are_increasing_numbers():
    assert [Edit("remix", ("a.mp4",), strength=word).strength for word in STRENGTHS] == sorted(
        STRENGTHS.values()
    )


def test_videos_may_be_path_objects():
    assert Edit("remix", (Path("a.mp4"),)) == Edit("remix", ("a.mp4",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"verb": "retkae", "videos": ["a"]}, "verb must be one of .* Did you mean retake"),
        ({"verb": "remix", "videos": "a.mp4"}, "videos must be a list of paths, got 'a.mp4'"),
        ({"verb": "remix", "videos": ["a", "b"]}, "videos must have 1 path for remix, got 2"),
        ({"verb": "blend", "videos": ["a"]}, "videos must have 2 paths for blend, got 1"),
        ({"verb": "stitch", "videos": ["a"]}, "videos must have 2 to 20 paths for stitch, got 1"),
        ({"verb": "remix", "videos": ["a"], "morph": "1"}, "morph is not a parameter of remix"),
        ({"verb": "remix", "videos": ["a"], "strength": 1.5}, r"from 0 to 1, .* got 1\.5"),
        ({"verb": "remix", "videos": ["a"], "strength": "nan"}, "strength must be .* got 'nan'"),
        ({"verb": "remix", "videos": ["a"], "strength": True}, "strength must be .* got True"),
        ({"verb": "retake", "videos": ["a"], "start": "soon"}, "start must be a time in seconds"),
        ({"verb": "retake", "videos": ["a"], "start": "-1"}, "start must be a time in seconds"),
        ({"verb": "retake", "videos": ["a"], "stop": "2:00:00"}, "stop must be <= 3600 seconds"),
        ({"verb": "inpaint", "videos": ["a"]}, "region or mask must be given"),
        (
            {"verb": "inpaint", "videos": ["a"], "region": "0,0,1,1", "mask": "m.png"},
            "region or mask must be given",
        ),
        (
            {"verb": "inpaint", "videos": ["a"], "region": "0,0,1,1", "feather": -1},
            "feather must be >= 0, got -1",
        ),
        (
            {"verb": "inpaint", "videos": ["a"], "region": "0,0,1,1", "feather": 257},
            "feather must be <= 256, got 257",
        ),
        ({"verb": "upscale", "videos": ["a"], "size": "big"}, "size must be WIDTHxHEIGHT"),
        ({"verb": "interpolate", "videos": ["a"], "fps": "fast"}, "fps must be a number"),
        ({"verb": "recut", "videos": ["a"]}, "seconds must be given for recut"),
        ({"verb": "restyle", "videos": ["a"]}, "style must be given for restyle"),
        ({"verb": "remix", "videos": ["a"], "volume": 3}, "no parameter 'volume'"),
        ({"verb": "remix"}, "videos must be given"),
    ],
)
def test_invalid_edits_are_refused(values, message):
    with pytest.raises(RequestError, match=message):
        Edit.from_dict(values)


def test_every_parameter_belongs_to_a_verb():
    parameters = {field.name for field in fields(Edit)} - {"verb", "videos", "strict"}
    assert parameters == {name for verb in EDIT_VERBS.values() for name in verb.field_names}


def test_required_names_are_fields_or_the_prompt():
    for verb in EDIT_VERBS.values():
        assert set(verb.required) <= {*verb.field_names, "prompt"}


def test_the_table_is_imported_without_torch():
    code = "import sys, skyloom.generate.edit_spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            Edit("upscale", ("a",), size="64x64"),
            r"size must be larger than .* \(64x64\), got 64x64",
        ),
        (Edit("upscale", ("a",), size="128x32"), "size must be larger than the video"),
        (Edit("interpolate", ("a",), fps=16), "fps must be > 16, .* got 16"),
        (Edit("retake", ("a",), start="3"), r"start must be < 2\.00 s"),
        (Edit("retake", ("a",), stop="3"), r"stop must be <= 2\.00 s"),
        (Edit("retake", ("a",), start="1.5", stop="1"), "stop must be at least one frame after"),
    ],
)
def test_edits_beyond_their_source_are_refused(edit, message):
    with pytest.raises(RequestError, match=message):
        check_source_limits(edit, width=64, height=64, fps=Fraction(16), frames=32)
