"""Requests generated from the OpenAPI document: no server error, no undocumented response.

`make fuzz` asks 10,000 times by SKYLOOM_FUZZ_CASES; here it is a few hundred.
"""

import os

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from skyloom.serve.api.app import create_app

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
SCHEMA = schemathesis.openapi.from_dict(create_app().openapi())
OPERATIONS = {
    f"{found.ok().method.upper()} {found.ok().path}": found.ok()
    for found in SCHEMA.get_all_operations()
}
CASES = max(1, int(os.environ.get("SKYLOOM_FUZZ_CASES", "300")) // len(OPERATIONS))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, make_server_once):
    """A server with one of everything, and the ids of these."""
    server = make_server_once(
        tmp_path_factory.mktemp("fuzz"), max_queued=10**6, max_queued_per_owner=10**6
    )
    http = server.http()
    video = http.post("/v1/videos", json={"prompt": "a cat"}).json()["id"]
    server.work()
    line = b'{"custom_id":"1","method":"POST","url":"/v1/videos","body":{"prompt":"a cat"}}'
    file = http.post(
        "/v1/files", files={"file": ("b.jsonl", line), "purpose": (None, "batch")}
    ).json()["id"]
    body = {"input_file_id": file, "endpoint": "/v1/videos"}
    hook = {"url": "https://example.org/", "event_types": ["video.failed"]}
    ids = {
        "videos": video,
        "files": file,
        "batches": http.post("/v1/batches", json=body).json()["id"],
        "webhook_endpoints": http.post("/v1/webhook_endpoints", json=hook).json()["id"],
        "models": "sora-2",
    }
    return http, ids


@pytest.mark.parametrize("name", OPERATIONS)
def test_generated_requests_get_documented_responses(prepared, name):
    (http, ids), operation = prepared, OPERATIONS[name]

    @settings(
        max_examples=CASES,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(), st.booleans())
    def ask(case, real):
        if real and "id" in (case.path_parameters or {}) and case.method.upper() != "DELETE":
            case.path_parameters["id"] = ids.get(case.path.split("/")[2], "none")
        sent = case.as_transport_kwargs(base_url=str(http.base_url))
        kept = ("method", "url", "params", "headers", "json", "data", "files")
        ready = requests.Request(**{key: sent[key] for key in kept if key in sent}).prepare()
        headers = {name: value for name, value in ready.headers.items() if name != "Content-Length"}
        answer = http.request(case.method, ready.url, content=ready.body or b"", headers=headers)
        case.validate_response(answer, checks=CHECKS)

    ask()
