"""The lines of a batch's file, before any of them becomes a job."""

import json

import pytest

from skyloom.serve.api.errors import ApiError
from skyloom.serve.api.routes.batches import MAX_LINE, read_lines
from skyloom.serve.queue.batches import MAX_LINES


def line(number: int, body: object = None) -> bytes:
    """A line of a file."""
    asked = {
        "custom_id": f"l{number}",
        "method": "POST",
        "url": "/v1/videos",
        "body": body or {"prompt": "a cat"},
    }
    return json.dumps(asked).encode()


def test_batch_files_are_read_up_to_the_limit():
    rows = read_lines(b"\r\n".join(map(line, range(MAX_LINES))) + b"\n")
    assert (len(rows), rows[-1].custom_id) == (MAX_LINES, f"l{MAX_LINES - 1}")
    board = [{"at": at, "prompt": "a cat", "cut": True} for at in range(500)]
    assert (
        read_lines(line(1, {"prompt": "a cat", "storyboard": board}))[0].body["storyboard"] == board
    )
    assert [row.custom_id for row in read_lines(b"\n\n" + line(1) + b"\n \n" + line(2))] == [
        "l1",
        "l2",
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"\n".join(map(line, range(MAX_LINES + 2))), "10,000 lines at most"),
        (b"\n" * 1_000_000, "10,000 lines at most"),
        (line(1) + b"\n" + line(2, {"prompt": "a" * MAX_LINE}), "Line 2 .* too long"),
        (
            b"\n".join(line(n, {"prompt": "a cat", "more": [[]] * 50_000}) for n in range(9)),
            "more than 400,000 JSON",
        ),
        (b"[" * 100_000, "Line 1 .* not JSON"),
        (line(1) + b"\n" + line(1), "Line 2 .* there before"),
        (line(1, {"prompt": "\0"}), "Line 1 .* a character that is none"),
        (b"\n \n", "no lines"),
    ],
)
def test_oversized_or_wrong_lines_are_refused_by_number(text, why):
    with pytest.raises(ApiError, match=why):
        read_lines(text)
