"""Webhook endpoints: where events are sent, their secrets, and a test of whether they arrive."""

from typing import Any

from skyloom.core.errors import RequestError
from skyloom.serve.api import response_models as answers
from skyloom.serve.api.context import Asked, Call, Reply
from skyloom.serve.api.errors import invalid
from skyloom.serve.api.request_models import (
    Body,
    EndpointBody,
    EndpointChange,
    EndpointTry,
    RotateBody,
    parse,
)
from skyloom.serve.queue.webhooks import EVENT_TYPES, Endpoint, make_payload, send


def create_endpoint(asked: Asked) -> Reply:
    """A new endpoint; its secret is in this answer only."""
    body = parse(EndpointBody, asked.fields)
    _check(asked, body.url, body.event_types)
    made = asked.services.endpoints.add(asked.owner, body.name, body.url, body.event_types)
    return Reply({**_show(made), "signing_secret": made.secret})


def list_endpoints(asked: Asked) -> Reply:
    """The owner's endpoints."""
    rows = [_show(one) for one in asked.services.endpoints.page(asked.owner)]
    return Reply(answers.page(rows, more=False))


def get_endpoint(asked: Asked) -> Reply:
    """One of them, without its secret."""
    return Reply(_show(asked.services.endpoints.get(asked.id, asked.owner)))


def change_endpoint(asked: Asked) -> Reply:
    """Another name, URL or events."""
    body = parse(EndpointChange, asked.fields)
    _check(asked, body.url, body.event_types or [])
    values = {name: value for name, value in body.model_dump().items() if value is not None}
    return Reply(_show(asked.services.endpoints.change(asked.id, asked.owner, **values)))


def delete_endpoint(asked: Asked) -> Reply:
    """Forget an endpoint and what was still to be sent there."""
    asked.services.endpoints.delete(asked.id, asked.owner)
    return Reply({"id": asked.id, "object": "webhook_endpoint.deleted", "deleted": True})


def rotate(asked: Asked) -> Reply:
    """A new secret; the old one may sign too for a day."""
    body = parse(RotateBody, asked.fields)
    keep = body.keep_old_secret_active_for_24_hours
    made = asked.services.endpoints.rotate(asked.id, asked.owner, keep_old=keep)
    return Reply({**_show(made), "signing_secret": made.secret})


def try_endpoint(asked: Asked) -> Reply:
    """Send an event of no video, and say what came back."""
    kind = parse(EndpointTry, asked.fields).event_type
    _check_types([kind])
    services = asked.services
    found, now = services.endpoints.get(asked.id, asked.owner), services.database.now()
    with services.endpoints.tests.hold(asked.owner, "webhook tests"):
        payload = make_payload(kind, "video_test", now)
        status = send(services.outside.post, found.url, found.signing_secrets(now), payload, now)
    answer = {"object": "webhook_endpoint.test", "event_type": kind, "status_code": status or None}
    return Reply({**answer, "success": 200 <= status < 300, "webhook_endpoint_id": found.id})  # noqa: PLR2004


def list_event_types(asked: Asked) -> Reply:
    """Events that can be sent."""
    return Reply({"object": "list", "data": list(EVENT_TYPES)})


def _check(asked: Asked, url: str | None, event_types: list[str]) -> None:
    if url is not None:
        try:
            asked.services.outside.check_url(url)
        except RequestError as error:
            raise invalid("url", str(error)) from error
    _check_types(event_types)


def _check_types(event_types: list[str]) -> None:
    for one in event_types:
        if one not in EVENT_TYPES:
            raise invalid(
                "event_types", f"There is no event {one!r:.60}. There is: {', '.join(EVENT_TYPES)}."
            )


def _show(one: Endpoint) -> dict[str, Any]:
    told = {"id": one.id, "object": "webhook_endpoint", "name": one.name, "url": one.url}
    times = {"created_at": int(one.created_at), "updated_at": int(one.updated_at)}
    return {
        **told,
        **times,
        "event_types": list(one.event_types),
        "signing_secret_hint": f"...{one.secret[-4:]}",
    }


class _Nothing(Body):
    """A call without a body."""


CALLS = (
    Call(
        "POST",
        "/v1/webhook_endpoints",
        create_endpoint,
        "Have events sent.",
        answers.EndpointAnswer,
        "write",
        EndpointBody,
        kind="webhook",
    ),
    Call(
        "GET",
        "/v1/webhook_endpoints",
        list_endpoints,
        "List webhook endpoints.",
        answers.EndpointList,
    ),
    Call(
        "GET",
        "/v1/webhook_endpoints/{id}",
        get_endpoint,
        "Look at a webhook endpoint.",
        answers.EndpointAnswer,
        faults=(404,),
    ),
    Call(
        "POST",
        "/v1/webhook_endpoints/{id}",
        change_endpoint,
        "Change a webhook endpoint.",
        answers.EndpointAnswer,
        "write",
        EndpointChange,
        faults=(404,),
        kind="webhook",
    ),
    Call(
        "DELETE",
        "/v1/webhook_endpoints/{id}",
        delete_endpoint,
        "Delete a webhook endpoint.",
        answers.Deleted,
        "write",
        faults=(404,),
    ),
    Call(
        "POST",
        "/v1/webhook_endpoints/{id}/rotate_secret",
        rotate,
        "A new secret.",
        answers.EndpointAnswer,
        "write",
        RotateBody,
        faults=(404,),
    ),
    Call(
        "POST",
        "/v1/webhook_endpoints/{id}/test",
        try_endpoint,
        "Send a test event.",
        answers.EndpointTest,
        "write",
        EndpointTry,
        faults=(404,),
        kind="webhook",
    ),
    Call("GET", "/v1/webhook_event_types", list_event_types, "List events.", answers.EventTypes),
)
