"""The OpenAPI document, made of the same rows that requests are routed by."""

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from skyloom.core.version import __version__
from skyloom.serve.api.context import Call
from skyloom.serve.api.response_models import ErrorAnswer
from skyloom.serve.api.routes.videos import VARIANTS

_REFS = "#/components/schemas/{model}"
_FILES = {"input_reference", "video", "mask", "file"}
_ALWAYS = {
    400: "The request is wrong.",
    403: "Not from there, or not with this key.",
    429: "Too many at once, or the queue or the disk is full.",
    500: "The server failed.",
    503: "Not now: it drains, or its database does not answer.",
}
_SAID = {
    401: "No key, or one that is not valid.",
    404: "It is not there.",
    409: "Its state does not allow that.",
    410: "It has expired.",
    413: "The body is too long.",
    415: "Neither JSON nor multipart.",
    416: "The range lies outside.",
}
_QUERY: dict[str, dict[str, Any]] = {
    "after": {"type": "string"},
    "limit": {"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
    "order": {"type": "string", "enum": ["asc", "desc"], "default": "desc"},
    "variant": {"type": "string", "enum": list(VARIANTS), "default": "video"},
    "purpose": {"type": "string"},
}


def make_document(calls: Sequence[Call]) -> dict[str, Any]:
    """The whole document."""
    models = [call.body for call in calls if call.body] + [
        call.answer for call in calls if _is_model(call.answer)
    ]
    pairs = [(model, "validation") for model in dict.fromkeys([*models, ErrorAnswer])]
    _, schemas = models_json_schema(pairs, ref_template=_REFS)  # type: ignore[arg-type]
    paths: dict[str, dict[str, Any]] = {}
    for call in calls:
        paths.setdefault(call.path, {})[call.method.lower()] = _operation(call)
    return {
        "openapi": "3.1.0",
        "info": {"title": "skyloom", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(call: Call) -> dict[str, Any]:
    name = re.sub(r"\W+", "_", f"{call.method.lower()}{call.path}").strip("_")
    told: dict[str, Any] = {
        "operationId": name,
        "summary": call.summary,
        "responses": _responses(call),
    }
    told["security"] = [{"key": []}] if call.scope else []
    told["parameters"] = [
        {"name": found, "in": "path", "required": True, "schema": {"type": "string"}}
        for found in re.findall(r"{(\w+)}", call.path)
    ]
    told["parameters"] += [
        {"name": one, "in": "query", "schema": _QUERY[one]} for one in call.query
    ]
    if call.body is not None:
        told["requestBody"] = _body(call.body)
    return told


def _body(model: type[BaseModel]) -> dict[str, Any]:
    """JSON and multipart of the same fields; in multipart a reference may be a file."""
    name, fields = model.__name__, model.model_fields
    required = [key for key, field in fields.items() if field.is_required()]
    files = {key: {"type": "string", "format": "binary"} for key in fields if key in _FILES}
    texts = {key: {"type": "string"} for key in required if key not in files}
    form = {"type": "object", "properties": files | texts, "required": required}
    content: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if "file" not in fields:
        content = {"application/json": {"schema": {"$ref": _REFS.format(model=name)}}, **content}
    return {"required": bool(required), "content": content}


def _responses(call: Call) -> dict[str, Any]:
    envelope = {"application/json": {"schema": {"$ref": _REFS.format(model="ErrorAnswer")}}}
    codes = {*_ALWAYS, *call.faults, *((401,) if call.scope else ())}
    if call.method == "POST":
        codes |= {413, 415}
    answers: dict[str, Any] = {"200": {"description": "Done.", "content": _content(call.answer)}}
    if call.path.endswith("/content"):
        answers["206"] = {"description": "A part.", "content": _content(call.answer)}
        answers["304"] = {"description": "The client has it."}
    for code in sorted(codes):
        content = _content(call.answer) if call.path == "/ready" and code == 503 else envelope  # noqa: PLR2004
        answers[str(code)] = {"description": (_ALWAYS | _SAID)[code], "content": content}
    return answers


def _content(answer: type[BaseModel] | str) -> dict[str, Any]:
    if isinstance(answer, str):
        return {answer: {"schema": {"type": "string"}}}
    return {"application/json": {"schema": {"$ref": _REFS.format(model=answer.__name__)}}}


def _is_model(answer: type[BaseModel] | str) -> bool:
    return not isinstance(answer, str)
