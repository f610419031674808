"""Sign-in for web pages: a session cookie from an API key or a one-use code."""

from fastapi import Request, Response

from skyloom.serve.api.dependencies import (
    AppServices,
    Reader,
    SignIn,
    Writer,
    session_cookie,
    session_of,
)
from skyloom.serve.api.response_models import (
    SessionDeletedResponse,
    SessionResponse,
    SignInCodeResponse,
)
from skyloom.serve.api.routing import make_router
from skyloom.serve.queue.sessions import SESSION_SECONDS

router = make_router()


@router.post("/v1/session")
def create_session(
    request: Request, response: Response, caller: SignIn, services: AppServices
) -> SessionResponse:
    """Sign in by the API key or one-use code in the Authorization header; sets a cookie."""
    cookie, session = services.sessions.create(caller)
    response.set_cookie(
        session_cookie(request),
        cookie,
        max_age=SESSION_SECONDS,
        secure=request.headers.get("origin", "").startswith("https:"),
        httponly=True,
        samesite="strict",
    )
    return SessionResponse.from_session(session)


@router.get("/v1/session")
def get_session(request: Request, caller: Reader, services: AppServices) -> SessionResponse:
    """Get the caller's owner and scopes, and the expiry of the session, if it is one."""
    cookie = session_of(request)
    return SessionResponse(
        owner=caller.owner,
        scopes=list(caller.scopes),
        expires_at=None if cookie is None else services.sessions.expiry(cookie),
    )


@router.delete("/v1/session")
def delete_session(
    request: Request, response: Response, caller: Reader, services: AppServices
) -> SessionDeletedResponse:
    """Sign out: end the session and delete its cookie."""
    cookie = session_of(request)
    if cookie is not None:
        services.sessions.delete(cookie)
    response.delete_cookie(session_cookie(request), httponly=True, samesite="strict")
    return SessionDeletedResponse()


@router.post("/v1/session/codes")
def create_sign_in_code(caller: Writer, services: AppServices) -> SignInCodeResponse:
    """Create a code that signs a page in once, within five minutes, with the caller's scopes."""
    code, expires_at = services.sessions.create_code(caller)
    return SignInCodeResponse(code=code, expires_at=expires_at)
