"""Turn API requests into jobs: validate fields, moderate texts, check quotas, store media, enqueue.

Everything that the model's manifest can decide is validated here, by the rules of
generate/validate.py; the worker validates the rest when it opens the media.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skyloom.generate.edit_verbs import EDIT_VERBS
from skyloom.generate.loras import Lora
from skyloom.generate.request import Request, parse_size
from skyloom.generate.styles import list_styles
from skyloom.generate.validate import length_notice, resolve_defaults
from skyloom.serve.api.character_prompts import (
    check_characters_named,
    describe_characters,
    describe_in_card,
    notice,
)
from skyloom.serve.api.content_checks import ContentChecks, characters_shown
from skyloom.serve.api.edit_fields import build_edit, check_fields, check_source
from skyloom.serve.api.errors import invalid
from skyloom.serve.api.media_inputs import PICTURE, VIDEO, MediaInput, MediaResolver, store_media
from skyloom.serve.api.model_aliases import ModelAlias, find_model_alias
from skyloom.serve.api.request_models import (
    CommonFields,
    CreateVideoBody,
    EditFields,
    Reference,
    StoryboardBody,
    read_reference,
)
from skyloom.serve.api.response_models import fps_of, seconds_of, size_of
from skyloom.serve.queue.job_metadata import JobMetadata
from skyloom.serve.queue.jobs import Job, JobStore
from skyloom.serve.queue.library import Character
from skyloom.serve.queue.quotas import job_cost
from skyloom.serve.settings import Settings

UNKNOWN_SECONDS = 60.0  # assumed length of an uploaded video, which nobody has opened yet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SubmitOptions:
    """Idempotency key, retry count of the client, and start deadline (seconds since 1970)."""

    idempotency_key: str | None = None
    retry_count: int = 0
    deadline: float | None = None


class JobSubmitter:
    """Validates API requests and puts them into the queue as jobs."""

    def __init__(
        self,
        settings: Settings,
        jobs: JobStore,
        media: MediaResolver,
        checks: ContentChecks,
    ) -> None:
        self._settings = settings
        self._jobs = jobs
        self._media = media
        self._checks = checks

    def create_video(self, owner: str, body: CreateVideoBody, options: SubmitOptions) -> Job:
        """Submit `n` jobs from a prompt.

        Returns the first, whose metadata lists the ids of the others.
        """
        _check_combinations(body)
        alias = find_model_alias(self._settings, body.model)
        characters = self._checks.find_characters(
            owner, [character.id for character in body.characters]
        )
        check_characters_named(characters, body.prompt)
        prompt, replaced = describe_characters(body.prompt, characters)
        storyboard = [describe_in_card(card, characters) for card in body.storyboard]
        cards, media = self._prepare_cards(owner, storyboard)
        values = {
            **_sampling_values(body),
            "prompt": _with_style(prompt, body.style),
            "cards": cards,
        }
        if body.input_reference is not None:
            picture = self._media.prepare(owner, body.input_reference, "input_reference", PICTURE)
            media.append(picture)
            values.update(_first_frame(values["prompt"], picture.reference, body.strength))
        request, metadata = self._resolve_request(
            alias, values, seconds=body.seconds, size=body.size, client_prompt=body.prompt
        )
        consent = self._checks.check_media_consent(owner, body.consent, media)
        metadata = metadata.replace(prompt=body.prompt, consent=consent)
        metadata = _with_characters(metadata, characters, replaced)
        self._check_room(owner, options, request, metadata, count=body.n)
        request = store_media(request, media)
        variations = [
            self._submit(owner, request, metadata, options, body=body, index=index).id
            for index in range(1, body.n)
        ]
        metadata = metadata.replace(variations=variations)
        return self._submit(owner, request, metadata, options, body=body)

    def create_storyboard(self, owner: str, body: StoryboardBody, options: SubmitOptions) -> Job:
        """Submit a job from timed cards; `prompt` is appended to the prompt of every card."""
        alias = find_model_alias(self._settings, body.model)
        cards, media = self._prepare_cards(owner, body.cards)
        values = {
            **_sampling_values(body),
            "prompt": _with_style(body.prompt, body.style),
            "cards": cards,
        }
        request, metadata = self._resolve_request(
            alias, values, seconds=body.seconds, size=body.size
        )
        metadata = metadata.replace(
            prompt=body.prompt or request.cards[0].prompt,
            verb="storyboard",
            consent=self._checks.check_media_consent(owner, body.consent, media),
        )
        self._check_room(owner, options, request, metadata)
        request = store_media(request, media)
        return self._submit(owner, request, metadata, options, body=body)

    def create_edit(
        self,
        owner: str,
        verb: str,
        body: EditFields,
        options: SubmitOptions,
        video_id: str | None = None,
    ) -> Job:
        """Submit a job that edits the videos of the body, or the video `video_id` of the path."""
        check_fields(verb, body)
        media = self._prepare_videos(owner, verb, body, video_id)
        source = media[0].job
        source_metadata = JobMetadata() if source is None else JobMetadata.from_row(source.metadata)
        source_model = None if source is None else source_metadata.model
        alias = find_model_alias(self._settings, body.model or source_model)
        if source is not None:
            fps = fps_of(source) or float(alias.info.fps)
            check_source(body, size_of(source), fps, seconds_of(source))
        prompt = body.prompt or source_metadata.prompt or ""
        characters = self._checks.find_characters(owner, characters_shown(media))
        described_prompt, replaced = describe_characters(prompt, characters)
        mask = None if body.mask is None else self._media.prepare(owner, body.mask, "mask")
        videos = [video.reference for video in media]
        edit = build_edit(verb, body, videos, None if mask is None else mask.reference)
        request = _edit_request(body, described_prompt, alias, edit)
        _check_loras(request.loras, self._settings)
        self._checks.moderate(prompt, request.prompt, str(edit.get("style", "")))
        resolved = resolve_defaults(request, alias.info, moderate=False)
        metadata = self._edit_metadata(alias, verb, body, media).replace(
            prompt=prompt,
            consent=self._checks.check_media_consent(owner, body.consent, media),
            steps=resolved.num_steps if request.needs_model else 1,
        )
        metadata = _with_characters(metadata, characters, replaced)
        self._check_room(owner, options, request, metadata)
        request = store_media(request, media if mask is None else [*media, mask])
        return self._submit(owner, request, metadata, options, body=body)

    def plan(self, body: CreateVideoBody) -> tuple[Request, JobMetadata]:
        """Return the request and metadata of a body without its media, to be planned only."""
        media_fields = ("image", "video", "strength")
        cards = [
            {key: value for key, value in card.items() if key not in media_fields}
            for card in body.storyboard
        ]
        values = {
            **_sampling_values(body),
            "prompt": _with_style(body.prompt, body.style),
            "cards": cards,
        }
        alias = find_model_alias(self._settings, body.model)
        return self._resolve_request(alias, values, seconds=body.seconds, size=body.size)

    def _prepare_cards(
        self, owner: str, cards: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[MediaInput]]:
        """Replace the media of storyboard cards by references.

        Returns the cards and their media.
        """
        prepared: list[dict[str, Any]] = []
        media: list[MediaInput] = []
        for number, card in enumerate(cards):
            values = dict(card)
            for key, kind in (("image", PICTURE), ("video", VIDEO)):
                if values.get(key) is not None:
                    param = f"storyboard[{number}].{key}"
                    reference = read_reference(values[key], param)
                    media.append(self._media.prepare(owner, reference, param, kind))
                    values[key] = media[-1].reference
            prepared.append(values)
        return prepared, media

    def _prepare_videos(
        self, owner: str, verb: str, body: EditFields, video_id: str | None
    ) -> list[MediaInput]:
        """Validate the videos of an edit and their number. Raises ApiError."""
        media: list[MediaInput] = []
        if video_id is not None:
            media.append(MediaInput.stored(self._media.finished_video(owner, video_id, None)))
        references: list[tuple[str, Reference]] = []
        if body.video is not None:
            references.append(("video", body.video))
        for index, reference in enumerate(body.videos or []):
            references.append((f"videos[{index}]", reference))
        for param, reference in references:
            media.append(self._media.prepare(owner, reference, param, VIDEO))
        minimum, maximum = EDIT_VERBS[verb].min_videos, EDIT_VERBS[verb].max_videos
        param = "video" if maximum == 1 else "videos"
        if len(media) < minimum:
            message = f"Missing required parameter: '{param}'."
            raise invalid(param, message, "missing_required_parameter")
        if len(media) > maximum:
            message = f"{verb} must have at most {maximum} videos, got {len(media)}."
            raise invalid(param, message)
        return media

    def _resolve_request(
        self,
        alias: ModelAlias,
        values: Mapping[str, Any],
        *,
        seconds: float | None,
        size: str | None,
        client_prompt: str = "",
    ) -> tuple[Request, JobMetadata]:
        """Build a request, moderate its texts and validate it against the model.

        `client_prompt` is moderated too: in the request, descriptions replace the names of
        characters.
        """
        info = alias.info
        requested_size = alias.requested_size(size)
        output_size = alias.output_size(requested_size)
        length = alias.output_seconds(seconds)
        request = _build_request(
            {**values, "seconds": length, "size": output_size, "model": info.name}
        )
        _check_loras(request.loras, self._settings)
        self._checks.moderate(
            client_prompt, request.prompt, *(card.prompt for card in request.cards)
        )
        resolved = resolve_defaults(request, info, moderate=False)
        notices: list[str] = []
        if output_size != requested_size:
            notices.append(
                f"The size is {output_size}, not {requested_size}: sizes of {info.name} must be "
                f"{info.size_rule.describe()}."
            )
        trained = (info.frames - 1) / info.fps
        if info.rollout is None and not request.cards and (length or 0) > trained:
            notices.append(length_notice(info))
        metadata = JobMetadata(
            model=alias.name,
            prompt=request.prompt,
            seconds=f"{trained if length is None else length:g}",
            size=output_size,
            requested_size=requested_size,
            fps=info.fps / resolved.keep_every,
            steps=resolved.num_steps,
            notices=notices,
        )
        return request, metadata

    def _edit_metadata(
        self, alias: ModelAlias, verb: str, body: EditFields, media: Sequence[MediaInput]
    ) -> JobMetadata:
        """Return the metadata of an edit.

        Length and size of an uploaded video are not known yet.
        """
        source = media[0].job
        source_metadata = JobMetadata() if source is None else JobMetadata.from_row(source.metadata)
        lengths = [0.0 if one.job is None else seconds_of(one.job) for one in media]
        unchanged = sum(lengths) if verb in ("blend", "stitch") else lengths[0]
        seconds = body.seconds or unchanged
        extensions = 0
        if verb == "extend":
            seconds += lengths[0]
            extensions = source_metadata.extensions + 1
            alias.check_extension(extensions, seconds)
        size = body.size or alias.info.default_size
        notices: list[str] = []
        if body.size is None and source is not None:
            size = size_of(source)
            if EDIT_VERBS[verb].resamples_sources:
                size = alias.nearest_size(size)
            if size != size_of(source):
                notices.append(
                    f"The video of {size_of(source)} is scaled and cropped to {size}, the nearest "
                    f"size of {alias.info.name}."
                )
        parents = [one.job.id for one in media if one.job is not None]
        return JobMetadata(
            model=alias.name,
            seconds=f"{seconds:g}",
            size=size,
            requested_size=size,
            fps=float(body.fps or source_metadata.fps or alias.info.fps),
            verb=verb,
            remixed_from=parents[0] if parents and verb == "remix" else None,
            notices=notices,
            parents=parents,
            extensions=extensions,
        )

    def _check_room(
        self,
        owner: str,
        options: SubmitOptions,
        request: Request,
        metadata: JobMetadata,
        count: int = 1,
    ) -> None:
        """Reject `count` jobs that no worker can render or over the quota, before media is stored.

        A repeated call is not checked: `JobStore.submit` finds the job that it made before.
        """
        if options.idempotency_key is None and not options.retry_count:
            self._jobs.check_held(request.to_dict())
            self._jobs.check_room(owner, count, count * _cost(metadata))

    def _submit(
        self,
        owner: str,
        request: Request,
        metadata: JobMetadata,
        options: SubmitOptions,
        *,
        body: CommonFields,
        index: int = 0,
    ) -> Job:
        """Enqueue a job, or return the one that the same call has enqueued before.

        `index` is the number of a variation and is added to the seed. A seed that the body does not
        set is random and therefore no part of the fingerprint.
        """
        seed = None if request.seed is None else (request.seed + index) % 2**63
        values = request.with_fields({"seed": seed, "consent": metadata.consent}).to_dict()
        fingerprint = _idempotency_fingerprint(
            {**values, "seed": index if body.seed is None else seed}, metadata
        )
        key = options.idempotency_key
        job = self._jobs.submit(
            values,
            owner=owner,
            key=f"{key}:{index}" if key is not None and index else key,
            fingerprint=fingerprint,
            retry_count=options.retry_count,
            cost=_cost(metadata),
            deadline=options.deadline,
            metadata=metadata.to_row(),
        )
        fields = {"job": job.id, "model": metadata.model, "verb": metadata.verb}
        if self._settings.log_prompts:
            fields["prompt"] = metadata.prompt
        log.info("job submitted", extra=fields)
        return job


def _cost(metadata: JobMetadata) -> float:
    """Return the cost of a job for quotas and fair scheduling."""
    width, height = parse_size(metadata.size)
    return job_cost(metadata.duration or UNKNOWN_SECONDS, width, height, metadata.steps)


def _check_loras(loras: Sequence[Lora], settings: Settings) -> None:
    """Check that the settings name all LoRAs; a client cannot choose a path. Raises ApiError."""
    for lora in loras:
        if lora.name not in settings.loras:
            names = ", ".join(settings.loras) or "none on this server"
            message = f"loras must be from {names}, got {lora.name!r:.100}."
            raise invalid("loras", message, "lora_not_found")


def _idempotency_fingerprint(values: Mapping[str, Any], metadata: JobMetadata) -> str:
    """Return the hash by which `JobStore.submit` recognises a repeated call.

    It covers what the client chose: all of the Request (`values`, where a seed that was drawn is
    replaced by the number of the variation), and the model name, size and characters as they were
    sent, which the Request holds translated. Values that the server derives (notices, steps,
    consent of characters, ids of variations) are left out: they may change between two tries of
    one call. A new field of Request is covered without a change here; add a field of JobMetadata
    that the client sets, and only where it is set, so that the hashes of stored jobs stay valid.
    """
    fields = [values, metadata.model, metadata.requested_size, metadata.characters]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _edit_request(
    body: EditFields, prompt: str, alias: ModelAlias, edit: Mapping[str, Any]
) -> Request:
    """Build the Request of an edit; `fps` is a field of the edit, not of the Request."""
    values = {**_sampling_values(body), "fps": None}
    return _build_request({**values, "prompt": prompt, "model": alias.info.name, "edit": edit})


def _build_request(values: Mapping[str, Any]) -> Request:
    """Build a Request; a missing seed is drawn now, so that a resumed run makes the same video."""
    return Request.from_dict(
        {key: value for key, value in values.items() if value is not None}
    ).with_seed()


def _with_characters(
    metadata: JobMetadata, characters: Sequence[Character], replaced: frozenset[str]
) -> JobMetadata:
    """Add characters, descriptions and notices; `replaced` are the names that were replaced."""
    named = [one for one in characters if one.name in (metadata.prompt or "")]
    notices = [notice(one, found=one.name in replaced) for one in named]
    return metadata.replace(
        characters=[one.id for one in characters],
        described={
            one.name: one.likeness.description or "" for one in characters if one.name in replaced
        },
        notices=[*metadata.notices, *notices],
    )


def _check_combinations(body: CreateVideoBody) -> None:
    """Raise ApiError for fields that have no effect together."""
    if body.region is not None:
        message = "region must be left out for a new video. Use /v1/videos/{id}/inpaint."
        raise invalid("region", message, "unsupported_parameter")
    if body.storyboard and body.input_reference is not None:
        message = "input_reference must be left out for a storyboard. Put the image on a card."
        raise invalid("input_reference", message, "unsupported_parameter")
    if body.strength is not None and body.input_reference is None:
        message = "strength must be left out without an input_reference."
        raise invalid("strength", message, "unsupported_parameter")


def _sampling_values(body: CommonFields) -> dict[str, Any]:
    """Return the sampling fields under the names of a Request.

    OpenAI's qualities standard and hd mean the default quality.
    """
    return {
        "seed": body.seed,
        "fps": body.fps,
        "num_steps": body.steps,
        "guidance_scale": body.guidance,
        "negative_prompt": body.negative_prompt,
        "quality": None if body.quality in ("standard", "hd") else body.quality,
        "loras": [lora.model_dump() for lora in body.loras],
    }


def _with_style(prompt: str, style: str | None) -> str:
    """Append a style to a prompt: the words of a bundled style, or the client's own."""
    words = list_styles().get(style or "", style)
    return f"{prompt}, {words}" if prompt and words else prompt or words or ""


def _first_frame(prompt: str, image: str, strength: float | None) -> dict[str, Any]:
    """Return the request fields for a first frame; with a strength it is a card and may change."""
    if not strength:
        return {"image": image}
    return {
        "prompt": "",
        "cards": [{"at": "0", "prompt": prompt, "image": image, "strength": strength}],
    }
