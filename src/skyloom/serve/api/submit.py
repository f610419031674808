"""The desk: it turns what a client asks into a job, or refuses before anything is made.

What needs no model is checked here, by the rules of generate/validate.py; the rest is checked by the worker.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from skyloom.generate.request import Request, parse_size
from skyloom.generate.styles import list_styles
from skyloom.generate.validate import MAX_PROMPT, resolve_defaults
from skyloom.safety.moderation import Verdict, current_policy
from skyloom.serve.api.character_prompts import ends_at, notice, put_in
from skyloom.serve.api.edit_fields import VERBS, check_fields, check_source, edit_fields
from skyloom.serve.api.errors import WireError, invalid
from skyloom.serve.api.media_inputs import Source, Sources
from skyloom.serve.api.model_aliases import Named, find_named
from skyloom.serve.api.request_models import (
    Consent,
    CreateBody,
    EditFields,
    Reference,
    Sampling,
    StoryboardBody,
    read_reference,
)
from skyloom.serve.api.response_models import fps_of, seconds_of, size_of
from skyloom.serve.queue.jobs import Job, JobStore
from skyloom.serve.queue.library import Character, Library
from skyloom.serve.queue.moderation_counters import BLOCKED
from skyloom.serve.queue.quotas import cost_of
from skyloom.serve.settings import Settings

OUTSIDE_SECONDS = 60.0

log = logging.getLogger(__name__)
Moderate = Callable[[str], Verdict]
"""What the policy says of a text."""


@dataclass(frozen=True)
class Keys:
    """By what a call is known when it comes again, and when it is too late to begin."""

    idempotency: str | None = None
    retry_count: int = 0
    deadline: float | None = None


@dataclass(frozen=True)
class Told:
    """What the wire remembers of a job besides its request, for the answers that show it."""

    model: str
    prompt: str
    seconds: str
    size: str
    requested_size: str
    fps: float
    verb: str | None = None
    remixed_from: str | None = None
    parents: list[str] = field(default_factory=list[str])
    characters: list[str] = field(default_factory=list[str])
    described: dict[str, str] = field(default_factory=dict[str, str])
    consent: dict[str, str] | None = None
    notices: list[str] = field(default_factory=list[str])
    variations: list[str] = field(default_factory=list[str])
    extensions: int = 0
    steps: int = 1

    @property
    def cost(self) -> float:
        """What the job counts for; a video from outside is taken to last a minute, since nobody has opened it yet."""
        return cost_of(float(self.seconds) or OUTSIDE_SECONDS, *parse_size(self.size), self.steps)


class Desk:
    """Where calls become jobs."""

    def __init__(
        self,
        settings: Settings,
        jobs: JobStore,
        library: Library,
        sources: Sources,
        moderate: Moderate,
    ) -> None:
        self._settings, self._jobs, self._library, self._sources = settings, jobs, library, sources
        self._moderate = moderate

    def create(self, owner: str, body: CreateBody, keys: Keys) -> Job:
        """A video by a prompt, or `n` of them; the first is the answer and names the others."""
        _refuse_what_has_no_effect(body)
        self._check_room(owner, keys, body.n)
        named = find_named(self._settings, body.model)
        self.allow(body.prompt)
        cast = self._cast(owner, [one.id for one in body.characters])
        for index, one in enumerate(cast):
            if one.name not in body.prompt:
                message = f"The prompt must name the character {one.name!r:.100}."
                raise invalid(f"characters[{index}]", message, "character_not_named")
        prompt, played = play(body.prompt, cast)
        cards, sources = self._cards(owner, [_played(card, cast) for card in body.storyboard])
        values = {**_sampling(body), "prompt": _styled(prompt, body.style), "cards": cards}
        if body.input_reference is not None:
            sources.append(self._sources.picture(owner, body.input_reference, "input_reference"))
            values |= _first_picture(values["prompt"], sources[0].asset.reference, body.strength)
        request, told = self._settle(named, values, body.seconds, body.size)
        consent = self._consent(owner, body.consent, sources)
        told = _told_of_cast(replace(told, prompt=body.prompt, consent=consent), cast, played)
        drawn = body.seed is None
        self._check_room(owner, keys, body.n, told.cost * body.n)
        others = [
            self._submit(owner, request, told, keys, drawn=drawn, index=i).id
            for i in range(1, body.n)
        ]
        return self._submit(owner, request, replace(told, variations=others), keys, drawn=drawn)

    def storyboard(self, owner: str, body: StoryboardBody, keys: Keys) -> Job:
        """A video by cards; the prompt is said with each."""
        self._check_room(owner, keys)
        values = _sampling(body) | {"prompt": _styled(body.prompt, body.style)}
        values["cards"], sources = self._cards(owner, body.cards)
        request, told = self._settle(
            find_named(self._settings, body.model), values, body.seconds, body.size
        )
        consent = self._consent(owner, body.consent, sources)
        shown = body.prompt or request.cards[0].prompt
        told = replace(told, prompt=shown, verb="storyboard", consent=consent)
        return self._submit(owner, request, told, keys, drawn=body.seed is None)

    def plan(self, body: CreateBody) -> tuple[Request, Told]:
        """The request that a body means, without the media that it starts from: to be planned, not made."""
        media = ("image", "video", "strength")
        cards = [
            {key: value for key, value in card.items() if key not in media}
            for card in body.storyboard
        ]
        values = {**_sampling(body), "prompt": _styled(body.prompt, body.style), "cards": cards}
        return self._settle(find_named(self._settings, body.model), values, body.seconds, body.size)

    def edit(
        self, owner: str, verb: str, body: EditFields, keys: Keys, video_id: str | None = None
    ) -> Job:
        """A job that edits videos: those of the body, or the one in the path."""
        check_fields(verb, body)
        self._check_room(owner, keys)
        sources = self._videos(owner, verb, body, video_id)
        first = sources[0].job
        if first is not None:
            check_source(
                body, size_of(first), fps_of(first) or float(first.extra["fps"]), seconds_of(first)
            )
        named = find_named(
            self._settings, body.model or (str(first.extra["model"]) if first else None)
        )
        mask = (
            None
            if body.mask is None
            else self._sources.find(owner, body.mask, "mask").asset.reference
        )
        prompt = body.prompt or (str(first.extra.get("prompt", "")) if first else "")
        edit = edit_fields(verb, body, [source.asset.reference for source in sources], mask)
        self.allow(prompt, str(edit.get("style", "")))
        cast = self._cast(owner, _shown_in(sources))
        said, played = play(prompt, cast)
        values = {
            **_sampling(body),
            "fps": None,
            "prompt": said,
            "model": named.info.name,
            "edit": edit,
        }
        request = self._request(values)
        settled = resolve_defaults(request, named.info)
        consent = self._consent(owner, body.consent, sources)
        told = replace(
            self._told_of_edit(named, verb, body, sources), prompt=prompt, consent=consent
        )
        told = replace(told, steps=settled.num_steps if request.samples else 1)
        told = _told_of_cast(told, cast, played)
        return self._submit(owner, request, told, keys, drawn=body.seed is None)

    def _told_of_edit(
        self, named: Named, verb: str, body: EditFields, sources: list[Source]
    ) -> Told:
        """What the answers say of an edit before it is made: an outside video's size is not known yet."""
        first = sources[0].job
        lasting = [seconds_of(source.job) if source.job else 0.0 for source in sources]
        seconds, times = (
            body.seconds or (sum(lasting) if verb in ("blend", "stitch") else lasting[0]),
            0,
        )
        if verb == "extend":
            seconds, times = (
                seconds + lasting[0],
                (int(first.extra.get("extensions", 0)) if first else 0) + 1,
            )
            named.check_extension(times, seconds)
        size = body.size or (size_of(first) if first else named.info.sizes[0])
        parents = [source.job.id for source in sources if source.job is not None]
        return Told(
            model=named.name,
            prompt="",
            seconds=f"{seconds:g}",
            size=size,
            requested_size=size,
            fps=float(body.fps or (first.extra["fps"] if first else named.info.fps)),
            verb=verb,
            remixed_from=parents[0] if parents and verb == "remix" else None,
            parents=parents,
            extensions=times,
        )

    def _settle(
        self, named: Named, values: Mapping[str, Any], seconds: float | None, size: str | None
    ) -> tuple[Request, Told]:
        """A request with size and length decided, checked against the model and the policy."""
        info, asked, length = named.info, named.asked_size(size), named.seconds(seconds)
        made = named.made_size(asked)
        request = self._request({**values, "seconds": length, "size": made, "model": info.name})
        self.allow(request.prompt, *(card.prompt for card in request.cards))
        settled = resolve_defaults(request, info)
        told = Told(
            model=named.name,
            prompt=request.prompt,
            seconds=f"{(info.frames - 1) / info.fps if length is None else length:g}",
            size=made,
            requested_size=asked,
            fps=info.fps / settled.keep_every,
            steps=settled.num_steps,
            notices=[]
            if made == asked
            else [f"{info.name} makes {', '.join(info.sizes)}: {made} for {asked}."],
        )
        return request, told

    def _request(self, values: Mapping[str, Any]) -> Request:
        """A request from what is given, with a seed, so that a run that goes on elsewhere makes the same video."""
        return Request.from_dict(
            {key: value for key, value in values.items() if value is not None}
        ).with_seed()

    def _cards(
        self, owner: str, cards: list[dict[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[Source]]:
        """Cards with their pictures and videos as stored files, and what these are."""
        done: list[dict[str, Any]] = []
        sources: list[Source] = []
        for number, given in enumerate(cards):
            card = dict(given)
            for key, find in (("image", self._sources.picture), ("video", self._sources.video)):
                if card.get(key) is not None:
                    param = f"storyboard[{number}].{key}"
                    sources.append(find(owner, read_reference(card[key], param), param))
                    card[key] = sources[-1].asset.reference
            done.append(card)
        return done, sources

    def _cast(self, owner: str, ids: Sequence[str]) -> list[Character]:
        """Characters by their ids. Raises WireError for one whose consent is over."""
        cast = [self._library.character(id, owner) for id in ids]
        for index, one in enumerate(cast):
            self._check_end(
                one.consent,
                f"characters[{index}]",
                f"The consent for the character {one.name!r:.100}",
            )
        return cast

    def _consent(
        self, owner: str, consent: Consent | None, sources: Sequence[Source]
    ) -> dict[str, str] | None:
        """What is attested of what a call starts from; characters that these show must not be over either."""
        self._cast(owner, _shown_in(sources))
        return self.attested(
            consent, media=bool(sources), outside=any(source.job is None for source in sources)
        )

    def attested(
        self, consent: Consent | None, *, media: bool, outside: bool
    ) -> dict[str, str] | None:
        """What is attested of the `media` that a call starts from, some of it from `outside`. Raises WireError for what
        is over, for what the policy wants and is not there, and for what nothing is there for."""
        if consent is None:
            if outside and current_policy().consent:
                message = "This server wants a consent with pictures and videos from outside: who, scope, expiry."
                raise invalid("consent", message, "consent_required")
            return None
        if not media:
            raise invalid("consent", "consent is of a picture or a video.", "unsupported_parameter")
        self._check_end(consent.told(), "consent.expiry", "The consent")
        return consent.told()

    def _check_end(self, consent: Mapping[str, str] | None, param: str, what: str) -> None:
        expiry = (consent or {}).get("expiry")
        if expiry is not None and ends_at(expiry) <= self._jobs.database.now():
            raise invalid(param, f"{what} ended with {expiry}.", "consent_expired")

    def _videos(
        self, owner: str, verb: str, body: EditFields, video_id: str | None
    ) -> list[Source]:
        """The videos of an edit, as many as the verb takes."""
        sources = [] if video_id is None else [self._sources.made(owner, video_id, None)]
        given: list[tuple[str, Reference]] = [] if body.video is None else [("video", body.video)]
        given += [(f"videos[{index}]", one) for index, one in enumerate(body.videos or [])]
        sources += [self._sources.video(owner, one, param) for param, one in given]
        least, most = VERBS[verb].videos
        if least <= len(sources) <= most:
            return sources
        param = "video" if most == 1 else "videos"
        if len(sources) < least:
            raise invalid(
                param, f"Missing required parameter: '{param}'.", "missing_required_parameter"
            )
        raise invalid(param, f"{verb} takes {most} videos at most.")

    def allow(self, *texts: str, param: str = "prompt") -> None:
        """Ask the policy of texts that are not too long to be asked of. A negative prompt is not asked: it says what is
        not wanted. Raises WireError."""
        for text in texts:
            if len(text) > MAX_PROMPT:
                raise invalid(
                    param, f"The {param} has {len(text):,} characters. Use {MAX_PROMPT:,} at most."
                )
            self.refuse(self._moderate(text), "prompt", param)

    def refuse(self, verdict: Verdict, target: str, param: str) -> None:
        """Count and raise, as a WireError, what the policy does not allow."""
        if verdict.allowed:
            return
        start, end = verdict.span or (0, 0)
        where = (
            f" (characters {start} to {end})"
            if verdict.at is None
            else f", for {param} at {verdict.at:g} s"
        )
        self._jobs.count_refusal(verdict.rule or "", target, BLOCKED)
        message = f"Refused by the rule {verdict.rule}{where}: {verdict.message}"
        raise WireError(400, message, BLOCKED, param=param)

    def _check_room(self, owner: str, keys: Keys, more: int = 1, cost: float = 0.0) -> None:
        """Refuse before anything is stored; a call that may have come before is for `submit` to find first."""
        if keys.idempotency is None and not keys.retry_count:
            self._jobs.check_room(owner, more, cost)

    def _submit(
        self,
        owner: str,
        request: Request,
        told: Told,
        keys: Keys,
        *,
        drawn: bool,
        index: int = 0,
    ) -> Job:
        """Put a job in the queue, or find the one that this very call has made before. Its number among variations
        is added to the seed; a `drawn` seed is no part of what was asked."""
        seed = (
            None if request.seed is None else (request.seed + index) % 2**63
        )  # none where nothing is sampled
        values = replace(request, seed=seed).to_dict()
        asked = {**values, "seed": index if drawn else seed}
        known = json.dumps(
            [asked, told.model, told.requested_size, told.characters], sort_keys=True
        )
        job = self._jobs.submit(
            values,
            owner=owner,
            key=keys.idempotency
            if not index or keys.idempotency is None
            else f"{keys.idempotency}:{index}",
            fingerprint=hashlib.sha256(known.encode()).hexdigest(),
            retry_count=keys.retry_count,
            cost=told.cost,
            deadline=keys.deadline,
            extra=vars(told),
        )
        seen = {"prompt": told.prompt} if self._settings.log_prompts else {}
        log.info("job asked", extra={"job": job.id, "model": told.model, "verb": told.verb, **seen})
        return job


def play(text: str, cast: Sequence[Character]) -> tuple[str, frozenset[str]]:
    """A prompt as the model gets it, with who the characters are, and the names of those that it knows."""
    return put_in(text, {one.name: one.likeness for one in cast})


def _played(card: Mapping[str, Any], cast: Sequence[Character]) -> dict[str, Any]:
    """A card with its characters; what has no text is checked elsewhere."""
    prompt = card.get("prompt")
    return {**card, "prompt": play(prompt, cast)[0]} if isinstance(prompt, str) else dict(card)


def _shown_in(sources: Sequence[Source]) -> list[str]:
    """Ids of the characters that videos of ours show, each once."""
    shown = [
        id for source in sources if source.job for id in source.job.extra.get("characters", [])
    ]
    return list(dict.fromkeys(shown))


def _told_of_cast(told: Told, cast: Sequence[Character], played: frozenset[str]) -> Told:
    """The characters of a video, what was put in for them, and what its maker should know of that."""
    described = {one.name: one.likeness.description or "" for one in cast if one.name in played}
    named = [one for one in cast if one.name in told.prompt]
    notices = [notice(one, found=one.name in played) for one in named]
    ids = [one.id for one in cast]
    return replace(told, characters=ids, described=described, notices=[*told.notices, *notices])


def _refuse_what_has_no_effect(body: CreateBody) -> None:
    """Raise WireError for fields that mean nothing together."""
    if body.region is not None:
        raise invalid(
            "region", "region edits a video: use /v1/videos/{id}/inpaint.", "unsupported_parameter"
        )
    if body.storyboard and body.input_reference is not None:
        raise invalid(
            "input_reference",
            "A storyboard takes its pictures from its cards.",
            "unsupported_parameter",
        )
    if body.strength is not None and body.input_reference is None:
        raise invalid("strength", "strength needs an input_reference.", "unsupported_parameter")


def _sampling(body: Sampling) -> dict[str, Any]:
    """The fields that a Request has under its own names. OpenAI's word "standard" is no quality of ours."""
    quality = None if body.quality in ("standard", "hd") else body.quality
    told = {
        "seed": body.seed,
        "fps": body.fps,
        "num_steps": body.steps,
        "guidance_scale": body.guidance,
    }
    return {**told, "negative_prompt": body.negative_prompt, "quality": quality}


def _styled(prompt: str, style: str | None) -> str:
    """The words of a style, bundled or the client's own, are said after the prompt."""
    words = list_styles().get(style or "", style)
    return f"{prompt}, {words}" if prompt and words else prompt or words or ""


def _first_picture(prompt: str, image: str, strength: float | None) -> dict[str, Any]:
    """A picture as the first frame; one that may move from there is a card of its own."""
    if not strength:
        return {"image": image}
    return {
        "prompt": "",
        "cards": [{"at": "0", "prompt": prompt, "image": image, "strength": strength}],
    }
