"""The OpenAPI document: FastAPI's, with the bodies that BodyOf reads and errors of every route."""

import warnings
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from skyloom.serve.api.request_models import RequestBody
from skyloom.serve.api.response_models import ErrorResponse

_REFERENCE = "#/components/schemas/{model}"
_UPLOADS = {"input_reference", "video", "mask", "file"}
_DESCRIPTIONS = {
    400: "The request is wrong.",
    401: "No key, or one that is not valid.",
    403: "The Host, the Origin or the scopes of the key do not allow it.",
    404: "There is no such resource.",
    409: "The state of the resource does not allow it.",
    410: "The video has expired.",
    413: "The body is too long.",
    415: "The body is neither JSON nor multipart.",
    416: "The range lies outside of the file.",
    429: "Too many requests at once, or the queue or the disk is full.",
    500: "The server failed.",
    503: "The server is stopping, or its database does not answer.",
}
_EVERY_ROUTE: Sequence[int] = (400, 403, 429, 500, 503)
_WITH_KEY: Sequence[int] = (401,)
_WITH_BODY: Sequence[int] = (413, 415)


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: error statuses beside those of every route."""
    return {
        status: {"model": ErrorResponse, "description": _DESCRIPTIONS[status]}
        for status in statuses
    }


def content(*media_types: str, ranges: bool = False) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers with other types than JSON, or with stored files."""
    media = {"content": {one: {"schema": {"type": "string"}} for one in media_types}}
    if not ranges:
        return {200: media}
    part = {"description": "A part.", **media}
    return {200: media, 206: part, 304: {"description": "The client has it."}, **errors(404, 416)}


def describe_body(model: type[RequestBody]) -> dict[str, Any]:
    """JSON and multipart with the same fields; uploads in multipart only."""
    fields = model.model_fields
    required = [name for name, field in fields.items() if field.is_required()]
    parts: dict[str, Any] = {name: {"type": "string"} for name in required}
    parts.update(
        {name: {"type": "string", "format": "binary"} for name in fields if name in _UPLOADS}
    )
    form = {"type": "object", "properties": parts, "required": required}
    media: dict[str, Any] = {"multipart/form-data": {"schema": form}}
    if "file" not in fields:
        reference = {"$ref": _REFERENCE.format(model=model.__name__)}
        media = {"application/json": {"schema": reference}, **media}
    return {"required": bool(required), "content": media}


def build_document(app: FastAPI) -> dict[str, Any]:
    """Build the whole document once; later calls return the same."""
    if app.openapi_schema is None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Duplicate Operation ID")  # GET and HEAD of a route
            document = get_openapi(
                title=app.title,
                version=app.version,
                license_info=app.license_info,
                routes=app.routes,
            )
        for item in document["paths"].values():
            item.pop("head", None)
            for operation in item.values():
                _add_errors(operation)
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):  # of FastAPI's own 422
            schemas.pop(name, None)
        schemas.update(_body_schemas(str(document["paths"])))
        app.openapi_schema = document
    return app.openapi_schema


def _add_errors(operation: dict[str, Any]) -> None:
    statuses = [*_EVERY_ROUTE]
    if operation.get("security"):
        statuses += _WITH_KEY
    if "requestBody" in operation:
        statuses += _WITH_BODY
    envelope = {"application/json": {"schema": {"$ref": _REFERENCE.format(model="ErrorResponse")}}}
    responses = operation["responses"]
    responses.pop("422", None)  # FastAPI's own; the routes answer 400
    for status in statuses:
        description = {"description": _DESCRIPTIONS[status], "content": envelope}
        responses.setdefault(str(status), description)


def _body_schemas(paths: str) -> dict[str, Any]:
    """Schemas of the request bodies that `paths` refers to, and of what they contain."""
    models = [
        (model, "validation")
        for model in _subclasses(RequestBody)
        if f"'{_REFERENCE.format(model=model.__name__)}'" in paths
    ]
    _, schemas = models_json_schema(models, ref_template=_REFERENCE)  # type: ignore[arg-type]
    return schemas["$defs"]


def _subclasses(model: type[RequestBody]) -> list[type[RequestBody]]:
    children = model.__subclasses__()
    return [*children, *(found for child in children for found in _subclasses(child))]
