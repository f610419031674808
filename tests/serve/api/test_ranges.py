"""One range of bytes or none, whatever the header says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyloom.serve.api.ranges import read_range

SIZES = st.integers(0, 2**40)
NUMBERS = st.one_of(st.just(""), st.integers(0, 2**66).map(str))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=2-", (2, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=5-99", (5, 10)),
        ("bytes=10-", None),
        ("bytes=-0", None),
        ("bytes=5-2", (0, 10)),
        ("bytes=0-1,3-4", (0, 10)),
        ("lines=0-1", (0, 10)),
        ("bytes=", (0, 10)),
        ("bytes=-", (0, 10)),
        ("bytes=\u0661-", (0, 10)),
        (None, (0, 10)),
    ],
)
def test_ranges_of_ten_bytes(header, expected):
    found = read_range(header, 10)
    assert (found and (found.start, found.stop)) == expected


@settings(max_examples=1_000, deadline=None)
@given(NUMBERS, NUMBERS, SIZES)
def test_any_two_numbers_stay_inside(first, last, total):
    found = read_range(f"bytes={first}-{last}", total)
    if found is None:
        assert not first or int(first) >= total or total == 0
    else:
        assert 0 <= found.start <= found.stop <= total
        assert not found.partial or found.length > 0


@settings(max_examples=1_000, deadline=None)
@given(st.text(max_size=200), SIZES)
def test_any_text_is_a_range_or_none(header, total):
    found = read_range(header, total)
    assert found is None or 0 <= found.start <= found.stop <= total


def test_a_megabyte_of_ranges_is_the_whole_at_once():
    assert read_range("bytes=" + ",".join("0-" for _ in range(300_000)), 10**9).partial is False
