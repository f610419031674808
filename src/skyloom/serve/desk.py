"""The desk: it turns what a client asks into a job, or refuses before anything is made.

What needs no model is checked here, by the rules of generate/limits.py; the rest is checked by the worker.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from skyloom.core.errors import SafetyError
from skyloom.generate.limits import settle
from skyloom.generate.request import Request
from skyloom.generate.styles import list_styles
from skyloom.serve.answers import seconds_of, size_of
from skyloom.serve.edits import VERBS, check_fields, edit_fields
from skyloom.serve.faults import WireError, invalid
from skyloom.serve.jobs import Job, JobStore
from skyloom.serve.library import Library
from skyloom.serve.profile import Named, find_named
from skyloom.serve.references import Source, Sources
from skyloom.serve.settings import Settings
from skyloom.serve.wire import CreateBody, EditFields, Reference, Sampling, StoryboardBody, read_reference

log = logging.getLogger(__name__)
CheckPrompt = Callable[[str], None]
"""Returns for a text that the policy allows; raises SafetyError for another."""
_LIKENESS = "The model knows a character by its name in the prompt only; its clip is kept, and not looked at."


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
    notices: list[str] = field(default_factory=list[str])
    variations: list[str] = field(default_factory=list[str])
    extensions: int = 0


class Desk:
    """Where calls become jobs."""

    def __init__(
        self, settings: Settings, jobs: JobStore, library: Library, sources: Sources, check_prompt: CheckPrompt
    ) -> None:
        self._settings, self._jobs, self._library, self._sources = settings, jobs, library, sources
        self._check_prompt = check_prompt

    def create(self, owner: str, body: CreateBody, keys: Keys) -> Job:
        """A video by a prompt, or `n` of them; the first is the answer and names the others."""
        _refuse_what_has_no_effect(body)
        named = find_named(self._settings, body.model)
        characters = self._characters(owner, body)
        cards = self._cards(owner, body.storyboard)
        values = {**_sampling(body), "prompt": _styled(body.prompt, body.style), "cards": cards}
        if body.input_reference is not None:
            image = self._sources.picture(owner, body.input_reference, "input_reference").asset.reference
            values |= _first_picture(values["prompt"], image, body.strength)
        request, told = self._settle(named, values, body.seconds, body.size)
        told = replace(told, prompt=body.prompt, characters=characters)
        told = replace(told, notices=[*told.notices, _LIKENESS]) if characters else told
        drawn = body.seed is None
        others = [self._submit(owner, request, told, keys, drawn=drawn, index=i).id for i in range(1, body.n)]
        return self._submit(owner, request, replace(told, variations=others), keys, drawn=drawn)

    def storyboard(self, owner: str, body: StoryboardBody, keys: Keys) -> Job:
        """A video by cards; the prompt is said with each."""
        values = _sampling(body) | {"prompt": _styled(body.prompt, body.style)}
        values["cards"] = self._cards(owner, body.cards)
        request, told = self._settle(find_named(self._settings, body.model), values, body.seconds, body.size)
        shown = body.prompt or request.cards[0].prompt
        return self._submit(
            owner, request, replace(told, prompt=shown, verb="storyboard"), keys, drawn=body.seed is None
        )

    def plan(self, body: CreateBody) -> tuple[Request, Told]:
        """The request that a body means, without the media that it starts from: to be planned, not made."""
        media = ("image", "video", "strength")
        cards = [{key: value for key, value in card.items() if key not in media} for card in body.storyboard]
        values = {**_sampling(body), "prompt": _styled(body.prompt, body.style), "cards": cards}
        return self._settle(find_named(self._settings, body.model), values, body.seconds, body.size)

    def edit(self, owner: str, verb: str, body: EditFields, keys: Keys, video_id: str | None = None) -> Job:
        """A job that edits videos: those of the body, or the one in the path."""
        check_fields(verb, body)
        sources = self._videos(owner, verb, body, video_id)
        first = sources[0].job
        named = find_named(self._settings, body.model or (str(first.extra["model"]) if first else None))
        mask = None if body.mask is None else self._sources.find(owner, body.mask, "mask").asset.reference
        prompt = body.prompt or (str(first.extra.get("prompt", "")) if first else "")
        edit = edit_fields(verb, body, [source.asset.reference for source in sources], mask)
        values = {**_sampling(body), "fps": None, "prompt": prompt, "model": named.info.name, "edit": edit}
        request = self._request(values)
        self._allow(prompt, str(edit.get("style", "")))
        settle(request, named.info)
        told = self._told_of_edit(named, verb, body, sources)
        return self._submit(owner, request, replace(told, prompt=prompt), keys, drawn=body.seed is None)

    def _told_of_edit(self, named: Named, verb: str, body: EditFields, sources: list[Source]) -> Told:
        """What the answers say of an edit before it is made: an outside video's size is not known yet."""
        first = sources[0].job
        lasting = [seconds_of(source.job) if source.job else 0.0 for source in sources]
        seconds, times = body.seconds or (sum(lasting) if verb in ("blend", "stitch") else lasting[0]), 0
        if verb == "extend":
            seconds, times = seconds + lasting[0], (int(first.extra.get("extensions", 0)) if first else 0) + 1
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
        self._allow(request.prompt, *(card.prompt for card in request.cards))
        settled = settle(request, info)
        told = Told(
            model=named.name,
            prompt=request.prompt,
            seconds=f"{(info.frames - 1) / info.fps if length is None else length:g}",
            size=made,
            requested_size=asked,
            fps=info.fps / settled.keep_every,
            notices=[] if made == asked else [f"{info.name} makes {', '.join(info.sizes)}: {made} for {asked}."],
        )
        return request, told

    def _request(self, values: Mapping[str, Any]) -> Request:
        """A request from what is given, with a seed, so that a run that goes on elsewhere makes the same video."""
        return Request.from_dict({key: value for key, value in values.items() if value is not None}).with_seed()

    def _cards(self, owner: str, cards: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Cards with their pictures and videos as stored files."""
        done: list[dict[str, Any]] = []
        for number, given in enumerate(cards):
            card = dict(given)
            for key, find in (("image", self._sources.picture), ("video", self._sources.video)):
                if card.get(key) is not None:
                    param = f"storyboard[{number}].{key}"
                    card[key] = find(owner, read_reference(card[key], param), param).asset.reference
            done.append(card)
        return done

    def _characters(self, owner: str, body: CreateBody) -> list[str]:
        """Ids of characters; the prompt must say their names."""
        for index, one in enumerate(body.characters):
            name = self._library.character(one.id, owner).name
            if name not in body.prompt:
                param = f"characters[{index}]"
                raise invalid(param, f"The prompt must name the character {name!r:.100}.", "character_not_named")
        return [one.id for one in body.characters]

    def _videos(self, owner: str, verb: str, body: EditFields, video_id: str | None) -> list[Source]:
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
            raise invalid(param, f"Missing required parameter: '{param}'.", "missing_required_parameter")
        raise invalid(param, f"{verb} takes {most} videos at most.")

    def _allow(self, *texts: str) -> None:
        """Ask the policy. A negative prompt is not asked: it says what is not wanted."""
        for text in texts:
            try:
                self._check_prompt(text)
            except SafetyError as error:
                raise WireError(400, str(error), "moderation_blocked", param="prompt") from error

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
        seed = None if request.seed is None else (request.seed + index) % 2**63  # none where nothing is sampled
        values = replace(request, seed=seed).to_dict()
        asked = {**values, "seed": index if drawn else seed}
        known = json.dumps([asked, told.model, told.requested_size, told.characters], sort_keys=True)
        job = self._jobs.submit(
            values,
            owner=owner,
            key=keys.idempotency if not index or keys.idempotency is None else f"{keys.idempotency}:{index}",
            fingerprint=hashlib.sha256(known.encode()).hexdigest(),
            retry_count=keys.retry_count,
            cost=max(0.1, float(told.seconds)),
            deadline=keys.deadline,
            extra=vars(told),
        )
        seen = {"prompt": told.prompt} if self._settings.log_prompts else {}
        log.info("job asked", extra={"job": job.id, "model": told.model, "verb": told.verb, **seen})
        return job


def _refuse_what_has_no_effect(body: CreateBody) -> None:
    """Raise WireError for fields that mean nothing together."""
    if body.region is not None:
        raise invalid("region", "region edits a video: use /v1/videos/{id}/inpaint.", "unsupported_parameter")
    if body.storyboard and body.input_reference is not None:
        raise invalid("input_reference", "A storyboard takes its pictures from its cards.", "unsupported_parameter")
    if body.strength is not None and body.input_reference is None:
        raise invalid("strength", "strength needs an input_reference.", "unsupported_parameter")


def _sampling(body: Sampling) -> dict[str, Any]:
    """The fields that a Request has under its own names. OpenAI's word "standard" is no quality of ours."""
    quality = None if body.quality in ("standard", "hd") else body.quality
    told = {"seed": body.seed, "fps": body.fps, "num_steps": body.steps, "guidance_scale": body.guidance}
    return {**told, "negative_prompt": body.negative_prompt, "quality": quality}


def _styled(prompt: str, style: str | None) -> str:
    """The words of a style, bundled or the client's own, are said after the prompt."""
    words = list_styles().get(style or "", style)
    return f"{prompt}, {words}" if prompt and words else prompt or words or ""


def _first_picture(prompt: str, image: str, strength: float | None) -> dict[str, Any]:
    """A picture as the first frame; one that may move from there is a card of its own."""
    if not strength:
        return {"image": image}
    return {"prompt": "", "cards": [{"at": "0", "prompt": prompt, "image": image, "strength": strength}]}
