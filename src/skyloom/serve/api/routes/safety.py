"""What may be made and how it is marked: moderation of texts and pictures, and a look for marks in a file."""

import secrets
from typing import Any, BinaryIO, cast

from skyloom.safety.moderation import ModerationResult
from skyloom.serve.api import response_models as answers
from skyloom.serve.api.context import Asked, Call, Reply
from skyloom.serve.api.errors import invalid
from skyloom.serve.api.request_models import (
    MAX_TEXT,
    ModerationBody,
    ProvenanceBody,
    parse,
    read_reference,
)

CATEGORIES = (
    *(
        "harassment",
        "harassment/threatening",
        "hate",
        "hate/threatening",
        "illicit",
        "illicit/violent",
        "self-harm",
    ),
    *(
        "self-harm/intent",
        "self-harm/instructions",
        "sexual",
        "sexual/minors",
        "violence",
        "violence/graphic",
    ),
)

_MOST_PICTURES = 8  # of one call: each is looked at by a process of its own, one after another
# a rule's name begins with -> OpenAI's category; an operator's own rules have none
_RULES = {"sexual-minors": "sexual/minors", "sexual": "sexual", "mass-harm": "illicit/violent"}


def moderate(asked: Asked) -> Reply:
    """What the local policy says of texts, one answer each, or of OpenAI's parts (texts and pictures) together.

    It knows rules, not scores: a score is 0 or 1.
    """
    given = parse(ModerationBody, asked.fields).input
    items = [given] if isinstance(given, str) else given
    _check_amount(items)
    verdicts = [_verdict(asked, item, f"input[{index}]") for index, item in enumerate(items)]
    kinds = [
        "image" if isinstance(item, dict) and item.get("type") == "image_url" else "text"
        for item in items
    ]
    if any(isinstance(item, dict) for item in items):
        first = next(
            (verdict for verdict in verdicts if not verdict.allowed), ModerationResult(True)
        )
        results = [_result(first, sorted(set(kinds)))]
    else:
        results = [_result(verdict, ["text"]) for verdict in verdicts]
    return Reply(
        {"id": f"modr_{secrets.token_hex(12)}", "model": "skyloom-policy", "results": results}
    )


def check_provenance(asked: Asked) -> Reply:
    """What marks a file carries: C2PA, our watermark, our records."""
    upload = parse(ProvenanceBody, asked.fields).file
    asset = asked.services.sources.store(cast(BinaryIO, upload.file), "file")
    results = asked.services.outside.verify(asset)
    now = int(asked.services.database.now())
    return Reply({"object": "content_provenance_check", "created_at": now, "results": results})


def _check_amount(items: list[Any]) -> None:
    """Raise WireError for more than one call may ask."""
    texts = [item.get("text") if isinstance(item, dict) else item for item in items]
    if sum(len(text) for text in texts if isinstance(text, str)) > MAX_TEXT:
        raise invalid("input", f"Texts of {MAX_TEXT:,} characters in all are checked at a time.")
    if (
        sum(isinstance(item, dict) and item.get("type") == "image_url" for item in items)
        > _MOST_PICTURES
    ):
        raise invalid("input", f"{_MOST_PICTURES} pictures are checked at a time.")


def _verdict(asked: Asked, item: Any, param: str) -> ModerationResult:
    """Of a text, or of a part that is a text or a picture. Raises WireError."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "image_url":
        source = asked.services.sources.picture(
            asked.owner, read_reference(_picture(item), param), param
        )
        return asked.services.outside.view(source.asset, False)[0]
    text = item.get("text") if kind == "text" else item
    if not isinstance(text, str):
        raise invalid(param, "Only texts and pictures are checked.", "invalid_type")
    return asked.services.outside.moderate(text)


def _picture(item: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's part, {"image_url": {"url": ...}}, as a reference."""
    inner = item.get("image_url")
    return {"image_url": inner.get("url") if isinstance(inner, dict) else inner}


def _result(verdict: ModerationResult, kinds: list[str]) -> dict[str, Any]:
    category = next(
        (name for start, name in _RULES.items() if (verdict.rule or "").startswith(start)), None
    )
    return {
        "flagged": not verdict.allowed,
        "categories": {name: name == category for name in CATEGORIES},
        "category_scores": {name: float(name == category) for name in CATEGORIES},
        "category_applied_input_types": {name: kinds for name in CATEGORIES},
        "rule": verdict.rule,
        "span": verdict.span and list(verdict.span),
        "at": verdict.at,
        "message": verdict.message,
    }


CALLS = (
    Call(
        "POST",
        "/v1/moderations",
        moderate,
        "Check texts and pictures by the local policy.",
        answers.ModerationAnswer,
        "write",
        ModerationBody,
        faults=(404, 503),
        with_media="inspect",
    ),
    Call(
        "POST",
        "/v1/content_provenance_checks",
        check_provenance,
        "Look for marks in a file.",
        answers.ProvenanceAnswer,
        "write",
        ProvenanceBody,
        kind="inspect",
    ),
)
