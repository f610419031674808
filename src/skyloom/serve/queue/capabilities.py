# pyright: basic
"""What a job needs of its worker, and what workers announce: models, LoRAs and memory.

The needs of a job are one column: a JSON list of its model and its LoRAs, in a fixed order, so that
a worker decides about all queued jobs by the few distinct values.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import Connection, bindparam, select

from skyloom.models.registry import DEFAULT_MODEL
from skyloom.serve.queue.errors import ModelNotHeldError
from skyloom.serve.queue.tables import workers

ALIVE_SECONDS = 60  # a worker not seen for longer is not counted

_ALIVE = select(workers.c.name, workers.c.capabilities).where(
    workers.c.seen_at > bindparam("after")
)
_BY_NAME = select(workers.c.capabilities).where(workers.c.name == bindparam("where_name"))


@dataclass(frozen=True)
class Capabilities:
    """What a worker can render.

    `models`: bytes of memory that each takes, by name. `memory_bytes` is what the worker has for
    them; None is no limit. The default is that of a worker which announced nothing.
    """

    models: Mapping[str, int] = field(default_factory=lambda: {DEFAULT_MODEL: 0})
    loras: tuple[str, ...] = ()
    memory_bytes: int | None = None

    @classmethod
    def from_row(cls, values: Mapping[str, Any] | None) -> "Capabilities":
        """Convert the column of a row; None is a worker which announced nothing."""
        if values is None:
            return cls()
        return cls(values["models"], tuple(values["loras"]), values["memory_bytes"])

    def to_row(self) -> dict[str, Any]:
        """Return the JSON values of the column."""
        return asdict(self)

    @property
    def usable_models(self) -> list[str]:
        """Names of the models that fit into the memory."""
        limit = self.memory_bytes
        return [name for name, size in self.models.items() if limit is None or size <= limit]

    def can_render(self, needs: str) -> bool:
        """Whether the worker has the model and all LoRAs of a job."""
        model, *loras = json.loads(needs)
        return model in self.usable_models and set(loras) <= set(self.loras)


def needs_of(request: Mapping[str, Any]) -> str:
    """Return the needs of a request: its `model`, and the names of its `loras`."""
    names = {lora["name"] for lora in request.get("loras") or ()}
    model = request.get("model") or DEFAULT_MODEL
    return json.dumps([model, *sorted(names)], ensure_ascii=False, separators=(",", ":"))


def model_of(needs: str) -> str:
    """Return the model of a job's needs."""
    return json.loads(needs)[0]


def read_capabilities(connection: Connection, worker: str) -> Capabilities:
    """Read what a worker has announced."""
    row = connection.execute(_BY_NAME, {"where_name": worker}).one_or_none()
    return Capabilities.from_row(None if row is None else row.capabilities)


def live_capabilities(connection: Connection, now: float) -> dict[str, Capabilities]:
    """Read what the workers seen in the last ALIVE_SECONDS have announced, by worker."""
    rows = connection.execute(_ALIVE, {"after": now - ALIVE_SECONDS})
    return {row.name: Capabilities.from_row(row.capabilities) for row in rows}


def check_held(
    live: Mapping[str, Capabilities], needs: str, own_workers: Sequence[str] = ()
) -> None:
    """Check that a live worker can render a job. Raises ModelNotHeldError.

    Passes while no worker is live, and while one of the server's `own_workers` is not: they start
    after the server and hold the models of its host.
    """
    if not live or not live.keys() >= set(own_workers):
        return
    if any(one.can_render(needs) for one in live.values()):
        return
    model, *loras = json.loads(needs)
    holders = [one for one in live.values() if model in one.usable_models]
    if holders:
        name, value = "loras", ", ".join(loras)
        held = {lora for one in holders for lora in one.loras}
    else:
        name, value = "model", model
        held = {usable for one in live.values() for usable in one.usable_models}
    raise ModelNotHeldError(
        f"{name} must be held by a running worker, got {value!r:.100}.",
        hint=f"Held: {', '.join(sorted(held)) or 'none'}.",
        field=name,
    )
