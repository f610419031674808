"""Moderation of texts and pictures by the local policy, in OpenAI's categories.

The policy has rules, not scores: a score is 0 or 1.
"""

import secrets
from typing import Any

from skyloom.safety.moderation import ModerationResult
from skyloom.serve.api.dependencies import AppServices, Services, Writer
from skyloom.serve.api.errors import invalid
from skyloom.serve.api.openapi import errors
from skyloom.serve.api.request_models import MAX_TEXT, ModerationBody, read_reference
from skyloom.serve.api.response_models import ModerationResponse
from skyloom.serve.api.routing import limit, make_router

CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)
_MAX_PICTURES = 8  # of a request; each takes a process, one after another
# prefix of a rule's name -> OpenAI's category; an operator's own rules have none
_RULE_CATEGORIES = {
    "sexual-minors": "sexual/minors",
    "sexual": "sexual",
    "mass-harm": "illicit/violent",
}
router = make_router()


@router.post("/v1/moderations", responses=errors(404))
@limit("quick", with_media="inspect")
def moderate(body: ModerationBody, caller: Writer, services: AppServices) -> ModerationResponse:
    """Check texts and pictures by the local policy.

    Plain texts have one result each; OpenAI's parts (texts and pictures) have one result together.
    """
    items = [body.input] if isinstance(body.input, str) else body.input
    _check_amount(items)
    verdicts = [
        _verdict(services, caller.owner, item, f"input[{index}]")
        for index, item in enumerate(items)
    ]
    if any(isinstance(item, dict) for item in items):
        kinds = {"image" if _is_picture(item) else "text" for item in items}
        refused = (verdict for verdict in verdicts if not verdict.allowed)
        results = [_result(next(refused, ModerationResult(True)), sorted(kinds))]
    else:
        results = [_result(verdict, ["text"]) for verdict in verdicts]
    id = f"modr_{secrets.token_hex(12)}"
    return ModerationResponse(id=id, model="skyloom-policy", results=results)


def _is_picture(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") == "image_url"


def _check_amount(items: list[Any]) -> None:
    """Raise ApiError for too much text or too many pictures."""
    texts = [item.get("text") if isinstance(item, dict) else item for item in items]
    if sum(len(text) for text in texts if isinstance(text, str)) > MAX_TEXT:
        raise invalid("input", f"Texts of {MAX_TEXT:,} characters in all are checked at a time.")
    if sum(map(_is_picture, items)) > _MAX_PICTURES:
        raise invalid("input", f"{_MAX_PICTURES} pictures are checked at a time.")


def _verdict(services: Services, owner: str, item: Any, param: str) -> ModerationResult:
    """The verdict on a text or on a part of OpenAI's. Raises ApiError (400)."""
    if _is_picture(item):
        inner = item.get("image_url")
        reference = {"image_url": inner.get("url") if isinstance(inner, dict) else inner}
        source = services.media.picture(owner, read_reference(reference, param), param)
        return services.effects.view(source.asset, False)[0]
    is_text_part = isinstance(item, dict) and item.get("type") == "text"
    text = item.get("text") if is_text_part else item
    if not isinstance(text, str):
        raise invalid(param, "Only texts and pictures are checked.", "invalid_type")
    return services.effects.moderate(text)


def _result(verdict: ModerationResult, kinds: list[str]) -> dict[str, Any]:
    rule = verdict.rule or ""
    found = (name for prefix, name in _RULE_CATEGORIES.items() if rule.startswith(prefix))
    category = next(found, None)
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
