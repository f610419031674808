"""Files: pictures and videos to start from, and the lines of batches."""

import io
from typing import BinaryIO, cast

from fastapi import Request, Response

from skyloom.serve.api.dependencies import (
    AppServices,
    Cursor,
    Order,
    PageSize,
    Reader,
    Writer,
)
from skyloom.serve.api.downloads import send_asset
from skyloom.serve.api.errors import invalid
from skyloom.serve.api.media_inputs import sniff
from skyloom.serve.api.openapi import content, errors
from skyloom.serve.api.request_models import FileBody
from skyloom.serve.api.response_models import DeletedResponse, FileList, FileResponse
from skyloom.serve.api.routing import limit, make_router
from skyloom.serve.queue.library import PURPOSES
from skyloom.serve.storage.folder import Asset

_HEAD_BYTES = 64
router = make_router()


@router.post("/v1/files")
@limit("upload")
def create_file(body: FileBody, caller: Writer, services: AppServices) -> FileResponse:
    """Upload a file. Pictures and videos are recognised by their first bytes."""
    _check_purpose(body.purpose)
    file = cast(BinaryIO, body.file.file)
    file.seek(0)
    suffix = "jsonl" if body.purpose == "batch" else sniff(file.read(_HEAD_BYTES))
    if suffix is None:
        raise invalid("file", "'file' is no picture or video that can be read.", "invalid_media")
    size = file.seek(0, io.SEEK_END)
    services.library.check_room(caller.owner, files=1, file_bytes=size)
    file.seek(0)
    asset = services.media.store_as(file, suffix)
    stored = services.library.add_file(
        caller.owner, body.purpose, body.file.name, asset.reference, size
    )
    return FileResponse.model_validate(stored)


@router.get("/v1/files", responses=errors(404))
def list_files(
    caller: Reader,
    services: AppServices,
    after: Cursor = None,
    limit: PageSize = 20,
    order: Order = "desc",
    purpose: str | None = None,
) -> FileList:
    """List files."""
    if purpose is not None:
        _check_purpose(purpose)
    rows, has_more = services.library.files(
        caller.owner,
        purpose=purpose,
        after=after,
        limit=limit,
        newest_first=order == "desc",
    )
    return FileList.from_rows([FileResponse.model_validate(row) for row in rows], has_more=has_more)


@router.get("/v1/files/{id}", responses=errors(404))
def get_file(id: str, caller: Reader, services: AppServices) -> FileResponse:
    """Get a file's description."""
    return FileResponse.model_validate(services.library.file(id, caller.owner))


@router.get(
    "/v1/files/{id}/content",
    response_class=Response,
    responses=content("*/*", ranges=True),
)
@limit("download")
def get_file_content(id: str, request: Request, caller: Reader, services: AppServices) -> Response:
    """Download a file."""
    file = services.library.file(id, caller.owner)
    asset = Asset.parse(file.asset)
    return send_asset(request, services, caller.owner, asset, f"{file.id}.{asset.suffix}")


@router.delete("/v1/files/{id}", responses=errors(404))
def delete_file(id: str, caller: Writer, services: AppServices) -> DeletedResponse:
    """Delete a file."""
    services.library.delete_file(id, caller.owner)
    return DeletedResponse(id=id, object="file")


def _check_purpose(purpose: str) -> None:
    if purpose not in PURPOSES:
        raise invalid("purpose", f"purpose must be {', '.join(PURPOSES)}.")
