"""How often each rule of the policy has refused: by its name, what of, and the code that clients were told.

Counted in the database, since workers on other hosts refuse too. Nothing of what was refused is kept.
"""

from collections.abc import Mapping

from sqlalchemy import BigInteger, Column, Connection, String, Table, insert, select, update

from skyloom.serve.queue.database import Write
from skyloom.serve.queue.tables import metadata

BLOCKED, FAILED = "moderation_blocked", "moderation_failed"
_LONGEST = 200

refusals = Table(
    "refusals",
    metadata,
    Column("rule", String(_LONGEST), primary_key=True),
    Column("target", String(16), primary_key=True),
    Column("code", String(32), primary_key=True),
    Column("count", BigInteger, nullable=False),
)


def count_refusal(write: Write, rule: str, target: str, code: str) -> None:
    """Count one: of a "prompt", an "input" (media to start from) or the "output" (made frames)."""
    key = {"rule": rule[:_LONGEST], "target": target, "code": code}
    same = [refusals.c[name] == value for name, value in key.items()]
    more = update(refusals).where(*same).values(count=refusals.c.count + 1)
    if not write.connection.execute(more).rowcount:
        write.connection.execute(insert(refusals).values(**key, count=1))


def read_refusals(connection: Connection) -> Mapping[tuple[str, str, str], int]:
    """All counts, by rule, target and code."""
    rows = connection.execute(select(refusals)).all()
    return {(rule, target, code): count for rule, target, code, count in rows}
