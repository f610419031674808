"""Bodies: names with brackets, caps before parsing, and text that is none."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.datastructures import Headers

from skyloom.serve.api.body import (
    MAX_DEPTH,
    MAX_ESCAPES,
    MAX_FORM_TEXT,
    MAX_PLAIN_FORM_TEXT,
    MAX_PLAIN_JSON,
    MAX_VALUES,
    SMALL,
    Intake,
    Upload,
    close_uploads,
    count_values,
    depth_of,
    read_body,
)
from skyloom.serve.api.errors import ApiError
from skyloom.serve.api.request_models import CreateBody, parse_body


async def _stream(content: bytes):
    for start in range(0, len(content), 1_000):
        yield content[start : start + 1_000]


def read(content: bytes, kind: str = "application/json", **options):
    """The fields of a body."""
    return asyncio.run(
        read_body(Headers({"content-type": kind}), _stream(content), Intake(**options))
    )


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
            [
                ("c[][at]", "0"),
                ("c[][text]", "x"),
                ("c[][at]", "2"),
                ("c[][text]", "y"),
                ("c[][image][id]", "z"),
            ],
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
    with pytest.raises(ApiError) as caught:
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
    with pytest.raises(ApiError) as caught:
        read(*form(*parts))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1"]
)
def test_json_is_utf_8_whatever_it_says(coding):
    content = '{"a": "\u00e9", "more": [' + "0," * 1_000 + "0]}"
    with pytest.raises(ApiError) as caught:
        read(content.encode(coding))
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    with pytest.raises(ApiError) as caught:
        read(content.encode(coding), f"application/json; charset={coding}")
    assert (caught.value.status, caught.value.code) == (415, "unsupported_charset")


@pytest.mark.parametrize(
    "kind",
    ["application/json", "application/json; charset=utf-8", 'application/json;charset="UTF-8"'],
)
def test_json_in_utf_8_is_taken_with_a_mark_too(kind):
    assert read('\ufeff{"a": "\u00e9"}'.encode(), kind) == {"a": "\u00e9"}


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=X"])
def test_packed_bodies_are_said_to_be(kind):
    with pytest.raises(ApiError, match="not compressed") as caught:
        asyncio.run(
            read_body(
                Headers({"content-type": kind, "content-encoding": "gzip"}), _stream(b"\x1f\x8b")
            )
        )
    assert caught.value.status == 415


def test_json_without_media_is_small():
    long = b'{"a": "' + b"a" * MAX_PLAIN_JSON + b'"}'
    assert read(long)
    with pytest.raises(ApiError) as caught:
        read(long, media=False)
    assert caught.value.status == 413


def test_json_of_very_many_escapes_is_not_parsed():
    few, many = (b'{"a": "' + b"\\/" * number + b'"}' for number in (MAX_ESCAPES, MAX_ESCAPES + 1))
    assert len(read(few)["a"]) == MAX_ESCAPES
    with pytest.raises(ApiError, match="escapes"):
        read(many)


@pytest.mark.parametrize(
    "text", ["[" * 40 + "]" * 40, "[" + "0," * MAX_VALUES + "0]", '{"a": "\\u0000"}', '["\\ud800"]']
)
def test_json_inside_of_a_form_has_the_limits_of_json(text):
    with pytest.raises(ApiError) as caught:
        parse_body(CreateBody, read(*form(("prompt", "a cat"), ("storyboard", text))))
    assert caught.value.code in ("invalid_json", "invalid_text")


def test_infinity_inside_of_a_form_is_no_json():
    with pytest.raises(ApiError):
        parse_body(
            CreateBody,
            read(*form(("prompt", "a cat"), ("storyboard", '[{"at": NaN, "prompt": "a"}]'))),
        )


@pytest.mark.parametrize(("media", "most"), [(False, MAX_PLAIN_FORM_TEXT), (True, MAX_FORM_TEXT)])
def test_texts_of_a_form_have_one_limit_together(media, most):
    fields = [(f"f{index}", "a" * (most // 4)) for index in range(4)]
    assert len(read(*form(*fields), media=media)) == 4
    with pytest.raises(ApiError, match="together") as caught:
        read(*form(*fields, ("more", "a")), media=media)
    assert caught.value.status == 413


def test_what_is_read_and_what_is_held_in_memory_are_told():
    taken, held = [], []
    content, kind = form(("a", "b" * 500), ("file", ("f", b"c" * 5_000)))
    close_uploads(read(content, kind, take=taken.append, hold=held.append))
    assert (sum(taken), sum(held)) == (len(content), 500)


def test_what_is_long_is_parsed_off_the_loop():
    parsed = []

    async def off_loop(work):
        parsed.append(work)
        return work()

    read(b'{"a": 1}', off_loop=off_loop)
    assert not parsed
    read(b'{"a": "' + b"a" * SMALL + b'"}', off_loop=off_loop)
    read(*form(("a", "b" * (SMALL + 1))), off_loop=off_loop)
    assert len(parsed) == 2


@pytest.mark.parametrize("kind", ["image/png", "video/mp4", "application/octet-stream"])
@pytest.mark.parametrize("name", ["", "; filename*=utf-8''a.png"])
def test_a_part_with_a_media_type_is_a_file_without_a_filename_too(kind, name):
    head = f'--X\r\nContent-Disposition: form-data; name="video"{name}\r\nContent-Type: {kind}\r\n\r\n'.encode()
    fields = read(head + b"\x89PNG\0\r\n--X--\r\n", "multipart/form-data; boundary=X")
    assert isinstance(fields["video"], Upload)
    close_uploads(fields)


def test_a_file_that_looks_like_text_is_told_what_it_lacks():
    with pytest.raises(ApiError, match="filename") as caught:
        read(*form(("video", "\0\0\0\x18ftypisom")))
    assert caught.value.param == "video"


def test_length_is_looked_at_before_anything_is_read():
    async def never():
        raise AssertionError("the body was read")
        yield b""

    headers = Headers({"content-type": "application/json", "content-length": str(2**40)})
    with pytest.raises(ApiError) as caught:
        asyncio.run(read_body(headers, never()))
    assert caught.value.status == 413


@pytest.mark.parametrize(
    "body", [(b"a" * 10_000, "application/json"), form(("f", ("f", b"a" * 10_000)))]
)
def test_a_body_that_lies_about_its_length_is_cut_off(body):
    with pytest.raises(ApiError) as caught:
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
    st.recursive(
        st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_values_are_never_counted_too_low(value):
    import json

    def count(part) -> int:
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return 1 + sum(map(count, inner))

    assert count(value) <= count_values(json.dumps(value).encode()) <= 2 * count(value)


@pytest.mark.parametrize("item", [b"[]", b'"a"', b"0"])
def test_json_of_very_many_values_is_not_parsed(item):
    few, many = (
        b'{"a": [' + b",".join([item] * number) + b"]}" for number in (50_000, MAX_VALUES + 1)
    )
    assert len(read(few, "application/json")["a"]) == 50_000
    with pytest.raises(ApiError, match="more than 200,000 values"):
        read(many, "application/json")


def test_depth_takes_no_longer_than_the_text_is_long():
    """Quadratic time would be days: the limit of a test's time is the assertion."""
    assert depth_of(b'"' + b'\\"' * 2_000_000) == 0
    assert depth_of(b'{"' * 1_000_000) <= MAX_DEPTH + 1


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_body_or_a_refusal(content):
    for kind in (
        "application/json",
        "multipart/form-data; boundary=X",
        "multipart/form-data",
        "text/plain",
    ):
        try:
            assert isinstance(read(content, kind), dict)
        except ApiError as error:
            assert error.status in (400, 415)
