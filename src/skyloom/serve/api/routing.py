"""Route class of the API: handlers on threads of their limits, HEAD, bodies by annotation."""

import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.routing import APIRoute

from skyloom.serve.api.dependencies import BodyOf
from skyloom.serve.api.limits import Kind
from skyloom.serve.api.openapi import describe_body
from skyloom.serve.api.request_models import RequestBody

Handler = Callable[..., Any]


def limit(kind: Kind, *, with_media: Kind | None = None) -> Callable[[Handler], Handler]:
    """Decorator: the limit under which a handler runs; `with_media`: when the body holds media.

    Without it a handler has the limit "quick", and "upload" when its body holds media. "loop" is
    for a handler that never waits: it runs on the event loop.
    """

    def mark(handler: Handler) -> Handler:
        handler.limits = (kind, with_media or kind)  # type: ignore[attr-defined]
        return handler

    return mark


class ApiRoute(APIRoute):
    """A route with a plain function as its handler.

    The handler runs on a daemon thread of its limit. A parameter whose annotation is a RequestBody
    gets the parsed body. The summary is the first line of the docstring. A route for GET answers
    HEAD too.
    """

    def __init__(self, path: str, endpoint: Handler, **options: Any) -> None:
        self.limits: tuple[Kind, Kind] = getattr(endpoint, "limits", ("quick", "upload"))
        summary = inspect.cleandoc(endpoint.__doc__ or "").partition("\n")[0]
        options["summary"] = options.get("summary") or summary
        signature, body = _with_body(inspect.signature(endpoint))
        if body is not None:
            options["openapi_extra"] = {"requestBody": describe_body(body)}
        if options.get("methods") == ["GET"]:
            options["methods"] = ["GET", "HEAD"]
        if self.limits[0] != "loop":
            endpoint = _on_thread(endpoint, signature, self.limits)
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        """FastAPI's handler, which also notes the route's name for the log and the metrics."""
        handle = super().get_route_handler()
        name = f"{min(self.methods or [''])} {self.path}"

        async def handle_named(request: Request) -> Response:
            request.state.route = name
            return await handle(request)

        return handle_named


def make_router() -> APIRouter:
    """A router whose routes are ApiRoutes."""
    return APIRouter(route_class=ApiRoute)


def _with_body(
    signature: inspect.Signature,
) -> tuple[inspect.Signature, type[RequestBody] | None]:
    """The signature with a dependency in place of its RequestBody, and that body."""
    parameters = []
    body = None
    for one in signature.parameters.values():
        kind = one.annotation
        if isinstance(kind, type) and issubclass(kind, RequestBody):
            body = kind
            kind = Annotated[body, Depends(BodyOf(body), scope="function")]
        parameters.append(one.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
    return signature.replace(parameters=parameters), body


def _on_thread(
    handler: Handler, signature: inspect.Signature, limits: tuple[Kind, Kind]
) -> Handler:
    """A coroutine function that runs `handler` on a thread of its limit, in the owner's share."""
    own = signature.parameters
    takes_request = "request" in own

    async def endpoint(request: Request, **arguments: Any) -> Any:
        state = request.state
        kind = limits[1] if getattr(state, "has_media", False) else limits[0]
        if takes_request:
            arguments["request"] = request
        limiter = request.app.state.services.limiters[kind]
        return await limiter.run(getattr(state, "owner", ""), partial(handler, **arguments))

    request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY, annotation=Request)
    parameters = list(own.values()) if takes_request else [*own.values(), request]
    endpoint.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    endpoint.__name__ = handler.__name__
    endpoint.__doc__ = handler.__doc__
    return endpoint
