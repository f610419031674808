"""Range headers of downloads: one range of bytes, or the whole file."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyloom.serve.api.downloads import parse_range
from skyloom.serve.api.errors import ApiError

SIZES = st.integers(0, 2**40)
NUMBERS = st.one_of(st.just(""), st.integers(0, 2**66).map(str))


def ranges_of(header: str | None, size: int) -> tuple[int, int] | int | None:
    """The range, or the status of the refusal."""
    try:
        return parse_range(header, size)
    except ApiError as error:
        return error.status


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=2-", (2, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=5-99", (5, 10)),
        ("bytes=10-", 416),
        ("bytes=-0", 416),
        ("bytes=5-2", None),
        ("bytes=0-1,3-4", None),
        ("lines=0-1", None),
        ("bytes=", None),
        ("bytes=-", None),
        ("bytes=\u0661-", None),
        (None, None),
    ],
)
def test_ranges_of_ten_bytes(header, expected):
    assert ranges_of(header, 10) == expected


@settings(max_examples=1_000, deadline=None)
@given(NUMBERS, NUMBERS, SIZES)
def test_any_two_numbers_stay_inside(first, last, size):
    found = ranges_of(f"bytes={first}-{last}", size)
    if found == 416:
        assert not first or int(first) >= size or size == 0
    elif found is not None:
        assert 0 <= found[0] < found[1] <= size


@settings(max_examples=1_000, deadline=None)
@given(st.text(max_size=200), SIZES)
def test_any_text_is_a_range_or_the_whole(header, size):
    found = ranges_of(header, size)
    assert found in (None, 416) or 0 <= found[0] < found[1] <= size


def test_a_megabyte_of_ranges_is_the_whole_at_once():
    assert parse_range("bytes=" + ",".join("0-" for _ in range(300_000)), 10**9) is None


def test_a_file_is_sent_whole_in_part_and_not_again(server):
    """FolderStorage and every object store answer alike: the range is of the API."""
    http = server.http()
    id = http.post("/v1/files", files={"file": ("a.png", b"\x89PNG\r\n\x1a\n0123456789")}).json()[
        "id"
    ]
    path = f"/v1/files/{id}/content"
    whole = http.get(path)
    etag = whole.headers["etag"]
    assert whole.status_code == 200
    assert whole.headers["accept-ranges"] == "bytes"
    part = http.get(path, headers={"range": "bytes=8-11", "if-range": etag})
    assert (part.status_code, part.content) == (206, b"0123")
    assert part.headers["content-range"] == "bytes 8-11/18"
    assert http.get(path, headers={"range": "bytes=8-11", "if-range": '"other"'}).status_code == 200
    outside = http.get(path, headers={"range": "bytes=18-"})
    assert (outside.status_code, outside.headers["content-range"]) == (416, "bytes */18")
    assert outside.json()["error"]["code"] == "range_not_satisfiable"
    head = http.head(path, headers={"range": "bytes=8-"})
    assert (head.status_code, head.headers["content-length"], head.content) == (206, "10", b"")
    assert http.head(path, headers={"if-none-match": etag}).status_code == 304
