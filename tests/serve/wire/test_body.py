"""Bodies: names with brackets, caps before parsing, and text that is none."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from skyloom.serve.body import MAX_DEPTH, MAX_VALUES, Intake, Upload, close_uploads, count_values, depth_of, read_body
from skyloom.serve.faults import WireError


async def _stream(content: bytes):
    for start in range(0, len(content), 1_000):
        yield content[start : start + 1_000]


def read(content: bytes, kind: str = "application/json", **options):
    """The fields of a body."""
    return asyncio.run(read_body(Headers({"content-type": kind}), _stream(content), Intake(**options)))


def form(*parts: tuple[str, str | tuple[str, bytes]]) -> tuple[bytes, str]:
    """A multipart body and its type."""
    rows = []
    for name, value in parts:
        file = "" if isinstance(value, str) else f'; filename="{value[0]}"'
        content = value.encode() if isinstance(value, str) else value[1]
        head = f'--X\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        rows.append(head.encode() + content + b"\r\n")
    return b"".join(rows) + b"--X--\r\n", "multipart/form-data; boundary=X"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([("a", "1")], {"a": "1"}),
        ([("video[id]", "v")], {"video": {"id": "v"}}),
        ([("c[][id]", "1"), ("c[][id]", "2")], {"c": [{"id": "1"}, {"id": "2"}]}),
        ([("c[][id]", "1"), ("c[][name]", "x")], {"c": [{"id": "1", "name": "x"}]}),
        (
            [("c[][at]", "0"), ("c[][at]", "2"), ("c[][text]", "x"), ("c[][text]", "y")],
            {"c": [{"at": "0", "text": "x"}, {"at": "2", "text": "y"}]},
        ),
        (
            [("c[][at]", "0"), ("c[][text]", "x"), ("c[][at]", "2"), ("c[][text]", "y"), ("c[][image][id]", "z")],
            {"c": [{"at": "0", "text": "x"}, {"at": "2", "text": "y", "image": {"id": "z"}}]},
        ),
        ([("c[1]", "b"), ("c[0]", "a")], {"c": ["a", "b"]}),
        ([("c[]", "a"), ("c[]", "b")], {"c": ["a", "b"]}),
        ([("n[a]", "true")], {"n": {"a": "true"}}),
    ],
)
def test_names_with_brackets_are_nested(parts, expected):
    assert read(*form(*parts)) == expected


def test_files_are_uploads_with_harmless_labels():
    fields = read(*form(("video", ("../../etc/pass\u202ewd", b"data"))))
    upload = fields["video"]
    assert isinstance(upload, Upload)
    assert "/" not in upload.name
    assert upload.file.read() == b"data"
    close_uploads(fields)
    assert upload.file.closed


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"[1]", 400),
        (b"{", 400),
        (b'{"a": NaN}', 400),
        (b'{"a": "\\u0000"}', 400),
        (b'{"a": ["\\ud800"]}', 400),
        (b"\xff\xfe", 400),
        (b'{"a":' * 100 + b"1" + b"}" * 100, 400),
        (b"[" * 100_000, 400),
    ],
)
def test_json_that_is_no_request_is_refused(content, status):
    with pytest.raises(WireError) as caught:
        read(content)
    assert caught.value.status == status


@pytest.mark.parametrize(
    "parts",
    [
        [("a[", "1")],
        [("a]b", "1"), ("a]b[", "2")],
        [("[a]", "1")],
        [("a", "1"), ("a[b]", "2")],
        [("a" * 300, "1")],
        [("c[][at]", "0"), ("c[][at]", "2"), ("c[][text]", "x")],
        [(f"f{index}", "1") for index in range(500)],
        [("a[9999999999]", "1"), ("a" + "[b]" * 60, "1")],
        [(f"f{index}", ("f", b"1")) for index in range(50)],
    ],
)
def test_forms_without_measure_are_refused(parts):
    with pytest.raises(WireError) as caught:
        read(*form(*parts))
    assert caught.value.status == 400


def test_length_is_looked_at_before_anything_is_read():
    async def never():
        raise AssertionError("the body was read")
        yield b""

    headers = Headers({"content-type": "application/json", "content-length": str(2**40)})
    with pytest.raises(WireError) as caught:
        asyncio.run(read_body(headers, never()))
    assert caught.value.status == 413


@pytest.mark.parametrize("body", [(b"a" * 10_000, "application/json"), form(("f", ("f", b"a" * 10_000)))])
def test_a_body_that_lies_about_its_length_is_cut_off(body):
    with pytest.raises(WireError) as caught:
        read(*body, most=5_000)
    assert caught.value.status == 413


@settings(max_examples=300, deadline=None)
@given(st.recursive(st.text(), lambda inner: st.lists(inner, max_size=3), max_leaves=20))
def test_depth_is_the_depth_of_the_json(value):
    import json

    def depth(part) -> int:
        return 1 + max(map(depth, part), default=0) if isinstance(part, list) else 0

    assert depth_of(json.dumps(value).encode()) == min(depth(value), MAX_DEPTH + 1)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
)
def test_values_are_never_counted_too_low(value):
    import json

    def count(part) -> int:
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return 1 + sum(map(count, inner))

    assert count(value) <= count_values(json.dumps(value).encode()) <= 2 * count(value)


@pytest.mark.parametrize("item", [b"[]", b'"a"', b"0"])
def test_json_of_very_many_values_is_not_parsed(item):
    few, many = (b'{"a": [' + b",".join([item] * number) + b"]}" for number in (50_000, MAX_VALUES + 1))
    assert len(read(few, "application/json")["a"]) == 50_000
    with pytest.raises(WireError, match="more than 200,000 values"):
        read(many, "application/json")


def test_depth_takes_no_longer_than_the_text_is_long():
    """Quadratic time would be days: the limit of a test's time is the assertion."""
    assert depth_of(b'"' + b'\\"' * 2_000_000) == 0
    assert depth_of(b'{"' * 1_000_000) <= MAX_DEPTH + 1


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_body_or_a_refusal(content):
    for kind in ("application/json", "multipart/form-data; boundary=X", "multipart/form-data", "text/plain"):
        try:
            assert isinstance(read(content, kind), dict)
        except WireError as error:
            assert error.status in (400, 415)
