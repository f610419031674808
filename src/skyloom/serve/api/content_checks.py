"""Checks of what clients submit: the policy on texts, consent for media, characters in use."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from skyloom.generate.validate import MAX_PROMPT
from skyloom.safety.consent import parse_expiry
from skyloom.safety.moderation import ModerationResult, current_policy
from skyloom.serve.api.errors import ApiError, invalid
from skyloom.serve.api.media_inputs import MediaInput
from skyloom.serve.api.request_models import Consent
from skyloom.serve.queue.job import BLOCKED
from skyloom.serve.queue.job_metadata import JobMetadata
from skyloom.serve.queue.jobs import JobStore
from skyloom.serve.queue.library import Character, Library

Moderate = Callable[[str], ModerationResult]
"""Checks a text against the policy."""


class ContentChecks:
    """Checks the texts, consent and characters of API requests. Every check raises ApiError."""

    def __init__(self, jobs: JobStore, library: Library, moderate: Moderate) -> None:
        self._jobs = jobs
        self._library = library
        self._check_policy = moderate

    def moderate(self, *texts: str, param: str = "prompt") -> None:
        """Check texts against the policy, all in one call.

        Negative prompts are not checked: they describe what must not appear. Raises ApiError for
        blocked or too long texts.
        """
        for text in texts:
            if len(text) > MAX_PROMPT:
                limit = f"<= {MAX_PROMPT:,} characters"
                raise invalid(param, f"{param} must have {limit}, got {len(text):,}.")
        distinct = [text for text in dict.fromkeys(texts) if text]
        verdict = self._check_policy("\n".join(distinct))
        if verdict.span is not None:
            verdict = replace(verdict, span=_span_in_text(verdict.span, distinct))
        self.reject_blocked(verdict, "prompt", param)

    def reject_blocked(self, verdict: ModerationResult, target: str, param: str) -> None:
        """Raise ApiError for a verdict that blocks, and count the refusal."""
        if verdict.allowed:
            return
        if verdict.at is None:
            start, end = verdict.span or (0, 0)
            place = f" (characters {start} to {end})"
        else:
            place = f", for {param} at {verdict.at:g} s"
        self._jobs.count_refusal(verdict.rule or "", target, BLOCKED)
        message = f"Refused by the rule {verdict.rule}{place}: {verdict.message}"
        raise ApiError(400, message, BLOCKED, param=param)

    def check_consent(
        self, consent: Consent | None, *, has_media: bool, is_uploaded: bool
    ) -> dict[str, str] | None:
        """Return the fields of a valid consent.

        Raises ApiError if the consent has expired, if the policy requires one for uploaded media
        (`is_uploaded`), or if the request has no media.
        """
        if consent is None:
            if is_uploaded and current_policy().consent:
                message = "This server requires consent (who, scope, expiry) for uploaded media."
                raise invalid("consent", message, "consent_required")
            return None
        if not has_media:
            message = "consent must be left out without a picture or video."
            raise invalid("consent", message, "unsupported_parameter")
        fields = consent.model_dump(exclude_none=True)
        self._check_expiry(fields, "consent.expiry", "The consent")
        return fields

    def check_media_consent(
        self, owner: str, consent: Consent | None, media: Sequence[MediaInput]
    ) -> dict[str, str] | None:
        """Check consent for the input media and for the characters shown in it.

        Raises ApiError.
        """
        self.find_characters(owner, characters_shown(media))
        is_uploaded = any(one.job is None for one in media)
        return self.check_consent(consent, has_media=bool(media), is_uploaded=is_uploaded)

    def _check_expiry(self, consent: Mapping[str, str] | None, param: str, subject: str) -> None:
        expiry = (consent or {}).get("expiry")
        if expiry is not None and parse_expiry(expiry) <= self._jobs.database.now():
            raise invalid(param, f"{subject} ended with {expiry}.", "consent_expired")

    def find_characters(self, owner: str, ids: Sequence[str]) -> list[Character]:
        """Look up characters.

        Raises ApiError for one that is missing or whose consent has expired.
        """
        characters = [self._library.character(id, owner) for id in ids]
        for index, character in enumerate(characters):
            subject = f"The consent for the character {character.name!r:.100}"
            self._check_expiry(character.consent, f"characters[{index}]", subject)
        return characters


def characters_shown(media: Sequence[MediaInput]) -> list[str]:
    """Return the distinct ids of the characters in videos made by this server."""
    shown = [
        id
        for one in media
        if one.job is not None
        for id in JobMetadata.from_row(one.job.metadata).characters
    ]
    return list(dict.fromkeys(shown))


def _span_in_text(span: tuple[int, int], texts: Sequence[str]) -> tuple[int, int]:
    """Convert a span of texts joined by line feeds into a span of the text where it begins."""
    start, end = span
    for text in texts:
        if start <= len(text):
            return start, min(end, len(text))
        start -= len(text) + 1
        end -= len(text) + 1
    return span
