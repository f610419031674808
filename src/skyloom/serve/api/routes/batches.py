"""Batches over /v1/videos: a file of JSON lines in, files of answers out."""

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from skyloom.serve.api import response_models as answers
from skyloom.serve.api.body import count_values, load_json
from skyloom.serve.api.context import Asked, Call, Reply, Services
from skyloom.serve.api.errors import WireError, invalid
from skyloom.serve.api.request_models import BatchBody, Body, CreateBody, parse
from skyloom.serve.api.submit import Keys
from skyloom.serve.queue.batches import MAX_LINES, Line
from skyloom.serve.queue.jobs import Job
from skyloom.serve.storage import Asset

MAX_LINE, MAX_FILE_VALUES = (
    2**20,
    400_000,
)  # bytes of a line; a request to make a video has some twenty values
ENDPOINT, MAX_BYTES = "/v1/videos", 64 * 2**20


def create_batch(asked: Asked) -> Reply:
    """Take a file of lines; they become jobs as there is room."""
    body, services = parse(BatchBody, asked.fields), asked.services
    if body.endpoint != ENDPOINT:
        raise invalid("endpoint", f"endpoint must be {ENDPOINT}.")
    if body.completion_window != "24h":
        raise invalid("completion_window", "completion_window must be 24h.")
    services.batches.check_room(asked.owner)
    file = services.library.file(body.input_file_id, asked.owner)
    if file.purpose != "batch" or file.size > MAX_BYTES:
        raise invalid(
            "input_file_id",
            f"The file must have the purpose batch and {MAX_BYTES >> 20} MiB at most.",
        )
    services.reserve.check(file.size)
    text = b"".join(services.storage.read(Asset.parse(file.asset)))
    made = services.batches.create(asked.owner, file.id, body.metadata or {}, read_lines(text))
    return Reply(answers.batch(made))


def read_lines(text: bytes) -> list[Line]:
    """The requests of a batch's file. Raises WireError naming the first line that is none."""
    if text.count(b"\n") > MAX_LINES:
        raise invalid("input_file_id", f"A batch has {MAX_LINES:,} lines at most.")
    if count_values(text) > MAX_FILE_VALUES:
        raise invalid("input_file_id", f"The file has more than {MAX_FILE_VALUES:,} JSON values.")
    found: dict[str, Line] = {}
    for number, row in enumerate(text.split(b"\n"), start=1):
        if row.strip():
            line = _line(row, number)
            if line.custom_id in found:
                raise _wrong(number, "its custom_id was there before")
            found[line.custom_id] = line
    if not found:
        raise invalid("input_file_id", "The file has no lines.")
    return list(found.values())


def get_batch(asked: Asked) -> Reply:
    """How far a batch is."""
    return Reply(answers.batch(asked.services.batches.get(asked.id, asked.owner)))


def list_batches(asked: Asked) -> Reply:
    """The owner's batches, the newest first."""
    page = asked.page()
    rows, more = asked.services.batches.list(asked.owner, after=page.after, limit=page.limit)
    return Reply(answers.page([answers.batch(row) for row in rows], more=more))


def cancel_batch(asked: Asked) -> Reply:
    """Stop what has not ended."""
    return Reply(answers.batch(asked.services.batches.cancel(asked.id, asked.owner)))


def advance(services: Services) -> None:
    """Let every batch go on as far as it can."""

    def submit(owner: str, fields: Mapping[str, Any], key: str, deadline: float) -> Job:
        return services.desk.create(owner, parse(CreateBody, fields), Keys(key, deadline=deadline))

    def write(owner: str, name: str, text: bytes) -> str:
        asset = services.storage.put(BytesIO(text), "jsonl")
        return services.library.add_file(owner, "batch_output", name, asset.reference, len(text)).id

    services.batches.advance(submit, write, answers.video)


def _line(row: bytes, number: int) -> Line:
    if len(row) > MAX_LINE:
        raise _wrong(number, "it is too long")
    try:
        value = load_json(row)
    except WireError as error:
        plain = error.wire_code != "invalid_text"
        why = (
            f"it is not JSON within the limits ({error.message})"
            if plain
            else "it has a character that is none"
        )
        raise _wrong(number, why) from error
    except (ValueError, RecursionError) as error:
        raise _wrong(number, "it is not JSON") from error
    if (
        not isinstance(value, dict)
        or not isinstance(value.get("custom_id"), str)
        or not value["custom_id"]
    ):
        raise _wrong(number, "it needs a custom_id")
    if (
        value.get("method") != "POST"
        or value.get("url") != ENDPOINT
        or not isinstance(value.get("body"), dict)
    ):
        raise _wrong(number, f"it needs method POST, url {ENDPOINT} and a body")
    return Line(value["custom_id"][:200], value["body"])


def _wrong(number: int, why: str) -> WireError:
    return invalid(
        "input_file_id", f"Line {number} cannot be a request: {why}.", "invalid_batch_line"
    )


class _Nothing(Body):
    """A call without a body."""


CALLS = (
    Call(
        "POST",
        "/v1/batches",
        create_batch,
        "Make many videos.",
        answers.BatchAnswer,
        "write",
        BatchBody,
        faults=(404,),
        kind="batch",
    ),
    Call(
        "GET",
        "/v1/batches",
        list_batches,
        "List batches.",
        answers.BatchList,
        query=("after", "limit"),
        faults=(404,),
    ),
    Call(
        "GET", "/v1/batches/{id}", get_batch, "Look at a batch.", answers.BatchAnswer, faults=(404,)
    ),
    Call(
        "POST",
        "/v1/batches/{id}/cancel",
        cancel_batch,
        "Stop a batch.",
        answers.BatchAnswer,
        "write",
        _Nothing,
        faults=(404,),
    ),
)
