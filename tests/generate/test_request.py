"""A request is the same however it is written down, and takes no value of the wrong kind."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyloom.core.errors import RequestError
from skyloom.core.types import MAX_SEED
from skyloom.generate.request import Request, parse_size

NUMBERS = st.none() | st.floats(allow_nan=False, allow_infinity=False)
REQUESTS = st.builds(
    Request,
    prompt=st.text(),
    model=st.none() | st.text(),
    seconds=NUMBERS,
    size=st.none() | st.text(),
    fps=NUMBERS,
    seed=st.none() | st.integers(),
    num_steps=st.none() | st.integers(),
    guidance_scale=NUMBERS,
    negative_prompt=st.text(),
    image=st.none() | st.text(),
)


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(REQUESTS)
def test_requests_survive_json(request_):
    assert Request.from_dict(json.loads(request_.to_json())) == request_


def test_unknown_fields_name_the_nearest():
    with pytest.raises(RequestError, match=r"no field 'promt'\. Did you mean 'prompt'"):
        Request.from_dict({"promt": "a"})
    with pytest.raises(RequestError, match=r"no field 'colour'\. Fields: prompt, model"):
        Request.from_dict({"prompt": "a", "colour": "red"})
    with pytest.raises(RequestError, match="prompt must be given"):
        Request.from_dict({"seed": 1})


def test_numbers_and_paths_become_plain():
    request = Request("a", seconds=np.float32(1.5), seed=np.int64(7), fps=8, image=Path("x.png"))
    assert json.loads(request.to_json()) == {
        "prompt": "a",
        "seconds": 1.5,
        "seed": 7,
        "fps": 8.0,
        "negative_prompt": "",
        "image": "x.png",
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"seed": True}, "an integer"),
        ({"num_steps": "20"}, "an integer"),
        ({"seconds": "2"}, "seconds must be a finite number, got '2'"),
        ({"seconds": float("nan")}, "finite"),
        ({"guidance_scale": float("inf")}, "finite"),
        ({"fps": True}, "finite"),
        ({"size": (128, 128)}, "size must be text"),
        ({"prompt": None}, "prompt must be text, got None"),
        ({"negative_prompt": None}, "text"),
        ({"image": b"x.png"}, "text"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        Request(**{"prompt": "a", **fields})


def test_a_seed_is_drawn_once_and_only_if_missing():
    drawn = Request("a").with_seed()
    assert 0 <= drawn.seed <= MAX_SEED
    assert drawn.with_seed() == drawn
    assert Request("a", seed=0).with_seed().seed == 0
    assert len({Request("a").with_seed().seed for _ in range(8)}) > 1


@pytest.mark.parametrize("text", ["128x96", " 128 X 96 ", "128\u00d796"])
def test_sizes_are_width_times_height(text):
    assert parse_size(text) == (128, 96)


@pytest.mark.parametrize("text", ["", "128", "x", "-1x5", "1.5x2", "999999x1", "128x128x3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(RequestError, match="size must be WIDTHxHEIGHT"):
        parse_size(text)
