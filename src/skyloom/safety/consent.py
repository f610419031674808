"""Consent of the people in the pictures and videos that a request starts from.

A statement of the user: it is recorded in the receipt and cannot be verified.
"""

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, date, datetime, timedelta

from skyloom.core.errors import RequestError
from skyloom.safety.moderation import Policy, current_policy

_MAX_CHARACTERS = 500


@dataclass(frozen=True)
class MediaConsent:
    """Who is shown and agreed, to what `scope`, until which `expiry` (a date or a time)."""

    who: str = ""
    scope: str = ""
    expiry: str = ""

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> "MediaConsent":
        """Parse plain values. Raises RequestError for unknown names and invalid values."""
        names = [field.name for field in fields(cls)]
        texts: dict[str, str] = {}
        for name, value in values.items():
            if name not in names:
                raise RequestError(
                    f"consent must have only {', '.join(names)}, got {name!r:.40}.",
                    field="consent",
                )
            if not isinstance(value, str) or len(value) > _MAX_CHARACTERS:
                raise RequestError(
                    f"consent.{name} must be a text of at most {_MAX_CHARACTERS} characters, "
                    f"got {value!r:.40}.",
                    field="consent",
                )
            texts[name] = value
        if texts.get("expiry"):
            _parse_own_expiry(texts["expiry"])
        return cls(**texts)

    def to_dict(self) -> dict[str, str]:
        """Return plain values; empty ones are left out."""
        return {name: value for name, value in asdict(self).items() if value}


def check_media_consent(
    consent: MediaConsent | None, *, has_media: bool, policy: Policy | None = None
) -> None:
    """Check the consent of a request against a policy (default: the current one).

    Raises RequestError if it is missing although the policy requires it for input media, has ended,
    or is given without media.
    """
    named = consent is not None and bool(consent.who)
    if has_media and not named and (policy or current_policy()).consent:
        raise RequestError(
            "consent must name who is shown in input pictures and videos by the policy, got none.",
            hint="Say who is shown and agreed, like --consent who=Ada.",
            field="consent",
        )
    if consent is None:
        return
    if not has_media:
        raise RequestError(
            "consent must be left out without an input picture or video.", field="consent"
        )
    if consent.expiry and _parse_own_expiry(consent.expiry) <= time.time():
        raise RequestError(
            f"consent.expiry must be in the future, got {consent.expiry}.",
            hint="Ask the people who are shown again.",
            field="consent",
        )


def parse_expiry(expiry: str) -> float:
    """Return when a consent ends, in seconds since 1970. Raises ValueError.

    A date ends at its last moment in UTC; a time without a zone is UTC.
    """
    with suppress(ValueError):
        day = date.fromisoformat(expiry)
        midnight = datetime(day.year, day.month, day.day, tzinfo=UTC)
        return midnight.timestamp() + timedelta(days=1).total_seconds()
    moment = datetime.fromisoformat(expiry)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _parse_own_expiry(expiry: str) -> float:
    """Return when a consent ends. Raises RequestError."""
    try:
        return parse_expiry(expiry)
    except ValueError as error:
        raise RequestError(
            f"consent.expiry must be a date or time like 2027-12-31, got {expiry!r:.40}.",
            field="consent",
        ) from error
