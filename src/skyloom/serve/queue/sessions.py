"""Sign-in for web pages: sessions and one-use codes.

A page signs in with an API key or a code and gets a cookie. A code is valid for five minutes and
one use; `skyloom studio` puts one into the URL that it opens. A session ends at its expiry, at
sign-out, when its API key is revoked or expires, and, if it came from the token of a run, with
that run. The database holds SHA-256 digests only.
"""

import secrets
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import Row, delete, func, insert, select

from skyloom.serve.queue.api_keys import Caller, KeyStore, Scope, digest_of
from skyloom.serve.queue.database import Database, Write
from skyloom.serve.queue.errors import AuthenticationError
from skyloom.serve.queue.tables import sessions, sign_in_codes

SESSION_SECONDS = 7 * 24 * 3600
CODE_PREFIX = "code-"
CODE_SECONDS = 300
MAX_PER_OWNER = 100  # sessions, and codes, of one owner; the oldest are deleted
_MAX_TEXT = 200  # characters of a cookie or a code
_INVALID_SESSION = "The session has ended. Sign in again."
_INVALID_CODE = "The code is not valid. Codes work once, within five minutes."


@dataclass(frozen=True)
class Session:
    """A signed-in page. Times are seconds since 1970."""

    owner: str
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float


class SessionStore:
    """Sessions and codes in the database, valid as long as the key they came from."""

    def __init__(self, database: Database, keys: KeyStore) -> None:
        self._database = database
        self._keys = keys

    def create_code(self, caller: Caller) -> tuple[str, float]:
        """Create a one-use code with the caller's scopes; return it and its expiry."""
        code = f"{CODE_PREFIX}{secrets.token_urlsafe(32)}"
        with self._database.write() as write:
            _make_room(write, sign_in_codes, caller.owner)
            expires_at = write.now + CODE_SECONDS
            row = {**_grant(caller), "digest": digest_of(code), "expires_at": expires_at}
            write.connection.execute(insert(sign_in_codes).values(created_at=write.now, **row))
        return code, expires_at

    def redeem(self, code: str) -> Caller:
        """Use up a code; return the caller who created it. Raises AuthenticationError."""
        if len(code) > _MAX_TEXT:
            raise AuthenticationError(_INVALID_CODE, "invalid_code")
        with self._database.write() as write:
            used = delete(sign_in_codes).where(sign_in_codes.c.digest == digest_of(code))
            row = write.connection.execute(used.returning(*sign_in_codes.c)).one_or_none()
            now = write.now
        if row is None or row.expires_at <= now or not self._is_key_valid(row):
            raise AuthenticationError(_INVALID_CODE, "invalid_code")
        return _as_caller(row)

    def create(self, caller: Caller) -> tuple[str, Session]:
        """Create a session with the caller's scopes; return its cookie and the session."""
        cookie = secrets.token_urlsafe(32)
        with self._database.write() as write:
            _make_room(write, sessions, caller.owner)
            created_at = write.now
            expires_at = created_at + SESSION_SECONDS
            row = {**_grant(caller), "digest": digest_of(cookie), "expires_at": expires_at}
            write.connection.execute(insert(sessions).values(created_at=created_at, **row))
        return cookie, Session(caller.owner, caller.scopes, created_at, expires_at)

    def authenticate(self, cookie: str) -> Caller:
        """Authenticate the caller by a session's cookie. Raises AuthenticationError."""
        row = self._find(cookie)
        if row is None or row.expires_at <= self._database.now() or not self._is_key_valid(row):
            raise AuthenticationError(_INVALID_SESSION, "invalid_session")
        return _as_caller(row)

    def expiry(self, cookie: str) -> float | None:
        """Return when a session expires, or None if there is no such session."""
        row = self._find(cookie)
        return None if row is None else row.expires_at

    def delete(self, cookie: str) -> None:
        """End a session, if it exists."""
        with self._database.write() as write:
            ended = delete(sessions).where(sessions.c.digest == digest_of(cookie[:_MAX_TEXT]))
            write.connection.execute(ended)

    def _find(self, cookie: str) -> Row[Any] | None:
        if not cookie or len(cookie) > _MAX_TEXT:
            return None
        query = select(sessions).where(sessions.c.digest == digest_of(cookie))
        with self._database.read() as connection:
            return connection.execute(query).one_or_none()

    def _is_key_valid(self, row: Row[Any]) -> bool:
        return self._keys.is_valid(row.key_id, row.token_digest)


def _grant(caller: Caller) -> dict[str, Any]:
    return {
        "owner": caller.owner,
        "scopes": list(caller.scopes),
        "key_id": caller.key_id,
        "token_digest": caller.token_digest,
    }


def _as_caller(row: Row[Any]) -> Caller:
    scopes = tuple(cast("list[Scope]", row.scopes))
    return Caller(row.owner, scopes, key_id=row.key_id, token_digest=row.token_digest)


def _make_room(write: Write, table: Any, owner: str) -> None:
    """Delete the owner's expired rows, and the oldest if there are MAX_PER_OWNER."""
    mine = table.c.owner == owner
    write.connection.execute(delete(table).where(mine, table.c.expires_at <= write.now))
    count = write.connection.execute(select(func.count()).select_from(table).where(mine)).scalar()
    if count and count >= MAX_PER_OWNER:
        excess = count - MAX_PER_OWNER + 1
        query = select(table.c.digest).where(mine).order_by(table.c.created_at).limit(excess)
        oldest = list(write.connection.execute(query).scalars())
        write.connection.execute(delete(table).where(table.c.digest.in_(oldest)))
