"""Host, Origin, fetch metadata, hostile paths and oversized headers."""

import itertools
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HOST = "127.0.0.1:8765"
HOSTS = [
    *(
        HOST,
        "127.0.0.1",
        "127.0.0.1:80",
        "localhost:8765",
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
    ),
    *("", "[::1]:8765", "127.0.0.1:8765.", "0.0.0.0:8765", "127.0.0.1:8765@evil.example"),
]
ORIGINS = [
    *(
        None,
        f"http://{HOST}",
        "null",
        "http://evil.example",
        "https://evil.example",
        "http://127.0.0.1",
    ),
    *("http://localhost:9999", "file://", f"http://{HOST}.evil.example", ""),
]
METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"]
MATRIX = list(itertools.product(HOSTS, ORIGINS, METHODS))


def test_840_combinations_of_host_origin_and_method(server):
    """Only the own Host is served, and only the own Origin may change anything."""
    assert len(MATRIX) == 840
    http, through = server.http(), []
    job = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    for host, origin, method in MATRIX:
        headers = {"host": host} | ({} if origin is None else {"origin": origin})
        status = http.request(method, "/v1/videos/none", headers=headers).status_code
        if status != 403:
            through.append((host, origin, method))
    assert {host for host, _, _ in through} == {HOST}
    changing = {
        (origin, method)
        for _, origin, method in through
        if method not in ("GET", "HEAD", "OPTIONS")
    }
    assert {origin for origin, _ in changing} == {None, f"http://{HOST}"}
    assert server.services.jobs.get(job).status == "queued"


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_cross_site_fetch_metadata_is_refused(server, site, method):
    http = server.http()
    answer = http.request(method, "/v1/videos/none", headers={"sec-fetch-site": site})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert (
        http.request(method, "/v1/videos", headers={"sec-fetch-site": "same-origin"}).status_code
        != 403
    )


def test_repeated_host_or_origin_headers_are_refused(server):
    http = server.http()
    twice = [("host", HOST), ("host", "evil.example"), ("authorization", "Bearer x")]
    assert http.get("/v1/videos", headers=twice).status_code == 403
    origins = [("origin", f"http://{HOST}"), ("origin", "http://evil.example")]
    assert http.post("/v1/videos", headers=origins).status_code == 403


def test_simple_forms_of_other_sites_are_415(server):
    """Simple forms can send urlencoded and plain text; both are refused."""
    http = server.http()
    for kind in ("application/x-www-form-urlencoded", "text/plain"):
        assert (
            http.post(
                "/v1/videos", content=b"prompt=cat", headers={"content-type": kind}
            ).status_code
            == 415
        )


def test_oversized_headers_and_paths_are_refused(server):
    http = server.http()
    assert (
        http.get("/health", headers={f"x-{number}": "1" for number in range(200)}).status_code
        == 431
    )
    assert http.get("/health", headers={"x-long": "a" * 2**20}).status_code == 431
    assert http.get("/" + "a" * 5_000).status_code == 414
    assert http.get("/health").status_code == 200


def test_no_response_has_cors_headers(server):
    """All responses have the security headers instead."""
    answers = [
        server.http().get(path) for path in ("/health", "/v1/videos", "/nowhere", "/openapi.json")
    ]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["x-content-type-options"] == "nosniff"


HOSTILE = [
    "..",
    ".",
    "%2e%2e",
    "%2f",
    "%5c",
    "\\",
    "%00",
    "etc/passwd",
    "C:",
    "con",
    "~",
    ";",
    "%c0%ae",
    "skyloom.db",
    "?",
]
SEGMENTS = st.one_of(
    st.sampled_from(HOSTILE), st.text(string.printable.replace("#", ""), min_size=1, max_size=12)
)


@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["/", "/v1/videos/", "/v1/files/", "/v1/"]),
    st.lists(SEGMENTS, min_size=1, max_size=6),
)
def test_500_hostile_paths_reach_no_file(server, start, segments):
    path = start + "/".join(segments)
    raw = path.encode("utf-8", "replace").replace(b" ", b"%20")
    raw = bytes(sign for sign in raw if 32 < sign < 127) or b"/"
    answer = server.http().request("GET", "http://" + HOST + raw.decode("ascii").split("?")[0])
    assert answer.status_code in (200, 400, 404, 405)
    if answer.status_code == 200:
        assert answer.headers["content-type"].startswith(("application/json", "text/plain"))
        assert b"root:" not in answer.content
