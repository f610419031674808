# pyright: basic
"""Webhooks: endpoints, event payloads, signatures and one HTTP request (webhook_delivery.py sends).

The deliveries of an event are added in the transaction that ends the job, so none is lost or made
up. Signatures follow Standard Webhooks: `v1,` and the base64 HMAC-SHA256 of "id.timestamp.body".
A delivery may arrive twice, with the same webhook-id header.
"""

import base64
import binascii
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import ColumnElement, Row, and_, delete, insert, select, update

from skyloom.core.errors import SkyloomError
from skyloom.serve.queue.database import MAX_PAGE, Database, Write, read_page
from skyloom.serve.queue.errors import NotFoundError
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.slots import Slots
from skyloom.serve.queue.tables import deliveries, endpoints

EVENT_TYPES = ("video.completed", "video.failed")
OLD_SECRET_SECONDS = 24 * 3600
_MAX_TESTS = 4  # test events sent at once
_MAX_TESTS_PER_OWNER = 1
Post = Callable[[str, Mapping[str, str], bytes], int]
"""Posts headers and a body to a URL; returns the HTTP status. Raises SkyloomError or OSError."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoint:
    """A URL that receives an owner's events. Times are seconds since 1970.

    `secret` signs, and is shown only when it is created or rotated. After a rotation,
    `old_secret` signs too until `old_secret_until`, if it was kept.
    """

    id: str
    owner: str
    name: str
    url: str
    event_types: tuple[str, ...]
    secret: str
    created_at: float
    updated_at: float
    old_secret: str | None = None
    old_secret_until: float | None = None

    def signing_secrets(self, now: float) -> list[str]:
        """Return the secrets that are valid at a time, the newest first."""
        old = self.old_secret if (self.old_secret_until or 0.0) > now else None
        return [self.secret] if old is None else [self.secret, old]


class EndpointStore:
    """The endpoints of every owner. Methods raise NotFoundError for those of another owner.

    `tests` limits the test events in progress; each blocks a request until the endpoint answers.
    """

    def __init__(self, database: Database, quotas: Quotas | None = None) -> None:
        self.database = database
        self.tests = Slots(_MAX_TESTS, _MAX_TESTS_PER_OWNER)
        self._quotas = quotas or Quotas()

    def add(self, owner: str, name: str, url: str, event_types: Sequence[str]) -> Endpoint:
        """Add an endpoint with a new secret. The caller checks the URL. Raises QuotaError."""
        with self.database.write() as write:
            self._quotas.check(write.connection, owner, write.now, webhooks=1)
            row = {
                "id": f"we_{secrets.token_hex(16)}",
                "owner": owner,
                "name": name,
                "url": url,
                "event_types": list(event_types),
                "secret": _new_secret(),
                "created_at": write.now,
                "updated_at": write.now,
            }
            added = insert(endpoints).values(**row).returning(endpoints)
            return as_endpoint(write.connection.execute(added).one())

    def get(self, id: str, owner: str) -> Endpoint:
        """Read an endpoint."""
        with self.database.read() as connection:
            query = select(endpoints).where(_is_owned(id, owner))
            return _found(connection.execute(query).one_or_none(), id)

    def page(self, owner: str) -> list[Endpoint]:
        """List an owner's endpoints, the newest first, MAX_PAGE at most."""
        query = select(endpoints).where(endpoints.c.owner == owner)
        with self.database.read() as connection:
            query = query.order_by(endpoints.c.created_at.desc())
            rows, _ = read_page(connection, query, MAX_PAGE)
        return [as_endpoint(row) for row in rows]

    def change(self, id: str, owner: str, **values: Any) -> Endpoint:
        """Change the name, url or event_types."""
        with self.database.write() as write:
            change = update(endpoints).where(_is_owned(id, owner))
            change = change.values(**values, updated_at=write.now).returning(endpoints)
            return _found(write.connection.execute(change).one_or_none(), id)

    def rotate(self, id: str, owner: str, *, keep_old: bool) -> Endpoint:
        """Replace the secret; with `keep_old` the old one signs too for 24 hours."""
        old = self.get(id, owner).secret
        values: dict[str, Any] = {"secret": _new_secret(), "old_secret": None}
        if keep_old:
            values["old_secret"] = old
            values["old_secret_until"] = self.database.now() + OLD_SECRET_SECONDS
        return self.change(id, owner, **values)

    def delete(self, id: str, owner: str) -> None:
        """Delete an endpoint and its deliveries."""
        with self.database.write() as write:
            own = delete(endpoints).where(_is_owned(id, owner))
            if not write.connection.execute(own).rowcount:
                raise NotFoundError("webhook endpoint", id)


def enqueue_deliveries(write: Write, owner: str, event_type: str, job: str) -> None:
    """Add a delivery of a job's event for each endpoint of the owner that subscribes to it."""
    rows = write.connection.execute(select(endpoints).where(endpoints.c.owner == owner)).all()
    subscribed = [row.id for row in rows if event_type in row.event_types]
    if not subscribed:
        return
    payload = make_payload(event_type, job, write.now)
    row = {
        "event": payload["id"],
        "payload": payload,
        "next_at": write.now,
        "created_at": write.now,
    }
    added = [{**row, "endpoint": endpoint} for endpoint in subscribed]
    write.connection.execute(insert(deliveries), added)


def make_payload(event_type: str, job: str, now: float) -> dict[str, Any]:
    """Build the body of an event with a new id."""
    return {
        "id": f"evt_{secrets.token_hex(16)}",
        "object": "event",
        "created_at": int(now),
        "type": event_type,
        "data": {"id": job},
    }


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """Sign a body for the header. A secret "whsec_..." is base64, any other is used as it is."""
    key = secret.encode()
    if secret.startswith("whsec_"):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except (binascii.Error, ValueError):
            key = secret.encode()
    content = b".".join([id.encode(), str(timestamp).encode(), body])
    digest = hmac.new(key, content, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def send(
    post: Post, url: str, signing: Sequence[str], payload: Mapping[str, Any], now: float
) -> int:
    """Send an event, signed with every secret; return the HTTP status, 0 for no response."""
    body = json.dumps(payload, separators=(",", ":")).encode()
    id = str(payload["id"])
    timestamp = int(now)
    headers = {
        "content-type": "application/json",
        "user-agent": "skyloom",
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(sign(secret, id, timestamp, body) for secret in signing),
    }
    try:
        return post(url, headers, body)
    except (SkyloomError, OSError) as error:
        details = {"event": id, "cause": type(error).__name__}
        log.warning("a webhook could not be sent", extra=details)
        return 0


def as_endpoint(row: Row[Any]) -> Endpoint:
    """Convert a row of the table."""
    values = {field.name: row._mapping[field.name] for field in fields(Endpoint)}
    return Endpoint(**{**values, "event_types": tuple(row.event_types)})


def _found(row: Row[Any] | None, id: str) -> Endpoint:
    if row is None:
        raise NotFoundError("webhook endpoint", id)
    return as_endpoint(row)


def _new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def _is_owned(id: str, owner: str) -> ColumnElement[bool]:
    return and_(endpoints.c.id == id, endpoints.c.owner == owner)
