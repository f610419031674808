"""Responses as pydantic models: OpenAI's fields and skyloom's own."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, AliasPath, BaseModel, BeforeValidator, ConfigDict, Field

from skyloom.serve.api.character_prompts import notice
from skyloom.serve.queue.batches import Batch
from skyloom.serve.queue.job import BLOCKED, JobFailure
from skyloom.serve.queue.job_metadata import JobMetadata
from skyloom.serve.queue.jobs import Job
from skyloom.serve.queue.library import Character
from skyloom.serve.queue.sessions import Session

MODEL_CREATED = 1758941485  # manifests have no date


class ResponseModel(BaseModel):
    """Base of responses; also made of objects with the same attributes. Defaults are sent too."""

    model_config = ConfigDict(
        from_attributes=True,
        populate_by_name=True,
        json_schema_serialization_defaults_required=True,
    )


class Resource(ResponseModel):
    """Base of everything that has an id."""

    id: str


T = TypeVar("T", bound=Resource)


def _whole_seconds(time: float | None) -> int | None:
    return None if time is None else int(time)


Timestamp = Annotated[int, BeforeValidator(_whole_seconds)]
"""Seconds since 1970."""


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
    created_at: Timestamp
    completed_at: Timestamp | None
    expires_at: Timestamp | None
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
    loras: list[dict[str, Any]]
    characters: list[dict[str, str]]
    consent: dict[str, str] | None
    notices: list[str]
    variations: list[str]

    @classmethod
    def from_job(cls, job: Job) -> Self:
        """Describe a job."""
        metadata = JobMetadata.from_row(job.metadata)
        base_model = str(job.request.get("model", "")).rpartition("/")[2]  # a folder's name only
        return cls(
            id=job.id,
            model=metadata.model,
            status=_status(job),
            progress=100 if job.status == "completed" else min(job.progress, 99),
            created_at=int(job.created_at),
            completed_at=_whole_seconds(job.completed_at),
            expires_at=_whole_seconds(job.expires_at),
            prompt=metadata.prompt,
            seconds=f"{seconds_of(job):g}",
            size=size_of(job),
            remixed_from_video_id=metadata.remixed_from,
            error=None if job.error is None else JobErrorResponse.from_failure(job.error),
            base_model=base_model,
            requested_size=metadata.requested_size or metadata.size,
            seed=job.request.get("seed"),
            fps=fps_of(job),
            has_audio=False,
            phase=job.phase,
            paused=job.status == "paused",
            attempts=job.attempts,
            verb=metadata.verb,
            parents=metadata.parents,
            loras=job.request.get("loras", []),
            characters=[{"id": id} for id in metadata.characters],
            consent=metadata.consent,
            notices=metadata.notices,
            variations=metadata.variations,
        )


class PlanResponse(ResponseModel):
    """Estimated cost of a video; nothing is generated."""

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


class SessionResponse(ResponseModel):
    """A signed-in caller. Times are seconds since 1970; None for a caller with an API key."""

    object: Literal["session"] = "session"
    owner: str
    scopes: list[str]
    expires_at: float | None

    @classmethod
    def from_session(cls, session: Session) -> "SessionResponse":
        """Describe a new session."""
        return cls(owner=session.owner, scopes=list(session.scopes), expires_at=session.expires_at)


class SessionDeletedResponse(ResponseModel):
    """Confirmation of a sign-out."""

    object: Literal["session.deleted"] = "session.deleted"
    deleted: bool = True


class SignInCodeResponse(ResponseModel):
    """A one-use sign-in code. `expires_at` is seconds since 1970."""

    object: Literal["session.code"] = "session.code"
    code: str
    expires_at: float


class CharacterResponse(Resource):
    """A character.

    `description` ("red cat") comes from the clip's receipt or from the probe (`source`), with
    scores; it is None if neither is certain.
    """

    object: Literal["character"] = "character"
    created_at: Timestamp
    name: str
    description: str | None = Field(validation_alias=AliasPath("likeness", "description"))
    source: str | None = Field(validation_alias=AliasPath("likeness", "source"))
    scores: dict[str, float] = Field(validation_alias=AliasPath("likeness", "scores"))
    consent: dict[str, str] | None
    notices: list[str] = []

    @classmethod
    def from_character(cls, character: Character) -> Self:
        """Describe a stored character."""
        response = cls.model_validate(character)
        response.notices = [notice(character, found=character.likeness.noun is not None)]
        return response


class ModelResponse(Resource):
    """A model name that requests may use; made of a ModelAlias."""

    id: str = Field(validation_alias="name")
    object: Literal["model"] = "model"
    created: int = MODEL_CREATED
    owned_by: str = Field(validation_alias=AliasPath("info", "family"))
    base_model: str = Field(validation_alias=AliasPath("info", "name"))
    sizes: list[str] = Field(validation_alias=AliasPath("info", "size_rule", "names"))
    fps: int = Field(validation_alias=AliasPath("info", "fps"))
    licence: str = Field(validation_alias=AliasPath("info", "licence"))


class FileResponse(Resource):
    """An uploaded file, or the output of a batch; made of a File."""

    object: Literal["file"] = "file"
    bytes: int = Field(validation_alias="size")
    created_at: Timestamp
    expires_at: int | None = None
    filename: str = Field(validation_alias="name")
    purpose: str
    status: Literal["processed"] = "processed"


class BatchCounts(ResponseModel):
    """Progress of a batch, in lines."""

    total: int
    completed: int
    failed: int


class BatchResponse(Resource):
    """A batch of videos."""

    object: Literal["batch"] = "batch"
    endpoint: str = "/v1/videos"
    input_file_id: str = Field(validation_alias="input_file")
    completion_window: str = "24h"
    status: Literal["in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
    output_file_id: str | None = Field(validation_alias="output_file")
    error_file_id: str | None = Field(validation_alias="error_file")
    created_at: Timestamp
    in_progress_at: Timestamp | None = Field(validation_alias="created_at")
    expires_at: Timestamp | None
    completed_at: Timestamp | None
    cancelled_at: Timestamp | None
    metadata: dict[str, str]
    request_counts: BatchCounts = BatchCounts(total=0, completed=0, failed=0)

    @classmethod
    def from_batch(cls, batch: Batch) -> Self:
        """Describe a batch."""
        response = cls.model_validate(batch)
        response.request_counts = BatchCounts.model_validate(batch)
        return response


class EndpointResponse(Resource):
    """A webhook endpoint, without its secret; made of an Endpoint."""

    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    created_at: Timestamp
    updated_at: Timestamp
    event_types: list[str]
    signing_secret_hint: Annotated[str, AfterValidator(lambda secret: f"...{secret[-4:]}")] = Field(
        validation_alias="secret"
    )


class NewEndpointResponse(EndpointResponse):
    """A webhook endpoint with a new secret, which is sent only here."""

    signing_secret: str = Field(validation_alias="secret")


class EndpointTestResponse(ResponseModel):
    """Response of a webhook endpoint to a test event."""

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
    def model_parametrized_name(cls, params: tuple[type[Any], ...]) -> str:
        """`VideoList` of `VideoResponse`, in the OpenAPI document."""
        return f"{params[0].__name__.removesuffix('Response')}List"

    @classmethod
    def from_rows(cls, rows: Sequence[T], *, has_more: bool = False) -> Self:
        """A page with the ids of its ends."""
        first_id = rows[0].id if rows else None
        last_id = rows[-1].id if rows else None
        return cls(data=list(rows), first_id=first_id, last_id=last_id, has_more=has_more)


VideoList = ListResponse[VideoResponse]
FileList = ListResponse[FileResponse]
BatchList = ListResponse[BatchResponse]
EndpointList = ListResponse[EndpointResponse]


class ModelList(ResponseModel):
    """All model names."""

    object: Literal["list"] = "list"
    data: list[ModelResponse]


def size_of(job: Job) -> str:
    """Width x height in pixels: of the made video, or of the request before it is made."""
    shape = _shape(job)
    return f"{shape[2]}x{shape[1]}" if shape else JobMetadata.from_row(job.metadata).size


def fps_of(job: Job) -> float | None:
    """Frames per second: of the made video, or of the request before it is made."""
    made = job.result.receipt.get("frames", {}).get("fps") if job.result else None
    return JobMetadata.from_row(job.metadata).fps if made is None else float(Fraction(made))


def seconds_of(job: Job) -> float:
    """Length from first to last frame in seconds; of an edit only known once it is made."""
    shape = _shape(job)
    metadata = JobMetadata.from_row(job.metadata)
    if not shape or job.result is None or metadata.verb in (None, "storyboard"):
        return metadata.duration
    return (shape[0] - 1) / float(Fraction(job.result.receipt["frames"].get("fps", 1)))


def _status(job: Job) -> Any:
    """A paused job stays queued or in progress for clients: they stop polling at unknown words."""
    if job.status == "paused":
        return "queued" if job.started_at is None else "in_progress"
    return job.status


def _shape(job: Job) -> tuple[int, ...]:
    """Shape (t, h, w, c) of the made frames, from the receipt; empty before."""
    receipt: Mapping[str, Any] = job.result.receipt if job.result else {}
    return tuple(receipt.get("frames", {}).get("shape", ()))
