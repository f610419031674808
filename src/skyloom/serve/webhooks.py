"""Webhooks: who wants to hear of which events, and their delivery, signed, until it succeeds or 72 hours are over.

An event's deliveries are written in the transaction that ends the job, so none is lost and none is made up. Signatures
follow Standard Webhooks: `v1,` and the base64 HMAC-SHA256 of "id.timestamp.body". A delivery may arrive twice; the
header webhook-id tells.
"""

import base64
import binascii
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, and_, delete, insert, select, update

from skyloom.core.errors import JobError, SkyloomError
from skyloom.serve.database import Database, Write
from skyloom.serve.quotas import Quotas
from skyloom.serve.tables import deliveries, endpoints

EVENT_TYPES = ("video.completed", "video.failed")
BACKOFF = (5, 30, 120, 600, 1_800, 3_600, 7_200, 14_400, *[28_800] * 8)  # seconds; 72 hours and a little in all
OLD_SECRET_SECONDS = 24 * 3600
_KEEP_DONE = 7 * 86_400  # seconds
_CLAIM = 60  # seconds in which nobody else tries the same delivery
Post = Callable[[str, Mapping[str, str], bytes], int]
"""Sends headers and a body to a URL and returns the HTTP status; raises SkyloomError or OSError when it cannot."""

log = logging.getLogger(__name__)


class MissingEndpointError(JobError):
    """There is no such webhook endpoint, or it is somebody else's."""

    code = "endpoint_missing"


@dataclass(frozen=True)
class Endpoint:
    """Where an owner wants events sent. The `secret` is for signing, and to be shown when made or rotated only."""

    id: str
    owner: str
    name: str
    url: str
    event_types: tuple[str, ...]
    secret: str
    created_at: float
    updated_at: float


class EndpointStore:
    """The endpoints of every owner. Methods raise MissingEndpointError for those of others."""

    def __init__(self, database: Database, quotas: Quotas | None = None) -> None:
        self.database = database
        self._quotas = quotas or Quotas()

    def add(self, owner: str, name: str, url: str, event_types: Sequence[str]) -> Endpoint:
        """A new endpoint with a new secret; check the URL first (outbound.check_url). Raises QuotaError."""
        with self.database.write() as write:
            self._quotas.take(write.connection, owner, write.now, webhooks=1)
            row = {"id": f"we_{secrets.token_hex(16)}", "owner": owner, "name": name, "url": url}
            row |= {"event_types": list(event_types), "secret": _new_secret()}
            row |= {"created_at": write.now, "updated_at": write.now}
            write.connection.execute(insert(endpoints).values(**row))
            return Endpoint(**{**row, "event_types": tuple(event_types)})

    def get(self, id: str, owner: str) -> Endpoint:
        """One endpoint."""
        with self.database.read() as connection:
            return _endpoint(connection.execute(select(endpoints).where(_is(id, owner))).one_or_none())

    def page(self, owner: str) -> list[Endpoint]:
        """All endpoints of an owner, the newest first."""
        look = select(endpoints).where(endpoints.c.owner == owner).order_by(endpoints.c.created_at.desc())
        with self.database.read() as connection:
            return [_endpoint(row) for row in connection.execute(look)]

    def change(self, id: str, owner: str, **values: Any) -> Endpoint:
        """Another name, url or event_types."""
        return self._update(id, owner, values)

    def rotate(self, id: str, owner: str, *, keep_old: bool) -> Endpoint:
        """A new secret; the old one signs too for 24 hours if it is to be kept."""
        old = self.get(id, owner).secret
        until = self.database.now() + OLD_SECRET_SECONDS
        kept = {"old_secret": old, "old_secret_until": until} if keep_old else {"old_secret": None}
        return self._update(id, owner, {"secret": _new_secret(), **kept})

    def delete(self, id: str, owner: str) -> None:
        """Forget an endpoint and what was still to be sent there."""
        with self.database.write() as write:
            if not write.connection.execute(delete(endpoints).where(_is(id, owner))).rowcount:
                raise MissingEndpointError("There is no such webhook endpoint.")

    def _update(self, id: str, owner: str, values: Mapping[str, Any]) -> Endpoint:
        with self.database.write() as write:
            write.connection.execute(update(endpoints).where(_is(id, owner)).values(**values, updated_at=write.now))
            return _endpoint(write.connection.execute(select(endpoints).where(_is(id, owner))).one_or_none())


def announce(write: Write, owner: str, event_type: str, job: str) -> None:
    """Write down that the owner's endpoints are to hear of an event of a job."""
    rows = write.connection.execute(select(endpoints).where(endpoints.c.owner == owner)).all()
    wanting = [row.id for row in rows if event_type in row.event_types]
    if wanting:
        payload = make_payload(event_type, job, write.now)
        row = {"event": payload["id"], "payload": payload, "next_at": write.now, "created_at": write.now}
        write.connection.execute(insert(deliveries), [{**row, "endpoint": endpoint} for endpoint in wanting])


def make_payload(event_type: str, job: str, now: float) -> dict[str, Any]:
    """An event as it is sent, with an id of its own."""
    event = f"evt_{secrets.token_hex(16)}"
    return {"id": event, "object": "event", "created_at": int(now), "type": event_type, "data": {"id": job}}


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """One signature as the header holds it. A secret "whsec_..." is base64, any other is taken as it is."""
    key = secret.encode()
    if secret.startswith("whsec_"):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except (binascii.Error, ValueError):
            key = secret.encode()
    digest = hmac.new(key, b".".join([id.encode(), str(timestamp).encode(), body]), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def send(post: Post, url: str, signing: Sequence[str], payload: Mapping[str, Any], now: float) -> int:
    """Send an event, signed with every secret; the HTTP status, or 0 when nothing answered."""
    body = json.dumps(payload, separators=(",", ":")).encode()
    id, timestamp = str(payload["id"]), int(now)
    headers = {"content-type": "application/json", "user-agent": "skyloom", "webhook-id": id}
    headers["webhook-timestamp"] = str(timestamp)
    headers["webhook-signature"] = " ".join(sign(secret, id, timestamp, body) for secret in signing)
    try:
        return post(url, headers, body)
    except (SkyloomError, OSError) as error:
        log.warning("a webhook could not be sent", extra={"event": id, "cause": type(error).__name__})
        return 0


def deliver_due(database: Database, post: Post, limit: int = 20) -> int:
    """Send what is due; what fails is tried again, later each time. Returns how many were tried.

    Any number of processes may call it at once: a delivery is in one process's hands at a time.
    """
    with database.write() as write:
        due = select(deliveries, endpoints.c.url, endpoints.c.secret, endpoints.c.old_secret).add_columns(
            endpoints.c.old_secret_until
        )
        due = due.join(endpoints).where(deliveries.c.next_at <= write.now).order_by(deliveries.c.next_at).limit(limit)
        rows = write.connection.execute(due).all()
        mine = deliveries.c.number.in_([row.number for row in rows])
        write.connection.execute(update(deliveries).where(mine).values(next_at=write.now + _CLAIM))
        old = and_(deliveries.c.next_at.is_(None), deliveries.c.created_at < write.now - _KEEP_DONE)
        write.connection.execute(delete(deliveries).where(old))
        now = write.now
    for row in rows:
        signing = [row.secret]
        if row.old_secret is not None and (row.old_secret_until or 0.0) > now:
            signing.append(row.old_secret)
        status = send(post, row.url, signing, row.payload, now)
        _note(database, row, status)
    return len(rows)


def _note(database: Database, row: Row[Any], status: int) -> None:
    """What came of a delivery. Any 2xx is a success; None for `next_at` means that it is over."""
    with database.write() as write:
        over = 200 <= status < 300 or row.attempts >= len(BACKOFF)  # noqa: PLR2004
        next_at = None if over else write.now + BACKOFF[row.attempts]
        values = {"attempts": row.attempts + 1, "status_code": status, "next_at": next_at}
        write.connection.execute(update(deliveries).where(deliveries.c.number == row.number).values(**values))


def _new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def _is(id: str, owner: str) -> Any:
    return and_(endpoints.c.id == id, endpoints.c.owner == owner)


def _endpoint(row: Row[Any] | None) -> Endpoint:
    if row is None:
        raise MissingEndpointError("There is no such webhook endpoint.")
    names = ("id", "owner", "name", "url", "secret", "created_at", "updated_at")
    return Endpoint(**{name: row._mapping[name] for name in names}, event_types=tuple(row.event_types))
