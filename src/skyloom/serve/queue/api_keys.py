# pyright: basic
"""API keys, and the token of a server's run.

A key is `sk-sky-ID-SECRET` with 256 random bits. The database holds its SHA-256 only: a slow hash
is not needed for so many random bits. A key is shown once, when it is created.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from sqlalchemy import Row, insert, select, update

from skyloom.core.errors import ConfigError, RequestError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.errors import AuthenticationError
from skyloom.serve.queue.tables import api_keys

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
LOCAL_OWNER = "local"
_KEY = re.compile(r"sk-sky-([0-9a-f]{12})-([\w-]{43})", re.ASCII)
_OWNER = re.compile(r"[\w.@-]{1,100}", re.ASCII)
_LAST_USED_SECONDS = 60  # resolution of last_used_at
_MAX_HEADER = 500  # characters of an Authorization header


@dataclass(frozen=True)
class Caller:
    """An authenticated owner and the scopes of the key."""

    owner: str
    scopes: tuple[Scope, ...]
    key_id: str | None = None  # None for the token of the run
    token_digest: str | None = None  # of the token of the run


@dataclass(frozen=True)
class KeyInfo:
    """An API key without its secret. Times are seconds since 1970."""

    id: str
    owner: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None
    last_used_at: float | None
    revoked_at: float | None


_COLUMNS = [api_keys.c[field.name] for field in fields(KeyInfo)]


class KeyStore:
    """API keys in the database, and the run's `token`, which has all scopes as owner "local"."""

    def __init__(self, database: Database, token: str | None = None) -> None:
        self._database = database
        self._token = None if token is None else digest_of(token)

    def create(
        self,
        owner: str,
        *,
        name: str = "",
        scopes: Sequence[str] = ("read", "write"),
        seconds: float | None = None,
    ) -> tuple[KeyInfo, str]:
        """Create a key that is valid for `seconds`, or for good; return it and its text.

        The text is not stored. Raises RequestError.
        """
        if not _OWNER.fullmatch(owner):
            message = f"owner must be 1 to 100 letters, digits or . _ @ -, got {owner!r:.80}."
            raise RequestError(message)
        if not scopes or not set(scopes) <= set(SCOPES):
            message = f"scopes must be some of {', '.join(SCOPES)}, got {list(scopes)!r:.80}."
            raise RequestError(message)
        if seconds is not None and not seconds > 0:
            hint = "Leave it out for a key that does not expire."
            raise RequestError(f"seconds must be > 0, got {seconds:g}.", hint=hint)
        id = secrets.token_hex(6)
        key = f"sk-sky-{id}-{secrets.token_urlsafe(32)}"
        with self._database.write() as write:
            row = {
                "id": id,
                "owner": owner,
                "name": name,
                "scopes": sorted(set(scopes)),
                "digest": digest_of(key),
                "created_at": write.now,
                "expires_at": None if seconds is None else write.now + seconds,
            }
            added = insert(api_keys).values(**row).returning(*_COLUMNS)
            return _as_key_info(write.connection.execute(added).one()), key

    def list(self) -> list[KeyInfo]:
        """List every key, the oldest first."""
        query = select(*_COLUMNS).order_by(api_keys.c.created_at, api_keys.c.id)
        with self._database.read() as connection:
            return [_as_key_info(row) for row in connection.execute(query)]

    def revoke(self, id: str) -> KeyInfo:
        """Revoke a key at once. Raises RequestError for an unknown id."""
        with self._database.write() as write:
            change = update(api_keys).where(api_keys.c.id == id, api_keys.c.revoked_at.is_(None))
            write.connection.execute(change.values(revoked_at=write.now))
            query = select(*_COLUMNS).where(api_keys.c.id == id)
            row = write.connection.execute(query).one_or_none()
        if row is None:
            message = f"id must be the id of an API key, got {id!r:.40}."
            raise RequestError(message, hint="`skyloom keys list` shows the ids.")
        return _as_key_info(row)

    def usable(self) -> bool:
        """Whether any key is valid now."""
        now = self._database.now()
        return any(
            key.revoked_at is None and (key.expires_at is None or key.expires_at > now)
            for key in self.list()
        )

    def authenticate(self, authorization: str | None) -> Caller:
        """Authenticate the caller by an Authorization header.

        Raises AuthenticationError for a missing, unknown, expired or revoked key.
        """
        scheme, _, key = (authorization or "").partition(" ")
        key = key.strip()
        if scheme.lower() != "bearer" or not key:
            message = "Send your key in the header: Authorization: Bearer sk-sky-..."
            raise AuthenticationError(message, "missing_api_key")
        if len(key) <= _MAX_HEADER:
            digest = digest_of(key)
            if self._token is not None and hmac.compare_digest(digest, self._token):
                return Caller(LOCAL_OWNER, SCOPES, token_digest=digest)
            if found := _KEY.fullmatch(key):
                return self._find_owner(found[1], digest)
        raise AuthenticationError("The API key is not valid.")

    def is_valid(self, key_id: str | None, token_digest: str | None) -> bool:
        """Whether a key, or a run's token, that authenticated a caller is still valid."""
        if key_id is None:
            return self._token is not None and token_digest == self._token
        query = select(api_keys.c.revoked_at, api_keys.c.expires_at).where(api_keys.c.id == key_id)
        with self._database.read() as connection:
            row = connection.execute(query).one_or_none()
        if row is None or row.revoked_at is not None:
            return False
        return row.expires_at is None or row.expires_at > self._database.now()

    def _find_owner(self, id: str, digest: str) -> Caller:
        """Return the owner of a valid key; update the key's time of last use."""
        this_key = api_keys.c.id == id
        with self._database.read() as connection:
            row = connection.execute(select(api_keys).where(this_key)).one_or_none()
        now = self._database.now()
        if row is None or not hmac.compare_digest(row.digest, digest) or row.revoked_at is not None:
            raise AuthenticationError("The API key is not valid.")
        if row.expires_at is not None and row.expires_at <= now:
            raise AuthenticationError("The API key has expired.", "expired_api_key")
        if row.last_used_at is None or now - row.last_used_at > _LAST_USED_SECONDS:
            with self._database.write() as write:
                change = update(api_keys).where(this_key).values(last_used_at=now)
                write.connection.execute(change)
        return Caller(row.owner, tuple(cast("list[Scope]", row.scopes)), key_id=id)


def check_exposure(host: str, keys: KeyStore) -> None:
    """Check that there is a key before the server listens to other machines.

    Raises ConfigError.
    """
    if host not in ("127.0.0.1", "::1", "localhost") and not keys.usable():
        message = f"host must be 127.0.0.1 or ::1 while there is no API key, got {host}."
        hint = "Create one: skyloom keys create OWNER. Put a proxy with TLS in front."
        raise ConfigError(message, hint=hint)


def digest_of(text: str) -> str:
    """Return the SHA-256 of a secret as hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _as_key_info(row: Row[Any]) -> KeyInfo:
    return KeyInfo(**{**row._mapping, "scopes": tuple(row.scopes)})
