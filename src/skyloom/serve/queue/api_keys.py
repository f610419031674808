"""Who is asking: the token of this run, or an API key.

A key is `sk-sky-ID-SECRET` with 256 random bits. Only its SHA-256 is kept (it needs no slow hash: nobody guesses 256
bits), beside its id, owner, scopes and times. A key is shown once, when it is made.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from sqlalchemy import JSON, Column, Double, Row, String, Table, Text, insert, select, update

from skyloom.core.errors import ConfigError, RequestError
from skyloom.serve.api.errors import ApiError
from skyloom.serve.queue.database import Database
from skyloom.serve.queue.tables import metadata

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
LOCAL_OWNER = "local"
_KEY = re.compile(r"sk-sky-([0-9a-f]{12})-([\w-]{43})", re.ASCII)
_OWNER = re.compile(r"[\w.@-]{1,100}", re.ASCII)
_NOTICE_SECONDS = 60  # how exactly the last use of a key is remembered
_MOST_HEADER = 500

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(12), primary_key=True),
    Column("owner", String(128), nullable=False),
    Column("name", Text, nullable=False),
    Column("scopes", JSON, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("last_used_at", Double),
    Column("revoked_at", Double),
)


@dataclass(frozen=True)
class Caller:
    """Whose jobs and files a call may see, and what it may do."""

    owner: str
    scopes: tuple[Scope, ...]


@dataclass(frozen=True)
class KeyInfo:
    """What is remembered of a key. Times are seconds since 1970."""

    id: str
    owner: str
    name: str
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None
    last_used_at: float | None
    revoked_at: float | None


class KeyStore:
    """API keys in the database, and the one token of this run, which may do everything as the owner "local"."""

    def __init__(self, database: Database, token: str | None = None) -> None:
        self._database = database
        self._token = None if token is None else _digest(token)

    def create(
        self,
        owner: str,
        *,
        name: str = "",
        scopes: Sequence[str] = ("read", "write"),
        seconds: float | None = None,
    ) -> tuple[KeyInfo, str]:
        """A new key and its text, which is not kept. `seconds`: how long it is good for. Raises RequestError."""
        if not _OWNER.fullmatch(owner):
            raise RequestError(
                f"{owner!r:.80} is no owner.", hint="Use letters, digits and . _ @ -"
            )
        if not scopes or (unknown := [scope for scope in scopes if scope not in SCOPES]):
            raise RequestError(
                f"{unknown if scopes else scopes!r} are no scopes.",
                hint=f"Use {', '.join(SCOPES)}.",
            )
        if seconds is not None and not seconds > 0:
            raise RequestError(
                "A key must be good for some time.",
                hint="Leave the time out for a key without end.",
            )
        id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        text = f"sk-sky-{id}-{secret}"
        with self._database.write() as write:
            row = {
                "id": id,
                "owner": owner,
                "name": name,
                "scopes": sorted(set(scopes)),
                "digest": _digest(text),
            }
            row |= {
                "created_at": write.now,
                "expires_at": None if seconds is None else write.now + seconds,
            }
            write.connection.execute(insert(api_keys).values(**row))
            made = write.connection.execute(select(api_keys).where(api_keys.c.id == id)).one()
        return _info(made), text

    def list(self) -> list[KeyInfo]:
        """Every key, the oldest first."""
        with self._database.read() as connection:
            rows = connection.execute(
                select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
            ).all()
        return [_info(row) for row in rows]

    def revoke(self, id: str) -> KeyInfo:
        """Make a key useless from now on. Raises RequestError when there is none."""
        with self._database.write() as write:
            change = update(api_keys).where(api_keys.c.id == id, api_keys.c.revoked_at.is_(None))
            write.connection.execute(change.values(revoked_at=write.now))
            row = write.connection.execute(
                select(api_keys).where(api_keys.c.id == id)
            ).one_or_none()
        if row is None:
            raise RequestError(
                f"There is no key {id!r:.40}.", hint="`skyloom keys list` has the ids."
            )
        return _info(row)

    def usable(self) -> bool:
        """Whether any key would let somebody in."""
        now = self._database.now()
        return any(
            key.revoked_at is None and (key.expires_at or now + 1) > now for key in self.list()
        )

    def caller(self, authorization: str | None) -> Caller:
        """Who sent an Authorization header. Raises ApiError (401) for a missing, unknown, expired or revoked key."""
        scheme, _, text = (authorization or "").partition(" ")
        text = text.strip()
        if scheme.lower() != "bearer" or not text:
            raise _unauthorized(
                "Send your key in the header: Authorization: Bearer sk-sky-...", "missing_api_key"
            )
        if len(text) <= _MOST_HEADER:
            digest = _digest(text)
            if self._token is not None and hmac.compare_digest(digest, self._token):
                return Caller(LOCAL_OWNER, SCOPES)
            if found := _KEY.fullmatch(text):
                return self._owner_of(found[1], digest)
        raise _unauthorized("The API key is not valid.", "invalid_api_key")

    def _owner_of(self, id: str, digest: str) -> Caller:
        with self._database.read() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.id == id)).one_or_none()
        now = self._database.now()
        if row is None or not hmac.compare_digest(row.digest, digest) or row.revoked_at is not None:
            raise _unauthorized("The API key is not valid.", "invalid_api_key")
        if row.expires_at is not None and row.expires_at <= now:
            raise _unauthorized("The API key has expired.", "expired_api_key")
        if row.last_used_at is None or now - row.last_used_at > _NOTICE_SECONDS:
            with self._database.write() as write:
                write.connection.execute(
                    update(api_keys).where(api_keys.c.id == id).values(last_used_at=now)
                )
        return Caller(row.owner, tuple(cast(list[Scope], row.scopes)))


def check_exposure(host: str, keys: KeyStore) -> None:
    """Refuse to listen to other machines before there is a key. Raises ConfigError."""
    if host not in ("127.0.0.1", "::1", "localhost") and not keys.usable():
        hint = "Make one: skyloom keys create OWNER. Put a proxy with TLS in front."
        raise ConfigError(
            f"{host} can be reached from other machines, and there is no API key yet.", hint=hint
        )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _unauthorized(message: str, code: str) -> ApiError:
    return ApiError(
        401, message, code, type="authentication_error", headers={"www-authenticate": "Bearer"}
    )


def _info(row: Row[Any]) -> KeyInfo:
    times = (row.created_at, row.expires_at, row.last_used_at, row.revoked_at)
    return KeyInfo(row.id, row.owner, row.name, tuple(row.scopes), *times)
