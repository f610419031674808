"""Webhooks: who wants to hear of which events, and how an event is signed and sent (deliveries.py says when).

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

from skyloom.core.errors import QueueError, SkyloomError
from skyloom.serve.queue.database import MAX_PAGE, Database, Write, read_page
from skyloom.serve.queue.quotas import Quotas
from skyloom.serve.queue.slots import Slots
from skyloom.serve.queue.tables import deliveries, endpoints

EVENT_TYPES = ("video.completed", "video.failed")
OLD_SECRET_SECONDS = 24 * 3600
_TESTS, _TESTS_OF_OWNER = 4, 1
Post = Callable[[str, Mapping[str, str], bytes], int]
"""Sends headers and a body to a URL and returns the HTTP status; raises SkyloomError or OSError when it cannot."""

log = logging.getLogger(__name__)


class MissingEndpointError(QueueError):
    """There is no such webhook endpoint, or it is somebody else's."""

    code = "endpoint_missing"


@dataclass(frozen=True)
class Endpoint:
    """Where an owner wants events sent. The `secret` is for signing, and to be shown when made or rotated only; the one
    before it signs too until `old_secret_until`, if it was kept."""

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

    def signing(self, now: float) -> list[str]:
        """The secrets that sign at a time, the newest first."""
        old = self.old_secret if (self.old_secret_until or 0.0) > now else None
        return [self.secret] if old is None else [self.secret, old]


class EndpointStore:
    """The endpoints of every owner. Methods raise MissingEndpointError for those of others. `tests` are the test events
    that may be sent at once, each by a request that waits for the answer."""

    def __init__(self, database: Database, quotas: Quotas | None = None) -> None:
        self.database = database
        self.tests = Slots(_TESTS, _TESTS_OF_OWNER)
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
            return as_endpoint(
                connection.execute(select(endpoints).where(_is(id, owner))).one_or_none()
            )

    def page(self, owner: str) -> list[Endpoint]:
        """The newest MAX_PAGE endpoints of an owner, the newest first."""
        look = (
            select(endpoints)
            .where(endpoints.c.owner == owner)
            .order_by(endpoints.c.created_at.desc())
        )
        with self.database.read() as connection:
            rows, _ = read_page(connection, look, MAX_PAGE)
        return [as_endpoint(row) for row in rows]

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
            write.connection.execute(
                update(endpoints).where(_is(id, owner)).values(**values, updated_at=write.now)
            )
            return as_endpoint(
                write.connection.execute(select(endpoints).where(_is(id, owner))).one_or_none()
            )


def announce(write: Write, owner: str, event_type: str, job: str) -> None:
    """Write down that the owner's endpoints are to hear of an event of a job."""
    rows = write.connection.execute(select(endpoints).where(endpoints.c.owner == owner)).all()
    wanting = [row.id for row in rows if event_type in row.event_types]
    if wanting:
        payload = make_payload(event_type, job, write.now)
        row = {
            "event": payload["id"],
            "payload": payload,
            "next_at": write.now,
            "created_at": write.now,
        }
        write.connection.execute(
            insert(deliveries), [{**row, "endpoint": endpoint} for endpoint in wanting]
        )


def make_payload(event_type: str, job: str, now: float) -> dict[str, Any]:
    """An event as it is sent, with an id of its own."""
    event = f"evt_{secrets.token_hex(16)}"
    return {
        "id": event,
        "object": "event",
        "created_at": int(now),
        "type": event_type,
        "data": {"id": job},
    }


def sign(secret: str, id: str, timestamp: int, body: bytes) -> str:
    """One signature as the header holds it. A secret "whsec_..." is base64, any other is taken as it is."""
    key = secret.encode()
    if secret.startswith("whsec_"):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except (binascii.Error, ValueError):
            key = secret.encode()
    digest = hmac.new(
        key, b".".join([id.encode(), str(timestamp).encode(), body]), hashlib.sha256
    ).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def send(
    post: Post, url: str, signing: Sequence[str], payload: Mapping[str, Any], now: float
) -> int:
    """Send an event, signed with every secret; the HTTP status, or 0 when nothing answered."""
    body = json.dumps(payload, separators=(",", ":")).encode()
    id, timestamp = str(payload["id"]), int(now)
    headers = {"content-type": "application/json", "user-agent": "skyloom", "webhook-id": id}
    headers["webhook-timestamp"] = str(timestamp)
    headers["webhook-signature"] = " ".join(sign(secret, id, timestamp, body) for secret in signing)
    try:
        return post(url, headers, body)
    except (SkyloomError, OSError) as error:
        log.warning(
            "a webhook could not be sent", extra={"event": id, "cause": type(error).__name__}
        )
        return 0


def _new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"


def _is(id: str, owner: str) -> Any:
    return and_(endpoints.c.id == id, endpoints.c.owner == owner)


def as_endpoint(row: Row[Any] | None) -> Endpoint:
    """A row of the table. Raises MissingEndpointError when there is none."""
    if row is None:
        raise MissingEndpointError("There is no such webhook endpoint.")
    names = (
        "id",
        "owner",
        "name",
        "url",
        "secret",
        "created_at",
        "updated_at",
        "old_secret",
        "old_secret_until",
    )
    return Endpoint(
        **{name: row._mapping[name] for name in names}, event_types=tuple(row.event_types)
    )
