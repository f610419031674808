"""Request bodies: names with brackets, limits, invalid text."""

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
    BodyOptions,
    Upload,
    close_uploads,
    count_values,
    read_body,
)
from skyloom.serve.api.errors import ApiError
from skyloom.serve.api.request_models import CreateVideoBody, parse_body


async def _stream(content: bytes):
    for start in range(0, len(content), 1_000):
        yield content[start : start + 1_000]


def read(content: bytes, kind: str = "application/json", **options):
    """Parse a body."""
    return asyncio.run(
        read_body(Headers({"content-type": kind}), _stream(content), BodyOptions(**options))
    )


def form(*parts: tuple[str, str | tuple[str, bytes]]) -> tuple[bytes, str]:
    """Build a multipart body; returns it and its content type."""
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


def test_file_names_are_sanitised():
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
def test_invalid_json_is_rejected(content, status):
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
def test_malformed_and_excessive_forms_are_rejected(parts):
    with pytest.raises(ApiError) as caught:
        read(*form(*parts))
    assert caught.value.status == 400


@pytest.mark.parametrize(
    "coding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1"]
)
def test_json_must_be_utf_8(coding):
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
def test_json_in_utf_8_may_have_a_byte_order_mark(kind):
    assert read('\ufeff{"a": "\u00e9"}'.encode(), kind) == {"a": "\u00e9"}


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=X"])
def test_compressed_bodies_are_rejected(kind):
    with pytest.raises(ApiError, match="not compressed") as caught:
        asyncio.run(
            read_body(
                Headers({"content-type": kind, "content-encoding": "gzip"}), _stream(b"\x1f\x8b")
            )
        )
    assert caught.value.status == 415


def test_json_without_media_has_a_lower_limit():
    long = b'{"a": "' + b"a" * MAX_PLAIN_JSON + b'"}'
    assert read(long)
    with pytest.raises(ApiError) as caught:
        read(long, media=False)
    assert caught.value.status == 413


def test_json_with_too_many_escapes_is_not_parsed():
    few, many = (b'{"a": "' + b"\\/" * number + b'"}' for number in (MAX_ESCAPES, MAX_ESCAPES + 1))
    assert len(read(few)["a"]) == MAX_ESCAPES
    with pytest.raises(ApiError, match="escapes"):
        read(many)


@pytest.mark.parametrize(
    "text", ["[" * 40 + "]" * 40, "[" + "0," * MAX_VALUES + "0]", '{"a": "\\u0000"}', '["\\ud800"]']
)
def test_json_in_a_form_field_has_the_limits_of_json(text):
    with pytest.raises(ApiError) as caught:
        parse_body(CreateVideoBody, read(*form(("prompt", "a cat"), ("storyboard", text))))
    assert caught.value.code in ("invalid_json", "invalid_text")


def test_nan_in_a_form_field_is_rejected():
    with pytest.raises(ApiError):
        parse_body(
            CreateVideoBody,
            read(*form(("prompt", "a cat"), ("storyboard", '[{"at": NaN, "prompt": "a"}]'))),
        )


@pytest.mark.parametrize(
    ("media", "max_bytes"), [(False, MAX_PLAIN_FORM_TEXT), (True, MAX_FORM_TEXT)]
)
def test_text_parts_of_a_form_share_one_limit(media, max_bytes):
    fields = [(f"f{index}", "a" * (max_bytes // 4)) for index in range(4)]
    assert len(read(*form(*fields), media=media)) == 4
    with pytest.raises(ApiError, match="together") as caught:
        read(*form(*fields, ("more", "a")), media=media)
    assert caught.value.status == 413


def test_read_and_buffered_bytes_are_reported():
    read_bytes = []
    buffered = []
    content, kind = form(("a", "b" * 500), ("file", ("f", b"c" * 5_000)))
    close_uploads(read(content, kind, on_read=read_bytes.append, on_buffer=buffered.append))
    assert (sum(read_bytes), sum(buffered)) == (len(content), 500)


def test_large_texts_are_parsed_off_the_event_loop():
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
def test_a_part_with_a_media_type_needs_no_filename(kind, name):
    disposition = f'Content-Disposition: form-data; name="video"{name}'
    head = f"--X\r\n{disposition}\r\nContent-Type: {kind}\r\n\r\n".encode()
    fields = read(head + b"\x89PNG\0\r\n--X--\r\n", "multipart/form-data; boundary=X")
    assert isinstance(fields["video"], Upload)
    close_uploads(fields)


def test_a_file_without_filename_and_media_type_is_rejected():
    with pytest.raises(ApiError, match="filename") as caught:
        read(*form(("video", "\0\0\0\x18ftypisom")))
    assert caught.value.param == "video"


def test_content_length_is_checked_before_the_body_is_read():
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
def test_a_body_longer_than_the_limit_is_rejected(body):
    with pytest.raises(ApiError) as caught:
        read(*body, max_bytes=5_000)
    assert caught.value.status == 413


def test_nesting_is_limited():
    deepest = b'{"a":' + b"[" * (MAX_DEPTH - 1) + b'"[[["' + b"]" * (MAX_DEPTH - 1) + b"}"
    assert read(deepest)
    deeper = b'{"a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}"
    for text in (deeper, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"[" * 100_000):
        with pytest.raises(ApiError, match="nested at most 32 deep"):
            read(text)


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    )
)
def test_the_count_of_values_is_an_upper_bound(value):
    import json

    def count(part) -> int:
        inner = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        return 1 + sum(map(count, inner))

    assert count(value) <= count_values(json.dumps(value).encode())


@pytest.mark.parametrize("item", [b"[]", b'"a"', b"0"])
def test_json_with_too_many_values_is_not_parsed(item):
    few, many = (
        b'{"a": [' + b",".join([item] * number) + b"]}" for number in (50_000, MAX_VALUES + 1)
    )
    assert len(read(few, "application/json")["a"]) == 50_000
    with pytest.raises(ApiError, match="at most 200,000 values"):
        read(many, "application/json")


@pytest.mark.parametrize("number", [b"9" * 5_000, b"-" + b"9" * 30_000])
def test_numbers_of_many_digits_are_rejected(number):
    with pytest.raises(ApiError) as caught:
        read(b'{"a": ' + number + b"}")
    assert caught.value.code == "invalid_json"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_parsed_or_rejected(content):
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
