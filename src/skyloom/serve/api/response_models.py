"""Responses as pydantic models: OpenAI's fields and skyloom's own."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from skyloom.serve.api.character_prompts import notice
from skyloom.serve.api.model_aliases import Named
from skyloom.serve.queue.batches import Batch
from skyloom.serve.queue.job import JobFailure
from skyloom.serve.queue.jobs import Job
from skyloom.serve.queue.library import Character, File
from skyloom.serve.queue.moderation_counters import BLOCKED
from skyloom.serve.queue.webhooks import Endpoint

MODEL_CREATED = 1758941485  # manifests have no date


class ResponseModel(BaseModel):
    """Base of responses. Fields with a default are always sent."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class Resource(ResponseModel):
    """Base of everything that has an id."""

    id: str


T = TypeVar("T", bound=Resource)


class JobErrorResponse(ResponseModel):
    """Why a job failed; `misalignment` explains what the policy has refused."""

    code: str
    message: str
    param: str | None = None
    type: str | None = None
    headers: dict[str, str] | None = None
    misalignment: dict[str, Any] | None = None

    @classmethod
    def from_failure(cls, failure: JobFailure) -> Self:
        """Describe a failure as OpenAI does."""
        error = cls(code=failure.code, message=failure.message)
        if failure.code == BLOCKED:
            steer = "Ask for something else."
            if failure.target == "input":
                steer = "Start from another picture or video."
            error.misalignment = {
                "detailed_explanation": failure.message,
                "error_type": "other",
                "review_target": None,
                "steer": {"message": steer},
            }
        return error


class VideoResponse(Resource):
    """A video job. `size` and `seconds` are the result's, `requested_size` is the request's."""

    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled", "expired"]
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    prompt: str | None
    seconds: str
    size: str
    remixed_from_video_id: str | None
    error: JobErrorResponse | None
    base_model: str
    requested_size: str
    seed: int | None
    fps: float | None
    has_audio: bool
    phase: str | None
    paused: bool
    attempts: int
    verb: str | None
    parents: list[str]
    characters: list[dict[str, str]]
    consent: dict[str, str] | None
    notices: list[str]
    variations: list[str]

    @classmethod
    def from_job(cls, job: Job) -> Self:
        """Describe a job."""
        extra = job.extra
        base_model = str(job.request.get("model", "")).rpartition("/")[2]  # a folder's name only
        return cls(
            id=job.id,
            model=extra.get("model", "sora-2"),
            status=_status(job),
            progress=100 if job.status == "completed" else min(job.progress, 99),
            created_at=int(job.created_at),
            completed_at=_seconds(job.completed_at),
            expires_at=_seconds(job.expires_at),
            prompt=extra.get("prompt"),
            seconds=f"{seconds_of(job):g}",
            size=size_of(job),
            remixed_from_video_id=extra.get("remixed_from"),
            error=None if job.error is None else JobErrorResponse.from_failure(job.error),
            base_model=base_model,
            requested_size=str(extra.get("requested_size", extra.get("size", ""))),
            seed=job.request.get("seed"),
            fps=fps_of(job),
            has_audio=bool(extra.get("has_audio", False)),
            phase=job.phase,
            paused=job.status == "paused",
            attempts=job.attempts,
            verb=extra.get("verb"),
            parents=list(extra.get("parents", [])),
            characters=[{"id": id} for id in extra.get("characters", [])],
            consent=extra.get("consent"),
            notices=list(extra.get("notices", [])),
            variations=list(extra.get("variations", [])),
        )


class PlanResponse(ResponseModel):
    """What a video would take; nothing is made."""

    object: Literal["video.plan"] = "video.plan"
    model: str
    size: str
    seconds: str
    fps: float
    steps: int
    guidance: float
    estimate: dict[str, Any]
    cards: list[dict[str, Any]]


class DeletedResponse(ResponseModel):
    """Confirmation of a deletion."""

    id: str
    object: str
    deleted: bool = True


class CharacterResponse(Resource):
    """A character. `description` ("red cat") comes from the clip's receipt or from the probe
    (`source`), with scores; it is None if neither is certain."""

    object: Literal["character"] = "character"
    created_at: int
    name: str
    description: str | None
    source: str | None
    scores: dict[str, float]
    consent: dict[str, str] | None
    notices: list[str]

    @classmethod
    def from_character(cls, character: Character) -> Self:
        """Describe a stored character."""
        likeness = character.likeness
        return cls(
            id=character.id,
            created_at=int(character.created_at),
            name=character.name,
            description=likeness.description,
            source=likeness.source,
            scores=dict(likeness.scores),
            consent=None if character.consent is None else dict(character.consent),
            notices=[notice(character, found=likeness.noun is not None)],
        )


class ModelResponse(Resource):
    """A model name that requests may use."""

    object: Literal["model"] = "model"
    created: int = MODEL_CREATED
    owned_by: str
    base_model: str
    sizes: list[str]
    fps: int
    licence: str

    @classmethod
    def from_named(cls, named: Named) -> Self:
        """Describe an installed model or an alias."""
        info = named.info
        return cls(
            id=named.name,
            owned_by=info.family,
            base_model=info.name,
            sizes=list(info.sizes),
            fps=info.fps,
            licence=info.licence,
        )


class FileResponse(Resource):
    """An uploaded file, or the output of a batch."""

    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str
    status: Literal["processed"] = "processed"

    @classmethod
    def from_file(cls, file: File) -> Self:
        """Describe a stored file."""
        return cls(
            id=file.id,
            bytes=file.size,
            created_at=int(file.created_at),
            filename=file.name,
            purpose=file.purpose,
        )


class BatchCounts(ResponseModel):
    """Progress of a batch, in lines."""

    total: int
    completed: int
    failed: int


class BatchResponse(Resource):
    """A batch of videos."""

    object: Literal["batch"] = "batch"
    endpoint: str = "/v1/videos"
    input_file_id: str
    completion_window: str = "24h"
    status: Literal["in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    completed_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    metadata: dict[str, str]

    @classmethod
    def from_batch(cls, batch: Batch) -> Self:
        """Describe a batch."""
        counts = BatchCounts(total=batch.total, completed=batch.completed, failed=batch.failed)
        return cls(
            id=batch.id,
            input_file_id=batch.input_file,
            status=batch.status,  # type: ignore[arg-type] - validated here
            output_file_id=batch.output_file,
            error_file_id=batch.error_file,
            created_at=int(batch.created_at),
            in_progress_at=int(batch.created_at),
            expires_at=int(batch.expires_at),
            completed_at=_seconds(batch.completed_at),
            cancelled_at=_seconds(batch.cancelled_at),
            request_counts=counts,
            metadata=dict(batch.metadata),
        )


class EndpointResponse(Resource):
    """A webhook endpoint."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    created_at: int
    updated_at: int
    event_types: list[str]
    signing_secret_hint: str

    @classmethod
    def from_endpoint(cls, endpoint: Endpoint) -> Self:
        """Describe an endpoint without its secret."""
        return cls(
            id=endpoint.id,
            name=endpoint.name,
            url=endpoint.url,
            created_at=int(endpoint.created_at),
            updated_at=int(endpoint.updated_at),
            event_types=list(endpoint.event_types),
            signing_secret_hint=f"...{endpoint.secret[-4:]}",
        )


class NewEndpointResponse(EndpointResponse):
    """A webhook endpoint with a new secret, which is sent only here."""

    signing_secret: str

    @classmethod
    def from_endpoint(cls, endpoint: Endpoint) -> Self:
        """Describe an endpoint with its secret."""
        fields = EndpointResponse.from_endpoint(endpoint).model_dump()
        return cls(**fields, signing_secret=endpoint.secret)


class EndpointTestResponse(ResponseModel):
    """How an endpoint answered a test event."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    event_type: str
    status_code: int | None
    success: bool
    webhook_endpoint_id: str


class EventTypesResponse(ResponseModel):
    """Event types that webhooks can subscribe to."""

    object: Literal["list"] = "list"
    data: list[str]


class ModerationResponse(ResponseModel):
    """Verdicts of the local policy."""

    id: str
    model: str
    results: list[dict[str, Any]]


class ProvenanceResponse(ResponseModel):
    """Provenance marks of a file."""

    object: Literal["content_provenance_check"] = "content_provenance_check"
    created_at: int
    results: list[dict[str, Any]]


class HealthResponse(ResponseModel):
    """Whether the process lives: `degraded` while a worker of its own is dead."""

    status: Literal["ok", "degraded"]
    workers: int
    restarts: int


class ReadyResponse(ResponseModel):
    """Whether jobs are accepted; counts are sent only if they are."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=False)

    status: Literal["ready", "no_workers", "draining", "disk_full", "no_database"]
    workers: int | None = None
    queued: int | None = None


class ErrorDetails(ResponseModel):
    """An error: sentence, type, parameter and code."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(ResponseModel):
    """OpenAI's error envelope."""

    error: ErrorDetails


class ListResponse(ResponseModel, Generic[T]):
    """A page of a list; `last_id` is the cursor of the next page."""

    object: Literal["list"] = "list"
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool

    @classmethod
    def from_rows(cls, rows: Sequence[T], *, has_more: bool = False) -> Self:
        """A page with the ids of its ends."""
        return cls(
            data=list(rows),
            first_id=rows[0].id if rows else None,
            last_id=rows[-1].id if rows else None,
            has_more=has_more,
        )


class VideoList(ListResponse[VideoResponse]):
    """A page of videos."""


class FileList(ListResponse[FileResponse]):
    """A page of files."""


class BatchList(ListResponse[BatchResponse]):
    """A page of batches."""


class EndpointList(ListResponse[EndpointResponse]):
    """All webhook endpoints."""


class ModelList(ResponseModel):
    """All model names."""

    object: Literal["list"] = "list"
    data: list[ModelResponse]


def size_of(job: Job) -> str:
    """Width x height in pixels: of the made video, or of the request before it is made."""
    shape = _shape(job)
    return f"{shape[2]}x{shape[1]}" if shape else str(job.extra.get("size", ""))


def fps_of(job: Job) -> float | None:
    """Frames per second: of the made video, or of the request before it is made."""
    made = job.result.receipt.get("frames", {}).get("fps") if job.result else None
    return job.extra.get("fps") if made is None else float(Fraction(made))


def seconds_of(job: Job) -> float:
    """Length from first to last frame in seconds; of an edit only known once it is made."""
    shape = _shape(job)
    if not shape or job.result is None or job.extra.get("verb") in (None, "storyboard"):
        return float(job.extra.get("seconds", 0))
    return (shape[0] - 1) / float(Fraction(job.result.receipt["frames"].get("fps", 1)))


def _status(job: Job) -> Any:
    """A paused job stays queued or in progress for clients: they stop polling at unknown words."""
    if job.status == "paused":
        return "queued" if job.started_at is None else "in_progress"
    return job.status


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


def _shape(job: Job) -> tuple[int, ...]:
    """Shape (t, h, w, c) of the made frames, from the receipt; empty before."""
    receipt: Mapping[str, Any] = job.result.receipt if job.result else {}
    return tuple(receipt.get("frames", {}).get("shape", ()))
