"""Batches of videos: a file of JSON lines in, files of answers out."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from skyloom.core.errors import SkyloomError
from skyloom.serve.api.body import count_values, load_json
from skyloom.serve.api.dependencies import AppServices, Cursor, PageSize, Reader, Services, Writer
from skyloom.serve.api.errors import ApiError, invalid, to_api_error
from skyloom.serve.api.openapi import errors
from skyloom.serve.api.request_models import BatchBody, CreateVideoBody, EmptyBody, parse_body
from skyloom.serve.api.response_models import BatchList, BatchResponse, VideoResponse
from skyloom.serve.api.routing import limit, make_router
from skyloom.serve.api.submit import SubmitOptions
from skyloom.serve.queue.batches import MAX_LINES, BatchActions, Line
from skyloom.serve.queue.jobs import Job
from skyloom.serve.storage import Asset

ENDPOINT = "/v1/videos"
WINDOW = "24h"
MAX_BYTES = 64 * 2**20
MAX_LINE = 2**20  # bytes
MAX_FILE_VALUES = 400_000  # JSON values; a request for a video has some twenty
_MAX_CUSTOM_ID = 200
router = make_router()


@router.post("/v1/batches", responses=errors(404))
@limit("batch")
def create_batch(body: BatchBody, caller: Writer, services: AppServices) -> BatchResponse:
    """Make many videos.

    The lines of the file become jobs as the owner's queue has room.
    """
    if body.endpoint != ENDPOINT:
        raise invalid("endpoint", f"endpoint must be {ENDPOINT}.")
    if body.completion_window != WINDOW:
        raise invalid("completion_window", f"completion_window must be {WINDOW}.")
    services.batches.check_room(caller.owner)
    file = services.library.file(body.input_file_id, caller.owner)
    if file.purpose != "batch" or file.size > MAX_BYTES:
        size = MAX_BYTES >> 20
        message = f"The file must have the purpose batch and {size} MiB at most."
        raise invalid("input_file_id", message)
    services.reserve.check(file.size)
    text = b"".join(services.storage.read(Asset.parse(file.asset)))
    lines = read_lines(text)
    batch = services.batches.create(caller.owner, file.id, body.metadata or {}, lines)
    return BatchResponse.from_batch(batch)


@router.get("/v1/batches", responses=errors(404))
def list_batches(
    caller: Reader, services: AppServices, after: Cursor = None, limit: PageSize = 20
) -> BatchList:
    """List batches, newest first."""
    rows, has_more = services.batches.list(caller.owner, after=after, limit=limit)
    return BatchList.from_rows([BatchResponse.from_batch(row) for row in rows], has_more=has_more)


@router.get("/v1/batches/{id}", responses=errors(404))
def get_batch(id: str, caller: Reader, services: AppServices) -> BatchResponse:
    """Get a batch."""
    return BatchResponse.from_batch(services.batches.get(id, caller.owner))


@router.post("/v1/batches/{id}/cancel", responses=errors(404))
def cancel_batch(id: str, body: EmptyBody, caller: Writer, services: AppServices) -> BatchResponse:
    """Cancel the jobs of a batch that have not ended."""
    return BatchResponse.from_batch(services.batches.cancel(id, caller.owner))


def advance(services: Services) -> None:
    """Submit lines and write results of every batch, as far as possible now."""

    def submit(owner: str, fields: Mapping[str, Any], key: str, deadline: float) -> Job:
        body = parse_body(CreateVideoBody, fields)
        return services.submitter.create_video(owner, body, SubmitOptions(key, deadline=deadline))

    def write(owner: str, name: str, text: bytes) -> str:
        asset = services.storage.put(BytesIO(text), "jsonl")
        return services.library.add_file(owner, "batch_output", name, asset.reference, len(text)).id

    def present(job: Job) -> dict[str, Any]:
        return VideoResponse.from_job(job).model_dump()

    def describe_error(error: SkyloomError, id: str) -> dict[str, Any]:
        answer = to_api_error(error, id)
        return {"status": answer.status, **answer.body["error"]}

    services.batches.advance(BatchActions(submit, write, present, describe_error))


def read_lines(text: bytes) -> list[Line]:
    """Parse the requests of a batch's file. Raises ApiError (400) naming the first wrong line."""
    if text.count(b"\n") > MAX_LINES:
        raise invalid("input_file_id", f"A batch has {MAX_LINES:,} lines at most.")
    if count_values(text) > MAX_FILE_VALUES:
        raise invalid("input_file_id", f"The file has more than {MAX_FILE_VALUES:,} JSON values.")
    found: dict[str, Line] = {}
    for number, row in enumerate(text.split(b"\n"), start=1):
        if row.strip():
            line = _parse_line(row, number)
            if line.custom_id in found:
                raise _wrong_line(number, "its custom_id was there before")
            found[line.custom_id] = line
    if not found:
        raise invalid("input_file_id", "The file has no lines.")
    return list(found.values())


def _parse_line(row: bytes, number: int) -> Line:
    value = _load_line(row, number)
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    if not isinstance(custom_id, str) or not custom_id:
        raise _wrong_line(number, "it needs a custom_id")
    body = value.get("body")
    if (value.get("method"), value.get("url")) != ("POST", ENDPOINT) or not isinstance(body, dict):
        raise _wrong_line(number, f"it needs method POST, url {ENDPOINT} and a body")
    return Line(custom_id[:_MAX_CUSTOM_ID], body)


def _load_line(row: bytes, number: int) -> Any:
    if len(row) > MAX_LINE:
        raise _wrong_line(number, "it is too long")
    try:
        return load_json(row)
    except ApiError as error:
        reason = f"it is not JSON within the limits ({error.message})"
        if error.code == "invalid_text":
            reason = "it has a character that is none"
        raise _wrong_line(number, reason) from error
    except (ValueError, RecursionError) as error:
        raise _wrong_line(number, "it is not JSON") from error


def _wrong_line(number: int, reason: str) -> ApiError:
    message = f"Line {number} cannot be a request: {reason}."
    return invalid("input_file_id", message, "invalid_batch_line")
