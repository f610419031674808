"""What may be made and how it is marked: moderation of texts, and a look for marks in a file."""

import secrets
from typing import Any, BinaryIO, cast

from skyloom.safety.moderation import Verdict
from skyloom.serve import answers
from skyloom.serve.calls import Asked, Call, Reply
from skyloom.serve.faults import invalid
from skyloom.serve.wire import ModerationBody, ProvenanceBody, parse

CATEGORIES = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm"),
    *("self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic"),
)


# a rule's name begins with -> OpenAI's category; an operator's own rules have none
_RULES = {"sexual-minors": "sexual/minors", "sexual": "sexual", "mass-harm": "illicit/violent"}


def moderate(asked: Asked) -> Reply:
    """What the local policy says of texts. It knows rules, not scores: a score is 0 or 1."""
    given = parse(ModerationBody, asked.fields).input
    texts = [given] if isinstance(given, str) else [_text(item, index) for index, item in enumerate(given)]
    results = [_result(asked.services.outside.moderate(text)) for text in texts]
    return Reply({"id": f"modr_{secrets.token_hex(12)}", "model": "skyloom-policy", "results": results})


def check_provenance(asked: Asked) -> Reply:
    """What marks a file carries: C2PA, our watermark, our records."""
    upload = parse(ProvenanceBody, asked.fields).file
    asset = asked.services.sources.store(cast(BinaryIO, upload.file), "file")
    results = asked.services.outside.verify(asset)
    now = int(asked.services.database.now())
    return Reply({"object": "content_provenance_check", "created_at": now, "results": results})


def _text(item: Any, index: int) -> str:
    """A text, or the text of one of OpenAI's parts; pictures are not looked at."""
    if isinstance(item, dict) and item.get("type") == "text":
        item = item.get("text")
    if not isinstance(item, str):
        raise invalid(f"input[{index}]", "Only texts are checked.", "invalid_type")
    return item


def _result(verdict: Verdict) -> dict[str, Any]:
    category = next((name for start, name in _RULES.items() if (verdict.rule or "").startswith(start)), None)
    return {
        "flagged": not verdict.allowed,
        "categories": {name: name == category for name in CATEGORIES},
        "category_scores": {name: float(name == category) for name in CATEGORIES},
        "category_applied_input_types": {name: ["text"] for name in CATEGORIES},
        "rule": verdict.rule,
        "span": verdict.span and list(verdict.span),
        "message": verdict.message,
    }


CALLS = (
    Call(
        "POST",
        "/v1/moderations",
        moderate,
        "Check texts by the local policy.",
        answers.ModerationAnswer,
        "write",
        ModerationBody,
    ),
    Call(
        "POST",
        "/v1/content_provenance_checks",
        check_provenance,
        "Look for marks in a file.",
        answers.ProvenanceAnswer,
        "write",
        ProvenanceBody,
    ),
)
