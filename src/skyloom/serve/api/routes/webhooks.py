"""Webhook endpoints: addresses that events are sent to, their secrets, and test events."""

from http import HTTPStatus

from skyloom.core.errors import RequestError
from skyloom.serve.api.dependencies import AppServices, Reader, Services, Writer
from skyloom.serve.api.errors import invalid
from skyloom.serve.api.openapi import errors
from skyloom.serve.api.request_models import (
    EndpointBody,
    EndpointChange,
    EndpointTry,
    RotateBody,
)
from skyloom.serve.api.response_models import (
    DeletedResponse,
    EndpointList,
    EndpointResponse,
    EndpointTestResponse,
    EventTypesResponse,
    NewEndpointResponse,
)
from skyloom.serve.api.routing import limit, make_router
from skyloom.serve.queue.webhooks import EVENT_TYPES, make_payload, send

router = make_router()


@router.post("/v1/webhook_endpoints")
@limit("webhook")
def create_endpoint(
    body: EndpointBody, caller: Writer, services: AppServices
) -> NewEndpointResponse:
    """Add a webhook endpoint; its secret is sent only here."""
    _check_url(services, body.url)
    _check_types(body.event_types)
    endpoint = services.endpoints.add(caller.owner, body.name, body.url, body.event_types)
    return NewEndpointResponse.model_validate(endpoint)


@router.get("/v1/webhook_endpoints")
def list_endpoints(caller: Reader, services: AppServices) -> EndpointList:
    """List webhook endpoints."""
    endpoints = services.endpoints.page(caller.owner)
    return EndpointList.from_rows([EndpointResponse.model_validate(one) for one in endpoints])


@router.get("/v1/webhook_endpoints/{id}", responses=errors(404))
def get_endpoint(id: str, caller: Reader, services: AppServices) -> EndpointResponse:
    """Get a webhook endpoint."""
    return EndpointResponse.model_validate(services.endpoints.get(id, caller.owner))


@router.post("/v1/webhook_endpoints/{id}", responses=errors(404))
@limit("webhook")
def change_endpoint(
    id: str, body: EndpointChange, caller: Writer, services: AppServices
) -> EndpointResponse:
    """Change the name, URL or events of a webhook endpoint."""
    if body.url is not None:
        _check_url(services, body.url)
    _check_types(body.event_types or [])
    changes = body.model_dump(exclude_none=True)
    endpoint = services.endpoints.change(id, caller.owner, **changes)
    return EndpointResponse.model_validate(endpoint)


@router.delete("/v1/webhook_endpoints/{id}", responses=errors(404))
def delete_endpoint(id: str, caller: Writer, services: AppServices) -> DeletedResponse:
    """Delete a webhook endpoint and its pending deliveries."""
    services.endpoints.delete(id, caller.owner)
    return DeletedResponse(id=id, object="webhook_endpoint.deleted")


@router.post("/v1/webhook_endpoints/{id}/rotate_secret", responses=errors(404))
def rotate_secret(
    id: str, body: RotateBody, caller: Writer, services: AppServices
) -> NewEndpointResponse:
    """Replace the secret; the old one may sign too for a day."""
    keep_old = body.keep_old_secret_active_for_24_hours
    endpoint = services.endpoints.rotate(id, caller.owner, keep_old=keep_old)
    return NewEndpointResponse.model_validate(endpoint)


@router.post("/v1/webhook_endpoints/{id}/test", responses=errors(404))
@limit("webhook")
def send_test_event(
    id: str, body: EndpointTry, caller: Writer, services: AppServices
) -> EndpointTestResponse:
    """Send a test event and return how the endpoint answered."""
    _check_types([body.event_type])
    endpoint = services.endpoints.get(id, caller.owner)
    now = services.database.now()
    with services.endpoints.tests.hold(caller.owner, "webhook tests"):
        payload = make_payload(body.event_type, "video_test", now)
        status = send(
            services.effects.post, endpoint.url, endpoint.signing_secrets(now), payload, now
        )
    return EndpointTestResponse(
        event_type=body.event_type,
        status_code=status or None,
        success=HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES,
        webhook_endpoint_id=endpoint.id,
    )


@router.get("/v1/webhook_event_types")
def list_event_types(caller: Reader, services: AppServices) -> EventTypesResponse:
    """List event types."""
    return EventTypesResponse(data=list(EVENT_TYPES))


def _check_url(services: Services, url: str) -> None:
    try:
        services.effects.check_url(url)
    except RequestError as error:
        raise invalid("url", str(error)) from error


def _check_types(event_types: list[str]) -> None:
    for one in event_types:
        if one not in EVENT_TYPES:
            known = ", ".join(EVENT_TYPES)
            raise invalid("event_types", f"There is no event {one!r:.60}. There is: {known}.")
