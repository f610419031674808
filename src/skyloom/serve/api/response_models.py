"""Answers: what the server says, as OpenAI's clients read it. Fields of our own reach them as attributes."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Literal

from pydantic import BaseModel

from skyloom.serve.api.character_prompts import notice
from skyloom.serve.queue.batches import Batch
from skyloom.serve.queue.job import JobFailure
from skyloom.serve.queue.job_metadata import JobMetadata
from skyloom.serve.queue.jobs import Job
from skyloom.serve.queue.library import Character, File
from skyloom.serve.queue.moderation_counters import BLOCKED

JOB_ERROR: Mapping[str, Any] = {"param": None, "type": None, "headers": None, "misalignment": None}


class JobError(BaseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None
    type: str | None
    headers: dict[str, str] | None
    misalignment: dict[str, Any] | None


class VideoAnswer(BaseModel):
    """A video job. `size` and `seconds` are what is made; `requested_size` is what was asked for."""

    id: str
    object: Literal["video"]
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
    error: JobError | None
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


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"]
    data: list[VideoAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(BaseModel):
    """Something is gone."""

    id: str
    object: str
    deleted: bool


class CharacterAnswer(BaseModel):
    """A character: who its clip shows ("red cat"), as the clip's `receipt` or the `probe` says, and with what scores;
    None where nobody is sure."""

    id: str
    object: Literal["character"]
    created_at: int
    name: str
    description: str | None
    source: str | None
    scores: dict[str, float]
    consent: dict[str, str] | None
    notices: list[str]


class ModelAnswer(BaseModel):
    """A model that can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    base_model: str
    sizes: list[str]
    fps: int
    licence: str


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"]
    data: list[ModelAnswer]


class FileAnswer(BaseModel):
    """A file of a client's."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["processed"]


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"]
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class BatchCounts(BaseModel):
    """How far a batch is."""

    total: int
    completed: int
    failed: int


class BatchAnswer(BaseModel):
    """A batch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    input_file_id: str
    completion_window: str
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


class BatchList(BaseModel):
    """A page of batches."""

    object: Literal["list"]
    data: list[BatchAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EndpointAnswer(BaseModel):
    """A webhook endpoint; the secret is told when it is made or rotated, and never again."""

    id: str
    object: Literal["webhook_endpoint"]
    created_at: int
    updated_at: int
    name: str
    url: str
    event_types: list[str]
    signing_secret_hint: str
    signing_secret: str | None = None


class EndpointList(BaseModel):
    """All webhook endpoints."""

    object: Literal["list"]
    data: list[EndpointAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class EndpointTest(BaseModel):
    """What an endpoint said to a test event."""

    object: Literal["webhook_endpoint.test"]
    event_type: str
    status_code: int | None
    success: bool
    webhook_endpoint_id: str


class EventTypes(BaseModel):
    """Events that webhooks can be sent of."""

    object: Literal["list"]
    data: list[str]


class ModerationAnswer(BaseModel):
    """Whether texts are allowed by the local policy."""

    id: str
    model: str
    results: list[dict[str, Any]]


class ProvenanceAnswer(BaseModel):
    """What marks a file carries."""

    object: Literal["content_provenance_check"]
    created_at: int
    results: list[dict[str, Any]]


class PlanAnswer(BaseModel):
    """What a video would take; nothing is made."""

    object: Literal["video.plan"]
    model: str
    size: str
    seconds: str
    fps: float
    steps: int
    guidance: float
    estimate: dict[str, Any]
    cards: list[dict[str, Any]]


class Health(BaseModel):
    """Whether the server lives, and can take jobs."""

    status: str
    workers: int | None = None
    restarts: int | None = None
    queued: int | None = None


class ErrorBody(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorBody


def video(job: Job) -> dict[str, Any]:
    """A job as a Video."""
    metadata = JobMetadata.from_row(job.extra)
    request = job.request
    return {
        "id": job.id,
        "object": "video",
        "model": metadata.model,
        "status": _status(job),
        "progress": 100 if job.status == "completed" else min(job.progress, 99),
        "created_at": int(job.created_at),
        "completed_at": _whole(job.completed_at),
        "expires_at": _whole(job.expires_at),
        "prompt": metadata.prompt,
        "seconds": f"{seconds_of(job):g}",
        "size": size_of(job),
        "remixed_from_video_id": metadata.remixed_from,
        "error": None if job.error is None else _error(job.error),
        "base_model": str(request.get("model", "")).rpartition("/")[
            2
        ],  # of a folder the name, no path of this machine
        "requested_size": metadata.requested_size or metadata.size,
        "seed": request.get("seed"),
        "fps": fps_of(job),
        "has_audio": False,
        "phase": job.phase,
        "paused": job.status == "paused",
        "attempts": job.attempts,
        "verb": metadata.verb,
        "parents": metadata.parents,
        "characters": [{"id": id} for id in metadata.characters],
        "consent": metadata.consent,
        "notices": metadata.notices,
        "variations": metadata.variations,
    }


def size_of(job: Job) -> str:
    """Width x height: of what was made, or what is to be."""
    shape = _shape(job)
    return f"{shape[2]}x{shape[1]}" if shape else JobMetadata.from_row(job.extra).size


def fps_of(job: Job) -> float | None:
    """Frames a second: of what was made, or of what is to be."""
    made = job.result.receipt.get("frames", {}).get("fps") if job.result else None
    return JobMetadata.from_row(job.extra).fps if made is None else float(Fraction(made))


def seconds_of(job: Job) -> float:
    """From the first frame to the last. An edit's length is known when it is made: its video may be from outside."""
    shape = _shape(job)
    metadata = JobMetadata.from_row(job.extra)
    if not shape or metadata.verb in (None, "storyboard"):
        return metadata.duration
    return (shape[0] - 1) / float(
        Fraction(job.result.receipt["frames"].get("fps", 1)) if job.result else 1
    )


def page(rows: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """A page of a list, with the ids that the next page is asked by."""
    ids = [row["id"] for row in rows]
    ends = {"first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}
    return {"object": "list", "data": rows, **ends, "has_more": more}


def character(one: Character) -> dict[str, Any]:
    """A character as clients know it."""
    known = one.likeness
    return {
        "id": one.id,
        "object": "character",
        "created_at": int(one.created_at),
        "name": one.name,
        "description": known.description,
        "source": known.source,
        "scores": dict(known.scores),
        "consent": None if one.consent is None else dict(one.consent),
        "notices": [notice(one, found=known.noun is not None)],
    }


def file(one: File) -> dict[str, Any]:
    """A file as clients know it."""
    told = {
        "id": one.id,
        "object": "file",
        "bytes": one.size,
        "created_at": int(one.created_at),
        "expires_at": None,
    }
    return {**told, "filename": one.name, "purpose": one.purpose, "status": "processed"}


def batch(one: Batch) -> dict[str, Any]:
    """A batch as clients know it."""
    return {
        "id": one.id,
        "object": "batch",
        "endpoint": "/v1/videos",
        "input_file_id": one.input_file,
        "completion_window": "24h",
        "status": one.status,
        "output_file_id": one.output_file,
        "error_file_id": one.error_file,
        "created_at": int(one.created_at),
        "in_progress_at": int(one.created_at),
        "expires_at": int(one.expires_at),
        "completed_at": _whole(one.completed_at),
        "cancelled_at": _whole(one.cancelled_at),
        "request_counts": {"total": one.total, "completed": one.completed, "failed": one.failed},
        "metadata": dict(one.metadata),
    }


def _error(failure: JobFailure) -> dict[str, Any]:
    """A failure as clients know it; what the policy has refused is explained."""
    told = {**JOB_ERROR, "code": failure.code, "message": failure.message}
    if failure.code != BLOCKED:
        return told
    steer = (
        "Start from another picture or video."
        if failure.target == "input"
        else "Ask for something else."
    )
    why = {"detailed_explanation": failure.message, "error_type": "other", "review_target": None}
    return {**told, "misalignment": {**why, "steer": {"message": steer}}}


def _status(job: Job) -> str:
    """A paused job goes on waiting for clients: their polling ends at any word that they do not know."""
    if job.status == "paused":
        return "queued" if job.started_at is None else "in_progress"
    return job.status


def _whole(time: float | None) -> int | None:
    return None if time is None else int(time)


def _shape(job: Job) -> tuple[int, ...]:
    """Of the frames that were made: (t, h, w, c) in the receipt; empty before there is one."""
    receipt: Mapping[str, Any] = job.result.receipt if job.result else {}
    return tuple(receipt.get("frames", {}).get("shape", ()))
